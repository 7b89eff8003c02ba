"""The table of objectives, and objectives of one's own: on images with targets, and on the weights alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import learned, same, short_run, task_set
from pydantic import ValidationError
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, UserError
from pareto_merging.learn import loop
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.log import status_of
from pareto_merging.learn.objectives import OBJECTIVES, Objective, ObjectiveKind, TaskTerms, register
from pareto_merging.learn.scalarize import SCALARIZATIONS
from pareto_merging.learn.scalarize import register as register_scalarization
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import preference
from pareto_merging.run.config import read_config
from pareto_merging.run.train import train_run


class Teacher(Objective):
    """KL(teacher ‖ predictions), with the teacher's logits of every image made beforehand: on images, with targets."""

    watches = ("teacher_entropy",)
    has_targets = True

    def __init__(self, model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> None:
        assert not model.training and not any(task.head.training for task in tasks.values())
        self.names = list(tasks)
        with torch.no_grad(), preference(model, {self.names[0]: 1.0}):
            self.logits = [task.head(model(task.images.images)) for task in tasks.values()]

    def targets(self, task: int, indices: Sequence[int]) -> Tensor:
        return self.logits[task][list(indices)]

    def terms(self, task: int, logits: Tensor, targets: Tensor | None) -> TaskTerms:
        assert targets is not None
        teacher = targets.softmax(dim=-1)
        kl = (teacher * (targets.log_softmax(dim=-1) - logits.log_softmax(dim=-1))).sum(dim=-1).mean()
        return TaskTerms(kl, (torch.special.entr(teacher).sum(dim=-1).mean(),))


class SmallLambda(Objective):
    """Σ over the layers of (λ_k − 1)²: on the weights alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def values(self, gamma: Tensor) -> Tensor:
        lams = [module.pareto_parameter(n).lam for _, module in pareto_modules(self.model) for n in module.pareto_names]
        return torch.stack([lam for lam in lams if lam is not None]).sub(1).square().sum(dim=0)


@pytest.fixture
def dummies() -> Iterator[None]:
    """Two objectives of one's own in the table, for as long as the test lasts."""
    register(ObjectiveKind("teacher", Teacher))
    register(ObjectiveKind("small-lambda", lambda model, tasks, settings: SmallLambda(model), needs="weights"))
    yield
    del OBJECTIVES["teacher"], OBJECTIVES["small-lambda"]


def pareto(net: nn.Module) -> nn.Module:
    return randomize(parametrize(net, {f"t{k}": noisy_copy(net, k + 1) for k in range(2)}, rank=2))


def test_the_table() -> None:
    assert [(kind.name, kind.needs) for kind in OBJECTIVES.values()] == [
        ("entropy", "images"),
        ("distillation", "images"),
        ("features", "features"),
        ("weight-distance", "weights"),
    ]
    with pytest.raises(ValueError, match="objective: expected a new name, got 'entropy', which is taken"):
        register(ObjectiveKind("entropy", Teacher))
    with pytest.raises(ValidationError, match="expected one of entropy, distillation, features, weight-distance"):
        MethodSettings(objective="teacher")


@pytest.mark.usefixtures("dummies")
@pytest.mark.parametrize("name", ["teacher", "small-lambda"])
@pytest.mark.parametrize("at_once", ["one", "all"])
def test_one_of_ones_own_is_learned_with_and_resumed(
    tiny_vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at_once: Any
) -> None:
    settings = short_run(objective=name, steps=5, learning_rate=0.01, preference="equal")
    tasks = task_set(2) if OBJECTIVES[name].needs == "images" else None
    whole = pareto(tiny_vit)
    before = learned(whole)
    how = {"progress": False, "tasks_at_once": at_once}
    result = loop.learn_pareto_set(whole, tasks, settings, folder=tmp_path / "whole", **how)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0]
    assert not same(learned(whole), before)
    assert ("teacher_entropy" in result.history[0]) == (name == "teacher")
    assert "entropy" not in result.history[0]

    def stop_after(learner: Learner, folder: Path, step: int, best: Any, save: Any = loop.save_checkpoint) -> None:
        save(learner, folder, step, best)
        if step == 2:
            raise Interrupted("enough", step)

    monkeypatch.setattr(loop, "save_checkpoint", stop_after)
    with pytest.raises(Interrupted):
        loop.learn_pareto_set(pareto(tiny_vit), tasks, settings, folder=tmp_path / "cut", **how)
    monkeypatch.undo()
    again = pareto(tiny_vit)
    resumed = loop.learn_pareto_set(again, tasks, settings, folder=tmp_path / "cut", resume=True, **how)
    assert resumed.resumed_from == 2
    assert same(learned(again), learned(whole))
    other = settings.model_copy(update={"objective": "entropy"})
    with pytest.raises(UserError, match=f"differs in objective \\('{name}', now 'entropy'\\)"):
        loop.learn_pareto_set(pareto(tiny_vit), task_set(2), other, folder=tmp_path / "cut", resume=True, **how)


@pytest.mark.usefixtures("dummies")
def test_targets_are_those_of_the_images(tiny_vit: nn.Module) -> None:
    """A teacher that is the model itself, as it is: nothing is left to learn, whatever the order of the images."""
    model = pareto(tiny_vit).train()
    settings = short_run(objective="teacher", preference="fixed", gamma=(1.0, 0.0))
    learner = Learner(model, task_set(2), settings)
    assert model.training
    outcome = learner.step(1, next(learner.batches(0, 0)))
    assert outcome.objectives == pytest.approx([0.0, 0.0], abs=1e-5)
    assert status_of(outcome).startswith("loss ") and "teacher_entropy" in status_of(outcome)


@pytest.mark.usefixtures("dummies")
@pytest.mark.parametrize("name", ["teacher", "small-lambda"])
def test_a_configuration_may_name_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"suite: digits\ntasks: [upright, rotated]\nmethod: {{objective: {name}, steps: 2, batch_size: 4}}\n"
    )
    config = read_config(path)
    _, result = train_run(config, tmp_path / "run", progress=False)
    assert result.steps == 2
    assert (tmp_path / "run" / CHECKPOINT_NAME).exists()


class TooFew(Objective):
    watches = ("one", "two")

    def terms(self, task: int, logits: Tensor, targets: Tensor | None) -> TaskTerms:
        return TaskTerms(logits.square().mean(), (logits.mean().detach(),))


def test_what_is_missing_is_said(tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = ObjectiveKind("bare", lambda model, tasks, settings: Objective())  # type: ignore[misc]
    for name, kind, message in (
        ("few", ObjectiveKind("few", lambda m, t, s: TooFew()), "objective few: expected 3 numbers of each of 2 tasks"),
        ("bare", bare, "Protocols cannot be instantiated"),
    ):
        monkeypatch.setitem(OBJECTIVES, name, kind)
        with pytest.raises((ValueError, TypeError), match=message):
            loop.learn_pareto_set(pareto(tiny_vit), task_set(2), short_run(objective=name), progress=False)
    monkeypatch.setitem(OBJECTIVES, "small", ObjectiveKind("small", lambda m, t, s: SmallLambda(m)))
    with pytest.raises(TypeError, match="objective: expected a method terms in SmallLambda, got none"):
        loop.learn_pareto_set(pareto(tiny_vit), task_set(2), short_run(objective="small"), progress=False)


class Watching(TooFew):
    """One objective, and numbers beside it that are called as the case wants."""

    def __init__(self, *names: str) -> None:
        self.watches = names

    def terms(self, task: int, logits: Tensor, targets: Tensor | None) -> TaskTerms:
        return TaskTerms(logits.square().mean(), tuple(logits.mean().detach() for _ in self.watches))


@pytest.mark.parametrize("name", ["event", "step", "loss", "gamma", "objective", "seconds", "warnings"])
def test_what_is_watched_is_not_called_as_what_the_log_says(
    tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(OBJECTIVES, "own", ObjectiveKind("own", lambda m, t, s: Watching("margin", name)))
    with pytest.raises(ValueError, match=f"objective own: expected other names to watch than .*, got {name}$"):
        loop.learn_pareto_set(pareto(tiny_vit), task_set(2), short_run(objective="own"), progress=False)
    monkeypatch.setitem(OBJECTIVES, "own", ObjectiveKind("own", lambda m, t, s: Watching("margin")))
    result = loop.learn_pareto_set(pareto(tiny_vit), task_set(2), short_run(objective="own"), progress=False)
    assert set(result.history[0]) == {"step", "loss", "gamma", "margin", "objective", "seconds", "warnings"}


def test_a_scalarisation_of_ones_own(tiny_vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="scalarization: expected a new name, got 'linear'"):
        register_scalarization("linear", lambda objectives, gamma, mu: objectives.sum())
    register_scalarization("squares", lambda objectives, gamma, mu: (gamma * objectives.square()).sum())
    try:
        settings = short_run(scalarization="squares")
        result = loop.learn_pareto_set(pareto(tiny_vit), task_set(2), settings, progress=False)
        assert result.steps == 4
    finally:
        del SCALARIZATIONS["squares"]
    with pytest.raises(ValidationError, match="expected one of smooth-tchebycheff, tchebycheff, linear"):
        MethodSettings(scalarization="squares")


def test_what_an_objective_needs_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="needs to be images, features or weights, got 'image'"):
        register(ObjectiveKind("misspelt", "module:function", needs="image"))  # type: ignore[arg-type]
    assert "misspelt" not in OBJECTIVES
