"""Every method by name: how it is called on one :class:`Problem`, what it needs and what there is to choose for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import (
    adamerging,
    adamerging_preference,
    dare,
    data_free,
    fisher,
    individual,
    multitask,
    outer_product,
    pareto,
    pretrained,
    regmean,
    task_arithmetic,
    task_arithmetic_preference,
    ties,
    weight_averaging,
)
from pareto_merging.methods.interface import Merged, task_names
from pareto_merging.model.copies import Weights

Needs: TypeAlias = Literal["weights", "images", "labels"]
Stores: TypeAlias = Literal["1 model", "1 model + low rank", "all models", "1 model per preference"]
Choice: TypeAlias = dict[str, Any]


@dataclass
class Problem:
    """What there is to merge, and with what.

    Attributes:
        pretrained, finetuned: the weights, as for :func:`parametrize`. tasks: unlabelled images and heads, for the
            methods that need "images". training: labelled images and heads, for those that need "labels".
        method: Pareto Merging's settings; of the other methods that learn, its ``steps`` (where given) and ``seed``.
        folder: where a method that learns keeps checkpoints, and goes on from those that are there. None: nowhere.
    """

    pretrained: nn.Module
    finetuned: Sequence[Weights] | Mapping[str, Weights]
    tasks: Mapping[str, Task] | None = None
    training: Mapping[str, Task] | None = None
    method: MethodSettings = field(default_factory=lambda: MethodSettings.model_validate({}))
    folder: Path | None = None
    progress: bool = True

    @property
    def task_names(self) -> tuple[str, ...]:
        return task_names(self.finetuned)


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        title: the name in tables. needs: "weights" alone, unlabelled "images", or "labels".
        stores: what must be kept to answer any preference later (table 1 of arXiv 2408.12105 v1).
        run: (problem, choice) -> what the method finds with that choice of its hyper-parameters.
        choices: (tasks K, the problem's method settings) -> what to choose from, the published values first.
        is_bound: an upper bound, not a merged model. runs_per_preference: each new γ costs a run of its own.
        learns: takes optimiser steps (for estimates of time).
    """

    title: str
    needs: Needs
    run: Callable[[Problem, Choice], Merged]
    choices: Callable[[int, MethodSettings], list[Choice]]
    stores: Stores = "1 model"
    is_bound: bool = False
    runs_per_preference: bool = False
    learns: bool = False


def run(name: str, problem: Problem, **choice: Any) -> Merged:
    """Method ``name`` of :data:`METHODS` on a problem, with its published values where ``choice`` gives none.

    Raises:
        KeyError: no such method. ValueError: what the method needs is not there.
    """
    method = METHODS[name]
    check_needs(method, problem)
    published = method.choices(len(problem.task_names), problem.method)[0]
    return method.run(problem, {**published, **choice})


def check_needs(method: Method, problem: Problem) -> None:
    """ValueError naming the tasks without the images that the method needs."""
    names = problem.task_names
    if method.needs == "images":
        lacking = [name for name in names if name not in (problem.tasks or {})]
        if lacking:
            raise ValueError(f"tasks: expected unlabelled images of every task, got none of {', '.join(lacking)}")
    if method.needs == "labels":
        lacking = [name for name in names if name not in (problem.training or {})]
        if lacking:
            raise ValueError(f"training: expected labelled images of every task, got none of {', '.join(lacking)}")


def _plain(merge: Callable[..., Merged]) -> Callable[[Problem, Choice], Merged]:
    return lambda problem, choice: merge(problem.pretrained, problem.finetuned, **choice)


def _with_images(merge: Callable[..., Merged]) -> Callable[[Problem, Choice], Merged]:
    return lambda problem, choice: merge(
        problem.pretrained,
        problem.finetuned,
        tasks=problem.tasks,
        seed=problem.method.seed,
        progress=problem.progress,
        **choice,
    )


def _learned(
    merge: Callable[..., Merged], settings: Callable[[Problem, Choice], MethodSettings], **fixed: Any
) -> Callable[[Problem, Choice], Merged]:
    def run_it(problem: Problem, choice: Choice) -> Merged:
        return merge(
            problem.pretrained,
            problem.finetuned,
            method=settings(problem, choice),
            folder=problem.folder,
            resume=problem.folder is not None and problem.folder.exists(),
            progress=problem.progress,
            **({} if merge is data_free.merge else {"tasks": problem.tasks}),
            **fixed,
        )

    return run_it


def _pareto_settings(**fixed: Any) -> Callable[[Problem, Choice], MethodSettings]:
    # what makes the method the one of its title, whatever the configuration's own run is
    same = {"objective": "entropy", "preprocess": "none", "core": "tensor", "preference": "dirichlet", "gamma": None}

    def settings(problem: Problem, choice: Choice) -> MethodSettings:
        return MethodSettings.model_validate({**problem.method.model_dump(), **same, **choice, **fixed})

    return settings


def _adamerging_settings(
    preset: adamerging.Preset = "official", **kind: bool
) -> Callable[[Problem, Choice], MethodSettings]:
    def settings(problem: Problem, choice: Choice) -> MethodSettings:
        base = problem.method
        shared: dict[str, Any] = {
            "seed": base.seed,
            "init_lambda": base.init_lambda,
            "buffers": base.buffers,
            "density": base.density,
            "checkpoint_every": base.checkpoint_every,
            "collapse_threshold": base.collapse_threshold,
        }
        if base.steps is not None:
            shared["steps"] = base.steps
        return adamerging.settings(preset, **kind, **{**shared, **choice})

    return settings


def _multitask(problem: Problem, choice: Choice) -> Merged:
    return multitask.merge(
        problem.pretrained,
        problem.finetuned,
        training=problem.training or {},
        batch_size=problem.method.batch_size,
        seed=problem.method.seed,
        progress=problem.progress,
        **{"steps": problem.method.steps_for(len(problem.task_names)), **choice},
    )


def _dare(problem: Problem, choice: Choice) -> Merged:
    return dare.merge(problem.pretrained, problem.finetuned, seed=problem.method.seed, **choice)


def _nothing(tasks: int, method: MethodSettings) -> list[Choice]:
    return [{}]


def _coefficients(tasks: int, method: MethodSettings) -> list[Choice]:
    # 0.3 is the published value for eight tasks; fewer task vectors bear a larger one
    return [{"coefficient": round(c, 4)} for c in (0.3, min(0.5, 3 / tasks), min(0.4, 2 / tasks), 0.2)]


def _preference_coefficients(tasks: int, method: MethodSettings) -> list[Choice]:
    return [{"coefficient": c} for c in (1.0, 1.5, 0.75, 2.0)]


def _ties_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [
        {"coefficient": 0.3, "density": 0.2, "combine": "sum"},
        {"coefficient": 1.0, "density": 0.2, "combine": "mean"},
        {"coefficient": round(min(0.5, 2 / tasks), 4), "density": 0.5, "combine": "sum"},
        {"coefficient": round(min(0.8, 3 / tasks), 4), "density": 0.2, "combine": "sum"},
    ]


def _dare_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [
        {"coefficient": 0.3, "density": 0.5},
        {"coefficient": round(min(0.5, 3 / tasks), 4), "density": 0.5},
        {"coefficient": round(min(0.4, 2 / tasks), 4), "density": 0.8},
        {"coefficient": 0.3, "density": 0.1},
    ]


def _fisher_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [
        {"normalize": True, "floor": 1e-6},
        {"normalize": False, "floor": 1e-6},
        {"normalize": True, "floor": 1e-4},
        {"normalize": True, "floor": 1e-8},
    ]


def _regmean_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [{"alpha": alpha} for alpha in (0.9, 0.5, 1.0, 0.1)]


def _rates(published: float) -> Callable[[int, MethodSettings], list[Choice]]:
    return lambda tasks, method: [{"learning_rate": published * factor} for factor in (1, 10, 30, 3)]


def _pareto_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    # the configuration's own settings first; then weaker regularisation and other rates
    rate = method.learning_rate
    return [
        {},
        {"concentration": 1.0, "tensor_norm": 0.01, "learning_rate": 3 * rate},
        {"learning_rate": 3 * rate, "lambda_learning_rate": 3 * (method.lambda_learning_rate or rate)},
        {"concentration": 1.0, "tensor_norm": 0.01},
    ]


def _with_density(
    choices: Callable[[int, MethodSettings], list[Choice]],
) -> Callable[[int, MethodSettings], list[Choice]]:
    # TIES's published 0.2 first; the others keep half of the entries
    return lambda tasks, method: [
        {**choice, **({"density": 0.5} if number else {})} for number, choice in enumerate(choices(tasks, method))
    ]


def _data_free_choices(tasks: int, method: MethodSettings) -> list[Choice]:
    rate = method.learning_rate
    return [{}, {"learning_rate": 10 * rate}, {"concentration": 1.0}, {"mu": 10 * method.mu}]


METHODS: dict[str, Method] = {
    "individual": Method(
        "Individual", "weights", _plain(individual.merge), _nothing, stores="all models", is_bound=True
    ),
    "multitask": Method("Multi-task training", "labels", _multitask, _rates(1e-4), is_bound=True, learns=True),
    "pretrained": Method("Pretrained", "weights", _plain(pretrained.merge), _nothing),
    "weight-averaging": Method("Weight averaging", "weights", _plain(weight_averaging.merge), _nothing),
    "fisher": Method("Fisher merging", "images", _with_images(fisher.merge), _fisher_choices),
    "regmean": Method("RegMean", "images", _with_images(regmean.merge), _regmean_choices),
    "task-arithmetic": Method("Task arithmetic", "weights", _plain(task_arithmetic.merge), _coefficients),
    "ties": Method("TIES-Merging", "weights", _plain(ties.merge), _ties_choices),
    "dare": Method("DARE", "weights", _dare, _dare_choices),
    "adamerging-task-wise": Method(
        "AdaMerging, task-wise",
        "images",
        _learned(adamerging.merge, _adamerging_settings(task_wise=True)),
        _rates(1e-3),
        learns=True,
    ),
    "adamerging": Method(
        "AdaMerging", "images", _learned(adamerging.merge, _adamerging_settings()), _rates(1e-3), learns=True
    ),
    "adamerging-fusionbench": Method(
        "AdaMerging, FusionBench",
        "images",
        _learned(adamerging.merge, _adamerging_settings("fusionbench")),
        _rates(1e-3),
        learns=True,
    ),
    "adamerging++": Method(
        "AdaMerging++",
        "images",
        _learned(adamerging.merge, _adamerging_settings(plus=True)),
        _with_density(_rates(1e-3)),
        learns=True,
    ),
    "task-arithmetic-preference": Method(
        "Task arithmetic + preference",
        "weights",
        _plain(task_arithmetic_preference.merge),
        _preference_coefficients,
        stores="all models",
    ),
    "adamerging-preference": Method(
        "AdaMerging + preference",
        "images",
        _learned(adamerging_preference.merge, _adamerging_settings()),
        _rates(1e-3),
        stores="1 model per preference",
        runs_per_preference=True,
        learns=True,
    ),
    "pareto-data-free": Method(
        "Pareto Merging, data-free",
        "weights",
        _learned(data_free.merge, _pareto_settings()),
        _data_free_choices,
        stores="1 model + low rank",
    ),
    "pareto": Method(
        "Pareto Merging",
        "images",
        _learned(pareto.merge, _pareto_settings()),
        _pareto_choices,
        stores="1 model + low rank",
        learns=True,
    ),
    "pareto++": Method(
        "Pareto Merging++",
        "images",
        _learned(pareto.merge, _pareto_settings(preprocess="ties")),
        _with_density(_pareto_choices),
        stores="1 model + low rank",
        learns=True,
    ),
    "outer-product-1": Method(
        "Outer product, variation 1",
        "images",
        _learned(outer_product.merge, _pareto_settings(), variation=1),
        _pareto_choices,
        stores="1 model + low rank",
        learns=True,
    ),
    "outer-product-2": Method(
        "Outer product, variation 2",
        "images",
        _learned(outer_product.merge, _pareto_settings(), variation=2),
        _pareto_choices,
        stores="1 model + low rank",
        learns=True,
    ),
}
