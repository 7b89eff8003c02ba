"""What a method is given, what there is to choose, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.gradient import TasksAtOnce
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.copies import Weights
from pareto_merging.preferences import Preference, check_preference, equal_preference

# K fine-tuned copies, in a mapping by task name
Copies: TypeAlias = Sequence[Weights] | Mapping[str, Weights]
Needs: TypeAlias = Literal["weights", "images", "labels"]
Stores: TypeAlias = Literal["1 model", "1 model + low rank", "all models", "1 model per preference"]
# hyper-parameters by name
Choice: TypeAlias = dict[str, Any]


@dataclass
class Merged:
    """A method's result.

    Attributes:
        task_names: of the K tasks, in the order of a preference's entries.
        at: γ [K] -> a plain module of the pretrained class. A method that finds one model gives that model for every γ.
        preference_aware: whether the model depends on γ.
        facts: what the method found beside the weights (learned λ, thresholds, runs): plain JSON.
        pareto: the Pareto model behind it, where there is one, for :func:`save_pareto_set`, :func:`fold` and the rest.
    """

    task_names: tuple[str, ...]
    at: Callable[[Tensor], nn.Module]
    preference_aware: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    pareto: nn.Module | None = None

    def model(self, gamma: Preference | None = None) -> nn.Module:
        """Return the plain model at a preference that :func:`check_preference` takes, by default the equal one."""
        if gamma is None:
            return self.at(equal_preference(len(self.task_names)))
        return self.at(check_preference(gamma, self.task_names, per_item=False))


class Run(TypedDict, total=False):
    """What a method that learns is told of its run: see :func:`learn_pareto_set`."""

    folder: Path | None
    resume: bool
    progress: bool
    tasks_at_once: TasksAtOnce


@dataclass
class Problem:
    """What there is to merge, and with what.

    Attributes:
        pretrained, finetuned: the weights, as for :func:`parametrize`. tasks: unlabelled images and heads, for the
            methods that need "images". training: labelled images and heads, for those that need "labels".
        method: Pareto Merging's settings; of the other methods that learn, its ``steps`` (where given) and ``seed``.
        folder: where a method that learns keeps checkpoints, and goes on from those that are there. None: nowhere.
        tasks_at_once: of a method that learns, see :func:`learn_pareto_set`.
    """

    pretrained: nn.Module
    finetuned: Copies
    tasks: Mapping[str, Task] | None = None
    training: Mapping[str, Task] | None = None
    method: MethodSettings = field(default_factory=lambda: MethodSettings.model_validate({}))
    folder: Path | None = None
    progress: bool = True
    tasks_at_once: TasksAtOnce = "one"

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the tasks' names, in the order of the copies."""
        return task_names(self.finetuned)

    def going_on(self) -> Run:
        """Return what a method that learns is told. It goes on from what the folder has."""
        resume = self.folder is not None and self.folder.exists()
        how: Run = {"folder": self.folder, "resume": resume, "progress": self.progress}
        return how if self.tasks_at_once == "one" else {**how, "tasks_at_once": self.tasks_at_once}


# (problem, choice) -> what the method finds
Runner: TypeAlias = Callable[[Problem, Choice], Merged]
# (tasks K, the problem's method settings) -> what to choose from
Choices: TypeAlias = Callable[[int, MethodSettings], list[Choice]]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        key: what it is called by. title: the name in tables.
        needs: "weights" alone, unlabelled "images", or "labels".
        run: finds something with a choice of its hyper-parameters. choices: what there is, the published values first.
        stores: what must be kept to answer any preference later (table 1 of arXiv 2408.12105 v1).
        is_bound: an upper bound, not a merged model. runs_per_preference: each new γ costs a run of its own.
        learns: takes optimiser steps (for estimates of time).
    """

    key: str
    title: str
    needs: Needs
    run: Runner
    choices: Choices = lambda tasks, method: [{}]
    stores: Stores = "1 model"
    is_bound: bool = False
    runs_per_preference: bool = False
    learns: bool = False


def check_needs(method: Method, problem: Problem) -> None:
    """Raise ValueError naming the tasks without the images that the method needs."""
    for need, argument, kind in (("images", "tasks", "unlabelled"), ("labels", "training", "labelled")):
        lacking = [name for name in problem.task_names if name not in (getattr(problem, argument) or {})]
        if method.needs == need and lacking:
            raise ValueError(f"{argument}: expected {kind} images of every task, got none of {', '.join(lacking)}")


def task_names(finetuned: Copies) -> tuple[str, ...]:
    """Return the tasks' names as :func:`parametrize` gives them: the keys, or ``task_1`` … ``task_K``."""
    return tuple(finetuned if isinstance(finetuned, Mapping) else (f"task_{k + 1}" for k in range(len(finetuned))))


def one_model(model: nn.Module, finetuned: Copies, **facts: Any) -> Merged:
    """Return the result of a method that finds one model."""
    return Merged(task_names(finetuned), lambda gamma: model, facts=facts)


def on_weights(merge: Callable[..., Merged]) -> Runner:
    """Return how ``merge(pretrained, finetuned, **choice)`` is run on a problem."""
    return lambda problem, choice: merge(problem.pretrained, problem.finetuned, **choice)


def on_images(merge: Callable[..., Merged]) -> Runner:
    """Return how a ``merge`` that looks at the tasks' images is run on a problem."""

    def run(problem: Problem, choice: Choice) -> Merged:
        given = {"tasks": problem.tasks, "seed": problem.method.seed, "progress": problem.progress}
        return merge(problem.pretrained, problem.finetuned, **given, **choice)

    return run


def learning(
    merge: Callable[..., Merged], settings: Callable[[Problem, Choice], MethodSettings], **fixed: Any
) -> Runner:
    """Return how a ``merge`` that learns on images is run on a problem."""

    def run(problem: Problem, choice: Choice) -> Merged:
        given = {"tasks": problem.tasks, "method": settings(problem, choice), **problem.going_on(), **fixed}
        return merge(problem.pretrained, problem.finetuned, **given)

    return run


def among(name: str, *values: float) -> Choices:
    """Return the choice among values of one hyper-parameter, the published one first."""
    return lambda tasks, method: [{name: value} for value in values]


def learning_rates(published: float) -> Choices:
    """Return the choice among four learning rates, the published one first."""
    return among("learning_rate", *(published * factor for factor in (1, 10, 30, 3)))
