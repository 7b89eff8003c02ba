"""What learning begins with: found once, kept in a folder, and read again only by the run it is of."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from learn_cases import learned, same
from method_cases import image_tasks
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task
from pareto_merging.learn.held_back import BestState, split
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto, regmean
from pareto_merging.methods import start as starts
from pareto_merging.methods.start import RIDGES, START_NAME, STARTS, begin, learn_from_start
from pareto_merging.model.base import base_tensors
from pareto_merging.model.fold import merge
from pareto_merging.model.learned import get_lambda
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import pareto_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(192, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x.flatten(1))))


def parts(**how: Any) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    copies = {f"t{k}": noisy_copy(net, k + 1, 0.3) for k in range(2)}
    return parametrize(net, copies, **{"rank": 2, "low_rank": "all", "constant_rank": 2, **how}), net, copies


def settings(**changes: Any) -> MethodSettings:
    return MethodSettings.model_validate(
        {"start": "regmean", "rank": 2, "low_rank": "all", "constant_rank": 2, **changes}
    )


@pytest.mark.parametrize("images", [7, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regmean_at_no_lambda_is_regmean(images: int, dtype: torch.dtype) -> None:
    _, net, copies = parts()
    net, copies = net.to(dtype), {name: module.to(dtype) for name, module in copies.items()}
    model, tasks = parametrize(net, copies, rank=2, low_rank="all", constant_rank=2), image_tasks(2)
    assert begin(model, net, copies, tasks, settings(start_images=images, seed=4), progress=False) == {}
    expected = regmean.merge(net, copies, tasks=tasks, images=images, seed=4, progress=False).model()
    assert pareto_state(model).start == "regmean" and not bool(get_lambda(model).any())
    for gamma in ([0.5, 0.5], [1.0, 0.0]):
        for name, p in merge(model, gamma).named_parameters():
            assert torch.equal(p, expected.get_parameter(name)), name


def test_the_pretrained_start_is_nothing(tmp_path: Path) -> None:
    model, net, copies = parts()
    before = learned(model)
    assert begin(model, net, copies, None, settings(start="pretrained"), folder=tmp_path) == {}
    assert same(learned(model), before) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="tasks: expected unlabelled images of every task for start regmean, got none"):
        begin(model, net, copies, None, settings())
    with pytest.raises(ValueError, match="tasks: expected images and a head for t1"):
        begin(model, net, copies, {"t0": image_tasks(1)["t0"]}, settings(), progress=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Task]]:
    """A start that is counted, with facts, and the tasks and settings that it was given."""
    seen: list[Any] = []
    original = STARTS["regmean"]

    def count(model: Any, pretrained: Any, finetuned: Any, tasks: Any, method: Any, progress: bool) -> dict[str, Any]:
        seen.append((tasks, method))
        original(model, pretrained, finetuned, tasks, method, progress)
        with torch.no_grad():
            model.fc.G.add_(0.5)
        return {"found": 1.5}

    monkeypatch.setitem(STARTS, "regmean", count)
    return seen


def test_it_is_kept_and_read_again_by_a_run_that_goes_on(tmp_path: Path, counted: list[Any]) -> None:
    model, net, copies = parts()
    folder = tmp_path / "new"
    how: dict[str, Any] = {"folder": folder, "progress": False}
    assert begin(model, net, copies, image_tasks(2), settings(), **how) == {"found": 1.5}
    again, *_ = parts()
    assert begin(again, net, copies, image_tasks(2), settings(), resume=True, **how) == {"found": 1.5}
    assert len(counted) == 1
    assert same(learned(again), learned(model)) and bool((again.fc.G == 0.5).all())
    assert all(torch.equal(p, base_tensors(model)[name]) for name, p in base_tensors(again).items())
    one, two = pareto_state(model), pareto_state(again)
    assert (one.start, one.base_digest) == (two.start, two.base_digest) and one.base_digest
    # a new run finds its own, and a folder of before is no harm
    begin(parts()[0], net, copies, image_tasks(2), settings(), **how)
    begin(parts()[0], net, copies, image_tasks(2), settings(), resume=True, folder=tmp_path / "none", progress=False)
    assert len(counted) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"method": settings(seed=1)},
        {"method": settings(start_images=5)},
        {"method": settings(ridge=0.1)},
        {"tasks": image_tasks(2, images=11)},
        {"built": {"rank": 3}},
        {"built": {"constant_rank": 1}},
        {"copies": {"t1": 9}},
    ],
)
def test_another_run_finds_its_own(tmp_path: Path, counted: list[Any], change: dict[str, Any]) -> None:
    model, net, copies = parts()
    begin(model, net, copies, image_tasks(2), settings(), folder=tmp_path, progress=False)
    copies = {name: noisy_copy(net, change.get("copies", {}).get(name, k + 1), 0.3) for k, name in enumerate(copies)}
    built = {"rank": 2, "low_rank": "all", "constant_rank": 2, **change.get("built", {})}
    model = parametrize(net, copies, **built)
    method = change.get("method", settings())
    for _ in range(2):
        begin(
            model,
            net,
            copies,
            change.get("tasks", image_tasks(2)),
            method,
            folder=tmp_path,
            resume=True,
            progress=False,
        )
    assert len(counted) == 2, "then it is the one that is kept"


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    from safetensors.torch import save_file

    tensors, metadata = read_tensors(path), read_metadata(path)
    del metadata["checksums"]
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


DAMAGE: list[Callable[[dict[str, Tensor], dict[str, str]], Any]] = [
    lambda t, m: t.pop("base.fc.weight"),
    lambda t, m: t.pop("A.fc.weight"),
    lambda t, m: t.update({"A.fc.weight": torch.zeros(3)}),
    lambda t, m: t.update({"base.fc.weight": torch.zeros(3)}),
    lambda t, m: t.update(more=torch.zeros(3)),
    lambda t, m: t["base.fc.weight"].fill_(math.nan),
    lambda t, m: t["G.fc.weight"].fill_(math.inf),
    lambda t, m: m.pop("facts"),
    lambda t, m: m.update(facts="{"),
    lambda t, m: m.update(identity="null"),
    lambda t, m: m.update(format="pareto-set"),
]


@pytest.mark.parametrize("change", range(len(DAMAGE)))
def test_a_damaged_one_is_found_anew_and_half_of_it_is_not_used(
    tmp_path: Path, counted: list[Any], change: int
) -> None:
    model, net, copies = parts()
    begin(model, net, copies, image_tasks(2), settings(), folder=tmp_path, progress=False)
    path = tmp_path / START_NAME
    rewritten(path, DAMAGE[change])
    again, *_ = parts()
    begin(again, net, copies, image_tasks(2), settings(), folder=tmp_path, resume=True, progress=False)
    assert len(counted) == 2 and same(learned(again), learned(model))
    path.write_bytes(path.read_bytes()[:-5])
    begin(parts()[0], net, copies, image_tasks(2), settings(), folder=tmp_path, resume=True, progress=False)
    assert len(counted) == 3


def test_what_is_held_back_is_not_looked_at_and_few_images_are_regularised(counted: list[Any]) -> None:
    model, net, copies = parts()
    tasks = image_tasks(2, images=20)
    method = settings(objective="distillation", scalarization="linear", few_images="regularise", tensor_norm=0.0)
    begin(model, net, copies, tasks, method, progress=False)
    given, used = counted[0]
    _, held = split(tasks, 0.2, method.seed)
    for name, task in given.items():
        assert len(task.images) == 16 and not set(task.images.indices) & set(held[name].images.indices)
    assert used.ridge == 0.1 and used.held_back == 0.2
    # the same that learning has: the method does both
    result = pareto.merge(net, copies, tasks=tasks, method=method.model_copy(update={"steps": 2}), progress=False)
    assert result.facts["start"] == {"found": 1.5} and "chosen" in result.facts
    assert counted[1][0]["t0"].images.indices == given["t0"].images.indices


def test_images_held_back_are_those_that_learning_holds_back_in_any_order_of_the_tasks(counted: list[Any]) -> None:
    model, net, copies = parts()
    tasks = image_tasks(2, images=20)
    turned = dict(reversed(tasks.items()))
    method = settings(objective="distillation", scalarization="linear", few_images="regularise", tensor_norm=0.0)
    begin(model, net, copies, turned, method, progress=False)
    _, held = split(tasks, 0.2, method.seed)
    for name, task in counted[0][0].items():
        assert not set(task.images.indices) & set(held[name].images.indices)


def test_a_start_of_other_images_or_of_models_without_digests_is_not_read(tmp_path: Path, counted: list[Any]) -> None:
    model, net, copies = parts()
    tasks, method = image_tasks(2), settings()
    begin(model, net, copies, tasks, method, folder=tmp_path, progress=False)
    shifted = {name: replace(task, images=TensorImages(task.images.images + 1)) for name, task in tasks.items()}
    begin(parts()[0], net, copies, shifted, method, folder=tmp_path, resume=True, progress=False)
    assert len(counted) == 2
    begin(parts()[0], net, copies, shifted, method, folder=tmp_path, resume=True, progress=False)
    assert len(counted) == 2, "what was found last is what is kept"
    begin(parts(digests=False)[0], net, copies, shifted, method, folder=tmp_path, resume=True, progress=False)
    assert len(counted) == 3


def test_a_task_of_the_wrong_type_is_one_line() -> None:
    model, net, copies = parts()
    with pytest.raises(TypeError, match="tasks: expected a Task for t0, got list"):
        begin(model, net, copies, {"t0": [], "t1": []}, settings(), progress=False)  # type: ignore[dict-item]


def test_the_sequential_start_is_kept_whole(tmp_path: Path) -> None:
    """Base and low-rank terms come back in their very bits; the facts are JSON."""
    model, net, copies = parts()
    method, tasks = settings(start="sequential"), image_tasks(2, images=30)
    facts = begin(model, net, copies, tasks, method, folder=tmp_path, progress=False)
    assert json.loads(json.dumps(facts)) == facts
    assert pareto_state(model).start == "sequential" and not bool(get_lambda(model).any())
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(starts.STARTS, "sequential")
        again, *_ = parts()
        assert begin(again, net, copies, tasks, method, folder=tmp_path, resume=True, progress=False) == facts
    assert same(learned(again), learned(model))
    assert all(torch.equal(p, base_tensors(model)[name]) for name, p in base_tensors(again).items())


def test_a_closed_form_of_its_own_round_trips(tmp_path: Path) -> None:
    """Its base goes with the file."""
    _, net, copies = parts()
    how: dict[str, Any] = {"rank": 2, "low_rank": "all", "progress": False}
    model = pm.merge_sequential(net, copies, tasks=image_tasks(2, images=30), **how).pareto
    pm.save_pareto_set(model, tmp_path / "set.safetensors")
    again, images = pm.load_pareto_set(tmp_path / "set.safetensors", net, copies), torch.randn(3, 3, 8, 8)
    assert pareto_state(again).start == "sequential"
    with torch.no_grad():
        for gamma in ([0.5, 0.5], [1.0, 0.0]):
            with pm.preference(model, gamma), pm.preference(again, gamma):
                assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("start", ["regmean", "sequential"])
def test_a_run_that_goes_on_after_its_start(tmp_path: Path, start: str) -> None:
    """It reads its start, and its checkpoint is of that very model."""
    _, net, copies = parts()
    tasks, ends = image_tasks(2, images=130), []
    method = MethodSettings.model_validate(
        {"preset": "expert", "start": start, "rank": 2, "low_rank": "all", "constant_rank": 2, "steps": 4}
    )
    for folder, resume in ((tmp_path / "one", False), (tmp_path / "one", True), (tmp_path / "two", False)):
        how: dict[str, Any] = {"folder": folder, "resume": resume, "progress": False}
        ends.append(learned(pareto.merge(net, copies, tasks=tasks, method=method, **how).pareto))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_headless_tasks_have_a_start(tmp_path: Path) -> None:
    model, net, copies = parts()
    tasks = {name: replace(task, head=Task(task.images).head) for name, task in image_tasks(2).items()}
    for name in ("regmean", "sequential"):
        begin(model, net, copies, tasks, settings(start=name, objective="features"), progress=False)


def few(**changes: Any) -> MethodSettings:
    expert = {"preset": "expert", "rank": 2, "low_rank": "all", "constant_rank": 2, "steps": 2, "batch_size": 4}
    return MethodSettings.model_validate({**expert, **changes})


@pytest.mark.parametrize("helps", [True, False])
def test_with_few_images_agreement_chooses_the_ridge(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """And if no step agrees more than the start, that is found again, of all images."""
    model, net, copies = parts()
    tasks, looks, used = image_tasks(2, images=15), dict(zip(RIDGES, (5.0, 7.0, 7.0, 6.0), strict=True)), []
    sequential = STARTS["sequential"]

    def start(model: nn.Module, net: nn.Module, copies: Any, tasks: Any, method: MethodSettings, progress: bool) -> Any:
        used.append((method.ridge, {name: len(task.images) for name, task in tasks.items()}))
        return sequential(model, net, copies, tasks, method, progress)

    def score(best: Any) -> float:
        # the learned model is looked at with more images of the run than the starts were
        return looks[used[-1][0]] if len(used) <= len(RIDGES) else 8.0 + (best.looks != {}) * (1 if helps else -1)

    monkeypatch.setitem(STARTS, "sequential", start)
    monkeypatch.setattr(BestState, "_agreement", score)
    result = learn_from_start(model, net, copies, tasks, few(), progress=False)
    facts = pareto_state(model).start_facts
    assert facts["tried"] == {f"{ridge:g}": score for ridge, score in looks.items()} if helps else facts["all images"]
    # the largest of equals; a fifth of the images is held back until all is chosen
    held = {"t0": 12, "t1": 12}
    expected = [(ridge, held) for ridge in (*RIDGES, 0.3)]
    assert used == (expected if helps else [*expected, (0.3, {"t0": 15, "t1": 15})])
    assert (result.chosen["step"] > 0) == helps and pareto_state(model).start == "sequential"


def test_many_images_are_not_held_back() -> None:
    model, net, copies = parts()
    result = learn_from_start(model, net, copies, image_tasks(2, images=130), few(), progress=False)
    facts = pareto_state(model).start_facts
    assert result.chosen == {} and "tried" not in facts
    assert facts["ridge"] == 1e-3 and facts["images"] == {"t0": 130, "t1": 130}
