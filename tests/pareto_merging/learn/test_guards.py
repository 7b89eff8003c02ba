"""The guards of a run: numbers that are not finite, collapse, signals."""

import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_cases import learned, same, short_run, task_set
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_tensors
from pareto_merging.data.tasks import ZeroShotHead
from pareto_merging.errors import TrainingError
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.guards import AgreementWatch
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.model.parametrize import parametrize

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


class Poison(nn.Module):
    """A head that turns to NaN from its n-th call on."""

    def __init__(self, head: nn.Module, call: int) -> None:
        super().__init__()
        self.head, self.call, self.calls = head, call, 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        logits = self.head(features)
        return logits * math.nan if self.calls >= self.call else logits


def test_a_nan_in_a_loss_stops_and_keeps_the_last_good_state(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path
) -> None:
    good = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(good, task_set(2), short_run(steps=2), progress=False)
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    tasks = task_set(2)
    tasks["t1"].head = Poison(tasks["t1"].head, 3)
    with pytest.raises(TrainingError, match="step 3, task t1, the head: its objective is nan") as caught:
        learn_pareto_set(model, tasks, short_run(steps=6), folder=tmp_path, progress=False)
    assert (caught.value.task, caught.value.step, caught.value.layer) == ("t1", 3, "the head")
    assert same(learned(model), learned(good))
    saved = read_tensors(tmp_path / CHECKPOINT_NAME)
    assert all(torch.equal(saved[f"parameter.{name}"], value) for name, value in learned(good).items())
    assert json.loads((tmp_path / LOG_NAME).read_text().splitlines()[-1])["event"] == "stopped"


def test_a_nan_inside_the_model_names_the_layer(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * math.inf

    model.transformer.resblocks[1].mlp.c_fc.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"step 1, task t0, layer transformer.resblocks.1.mlp.c_fc"):
        learn_pareto_set(model, task_set(2), short_run(), progress=False)
    broken = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with torch.no_grad():
        broken.transformer.resblocks[0].attn.in_proj_weight_lam[1] = math.nan
    with pytest.raises(TrainingError, match=r"parameter transformer.resblocks.0.attn.in_proj_weight_lam"):
        learn_pareto_set(broken, task_set(2), short_run(), progress=False)
    tasks = task_set(2)
    tasks["t1"].images.images[:] = math.nan
    with pytest.raises(TrainingError, match="task t1, the images"):
        learn_pareto_set(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2), tasks, short_run(), progress=False)


def test_collapse_is_watched_and_warned_about(tiny_vit: nn.Module, copies: Copies) -> None:
    class OneClass(ZeroShotHead):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features) + torch.tensor([50.0, 0, 0, 0, 0])

    tasks = task_set(2)
    tasks["t1"].head = OneClass(torch.randn(5, 8), 1.0)
    warned: list[str] = []
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    settings = short_run(steps=25)
    result = learn_pareto_set(model, tasks, settings, progress=False, on_warning=warned.append)
    assert "t1" in result.collapsed
    assert sum("task t1 may be collapsing" in text for text in warned) == 1
    assert result.history[0]["mean_prediction_entropy"]["t1"] < 0.1


def test_training_in_another_thread_sets_no_signal_handler(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(learn_pareto_set(model, task_set(2), short_run(), progress=False))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 4
    before = signal.getsignal(signal.SIGINT)
    learn_pareto_set(model, task_set(2), short_run(), progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_agreement_that_falls_is_reported_once() -> None:
    """By hand: 0.9 at first; 0.4 from then on is a running mean of 0.9 − 0.5·(1 − 0.95ⁿ), 0.15 below after 7 steps."""
    said: list[str] = []
    watch = AgreementWatch(said.append, 10**9)
    for step in range(1, 60):
        watch.look(step, [0.95, 0.85] if step == 1 else [0.5, 0.3])
        assert len(said) == (step >= 8), step
    assert said[0].startswith("step 8: ") and "from 90 % in step 1 to 75 %" in said[0]
    for first, then in (([0.1, 0.1], [0.1, 0.2]), ([0.85, 0.85], [0.9, 0.95]), ([0.85, 0.85], [0.75, 0.75])):
        watch = AgreementWatch(said.append, 10**9)
        for step in range(1, 60):
            watch.look(step, first if step == 1 else then)
    assert len(said) == 1


def test_agreement_of_few_images_is_not_mistaken_for_a_fall() -> None:
    """Batches of 16 images that agree at three quarters at random, over 200 steps, 200 times."""
    said: list[str] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        watch = AgreementWatch(said.append, 16)
        for step in range(200):
            watch.look(step, [float((torch.rand(16, generator=generator) < 0.75).double().mean())])
    assert not said
