"""The learner: Adam over long vectors, what a failed step leaves behind, and what a checkpoint holds."""

import itertools
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints.safetensors import read_tensors
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, TrainingError
from pareto_merging.learn import loop
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME, save_checkpoint
from pareto_merging.learn.gradient import GradientOfStep, StepGradient
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state
from pareto_merging.model.strategy import merged_bytes, set_strategy

TASKS = 3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6, bias=False)
        ).to(dtype)


def pareto(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    net = network(dtype)
    finetuned = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}
    return randomize(pm.parametrize(net, finetuned, **{"rank": 2, "low_rank": "all", **settings}))


def task_set(dtype: torch.dtype = torch.float64, images: int = 12) -> dict[str, Task]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for k in range(TASKS):
        head = nn.Linear(6, 4 + k)
        for parameter in head.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
        pictures = torch.randn(images, 3, 2, 2, generator=generator)
        found[f"t{k}"] = Task(TensorImages(pictures), head.to(dtype))
    return found


def method(**changes: Any) -> MethodSettings:
    return MethodSettings.model_validate(
        {"steps": 4, "batch_size": 4, "rank": 2, "seed": 3, "checkpoint_every": 1, **changes}
    )


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learned_parameters(model).items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another rate of λ": {"lambda_learning_rate": 0.05},
    "frozen λ": {"learn_lambda": False},
    "clamped λ": {"clamp_lambda": True, "lambda_learning_rate": 0.3},
    "several preferences": {"preferences_per_step": 3},
    "data-free": {"objective": "weight-distance"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_long_vectors_are_stepped_as_the_parameters_would_be(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The library's Adam over each parameter by itself, with the gradients the learner saw."""
    settings = method(**SETTINGS[case])
    model = pareto()
    state = pareto_state(model)
    state.now.lambda_range = (0.0, 1.0) if settings.clamp_lambda else None
    learner = Learner(model, task_set(), settings)
    own = {name: nn.Parameter(p.detach().clone()) for name, p in learner.learned.items()}
    rates = [(settings.lambda_learning_rate or settings.learning_rate) if name.startswith("lam.") else
             settings.learning_rate for name in own]  # fmt: skip
    adam = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip(own.values(), rates, strict=True)], betas=settings.betas
    )
    seen: list[Tensor] = []
    original = GradientOfStep.__call__

    def watched(self: GradientOfStep, *given: Any) -> StepGradient:
        outcome = original(self, *given)
        seen.append(outcome.gradient.clone())
        return outcome

    monkeypatch.setattr(GradientOfStep, "__call__", watched)
    for step, batch in enumerate(learner.batches(0, 0), start=1):
        seen.clear()
        learner.step(step, batch)
        assert len(seen) == settings.preferences_per_step
        mean = torch.stack(seen).mean(dim=0)
        for p, part in zip(own.values(), mean.split([p.numel() for p in own.values()]), strict=True):
            p.grad = part.view(p.shape)
        adam.step()
        for name, p in learner.learned.items():
            assert p.dtype == torch.float64
            torch.testing.assert_close(p, own[name], rtol=1e-12, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")


def test_the_frozen_lambda_stays() -> None:
    model = pareto()
    before = learned(model)
    learn_pareto_set(model, task_set(), method(learn_lambda=False), progress=False)
    for name, value in learned(model).items():
        assert torch.equal(value, before[name]) == name.startswith("lam."), name


def test_a_gradient_that_the_next_call_overwrites() -> None:
    """As a captured graph's is."""
    results = []
    for overwritten in (False, True):
        model = pareto()
        learner = Learner(model, task_set(), method(preferences_per_step=3))
        if overwritten:
            compute, place = learner.gradient, []

            def static(*given: Any, compute: Any = compute, place: Any = place) -> Any:
                fresh = compute(*given)
                if not place:
                    place.append(StepGradient(*(value.clone() for value in fresh)))
                for old, new in zip(place[0], fresh, strict=True):
                    old.copy_(new)
                return place[0]

            learner.gradient = static  # type: ignore[assignment]
        outcomes = [learner.step(step, batch) for step, batch in enumerate(learner.batches(0, 0), start=1)]
        results.append((learned(model), outcomes))
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("strategy", ["auto", "cached"])
def test_resumed_runs_have_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, strategy: str
) -> None:
    class Stop(Exception):
        pass

    whole = pareto()
    set_strategy(whole, strategy)
    learn_pareto_set(whole, task_set(), method(**SETTINGS[case]), progress=False, folder=tmp_path / "whole")
    part = pareto()
    set_strategy(part, strategy)

    def stop_after(learner: Learner, folder: Path, step: int, best: Any) -> None:
        save_checkpoint(learner, folder, step, best)
        if step == 2:
            raise Stop

    monkeypatch.setattr(loop, "save_checkpoint", stop_after)
    with pytest.raises(Stop):
        learn_pareto_set(part, task_set(), method(**SETTINGS[case]), progress=False, folder=tmp_path / "part")
    monkeypatch.undo()
    again = pareto()
    set_strategy(again, strategy)
    settings = method(**SETTINGS[case])
    result = learn_pareto_set(again, task_set(), settings, progress=False, folder=tmp_path / "part", resume=True)
    assert (result.resumed_from, result.steps) == (2, 4)
    assert_same_bits(learned(again), learned(whole))
    files = [read_tensors(tmp_path / name / CHECKPOINT_NAME, torch.device("cpu")) for name in ("whole", "part")]
    assert_same_bits(*files)


def test_names_in_a_checkpoint_are_those_of_the_parameters(tmp_path: Path) -> None:
    model = pareto()
    learn_pareto_set(model, task_set(), method(lambda_learning_rate=0.1), progress=False, folder=tmp_path)
    tensors = read_tensors(tmp_path / CHECKPOINT_NAME, torch.device("cpu"))
    parameters = learned_parameters(model)
    assert tensors.keys() == {f"{kind}.{n}" for n in parameters for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    for name, value in tensors.items():
        kind, _, parameter = name.partition(".")
        assert (value.shape, value.dtype) == (parameters[parameter].shape, parameters[parameter].dtype), name
        assert kind != "parameter" or torch.equal(value, parameters[parameter].detach())


def _bad_images(tasks: dict[str, Task], learner: Learner) -> None:
    tasks["t1"].images.images.fill_(torch.nan)


def _bad_head(tasks: dict[str, Task], learner: Learner) -> None:
    tasks["t1"].head.weight.fill_(torch.inf)


@pytest.mark.parametrize(("fault", "layer"), [(_bad_images, "the images"), (_bad_head, "the head")])
@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("preferences", [1, 2])
def test_a_step_that_fails_never_was(tmp_path: Path, fault: Any, layer: str, good_steps: int, preferences: int) -> None:
    model, tasks = pareto(), task_set()
    learner = Learner(model, tasks, method(preferences_per_step=preferences))
    batches = learner.batches(0, 0)
    for step in range(1, good_steps + 1):
        learner.step(step, next(batches))
    save_checkpoint(learner, tmp_path, good_steps)
    state = pareto_state(model)
    before, moments, gamma = learned(model), [t.clone() for t in learner.adam.state()], state.now.gamma
    counts = [float(s["step"]) for s in learner.adam.optimizer.state.values()]
    saved = read_tensors(tmp_path / CHECKPOINT_NAME, torch.device("cpu"))
    batch = next(batches)
    fault(tasks, learner)
    if fault is _bad_images:
        batch[1] = torch.full_like(batch[1], torch.nan)
    with pytest.raises(TrainingError, match=f"step {good_steps + 1}, task t1, {layer}: its objective is nan") as caught:
        learner.step(good_steps + 1, batch)
    assert (caught.value.task, caught.value.step, caught.value.layer) == ("t1", good_steps + 1, layer)
    assert_same_bits(learned(model), before)
    for one, two in zip(learner.adam.state(), moments, strict=True):
        assert torch.equal(one, two)
    assert [float(s["step"]) for s in learner.adam.optimizer.state.values()] == counts
    assert state.now.gamma is gamma and state.now.vectors is None and state.now.cache is None
    assert_same_bits(read_tensors(tmp_path / CHECKPOINT_NAME, torch.device("cpu")), saved)


def test_a_learner_goes_on_after_a_failed_step() -> None:
    """With the bits of one that never failed."""
    results = []
    for fails in (False, True):
        model = pareto()
        learner = Learner(model, task_set(), method())
        for step, batch in enumerate(learner.batches(0, 0), start=1):
            if fails and step != 2:
                bad = [batch[0], torch.full_like(batch[1], math.nan), batch[2]]
                with pytest.raises(TrainingError):
                    learner.step(step, bad)
            learner.step(step, batch)
        results.append(learned(model))
    assert_same_bits(*results)


def test_a_parameter_that_overflows_is_named() -> None:
    model = pareto(torch.float32)
    tasks = task_set(torch.float32)
    with torch.no_grad():
        learned_parameters(model)["B.1.weight"].fill_(3.3e38)
        learned_parameters(model)["G.1.weight"].zero_()
    before = learned(model)
    with pytest.raises(TrainingError, match=r"step 1, ") as caught:
        learn_pareto_set(model, tasks, method(learning_rate=1e38, tensor_norm=0.0), progress=False)
    assert caught.value.layer.split(" ")[-1] in learned_parameters(model)
    assert_same_bits(learned(model), before)


def test_ctrl_c_finishes_the_step(tmp_path: Path) -> None:
    model, whole = pareto(), pareto()
    calls = itertools.count(1)

    def press(*_: Any) -> None:
        if next(calls) == TASKS + 1:
            os.kill(os.getpid(), signal.SIGINT)

    hook = model.register_forward_hook(press)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        learn_pareto_set(model, task_set(), method(checkpoint_every=100), progress=False, folder=tmp_path)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    result = learn_pareto_set(
        model, task_set(), method(checkpoint_every=100), progress=False, folder=tmp_path, resume=True
    )
    assert result.resumed_from == 2
    learn_pareto_set(whole, task_set(), method(), progress=False)
    assert_same_bits(learned(model), learned(whole))


def test_the_memory_budget_changes_nothing_about_the_result() -> None:
    results = []
    for budget in (None, 0, 700, 10**6):
        model = pareto()
        set_strategy(model, "auto", memory_budget=budget)
        learn_pareto_set(model, task_set(), method(), progress=False)
        results.append(learned(model))
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-9, atol=1e-11)


def test_a_model_of_two_dtypes_keeps_the_precision_of_each() -> None:
    """A float64 layer behind float32 ones: a step of nearly no length must not round its λ, A, G and B to float32."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x.flatten(1))).double())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Two()
    net.b.double()
    model = randomize(pm.parametrize(net, {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}, rank=2))
    before = learned(model)
    learn_pareto_set(model, task_set(), method(steps=1, learning_rate=1e-12), progress=False)
    for name, value in learned(model).items():
        assert value.dtype == before[name].dtype
        assert (value - before[name]).abs().max() < 1e-11, name


def test_learning_with_cached_holds_one_more_model() -> None:
    """Used before it is learned: the strategy's merges and the step's together are one model, as is promised."""
    model = pareto()
    set_strategy(model, "cached")
    model(torch.randn(2, 3, 2, 2, dtype=torch.float64))
    learner = Learner(model, task_set(), method())
    learner.step(1, next(learner.batches(0, 0)))
    held = {
        id(cache): cache.bytes for cache in (pareto_state(model).now.cache, learner.gradient.cache) if cache is not None
    }
    assert sum(held.values()) <= merged_bytes(model)


@pytest.mark.parametrize("strategy", ["auto", "cached"])
def test_a_model_is_right_after_learning(strategy: str) -> None:
    model = pareto()
    set_strategy(model, strategy)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    before = model(x)
    learn_pareto_set(model, task_set(), method(clamp_lambda=True, learning_rate=0.2), progress=False)
    after = model(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, pm.merge(model, [1 / TASKS] * TASKS)(x))
    assert pareto_state(model).now.lambda_range is None
