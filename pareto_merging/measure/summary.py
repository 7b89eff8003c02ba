"""A comparison's figures for each method, over its seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import ArrayLike

from pareto_merging.measure.metrics import Spread, hypervolume, indicators, spread, union_front
from pareto_merging.measure.results import Measured, Result


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds.

    Attributes:
        seeds: how many gave a model; without any, what follows ``failed`` is empty.
        reasons: why others did not. failed: whether one of them failed and was not just skipped.
        figures: by name, see :func:`summarize`. per_task: accuracy on each task at the equal preference (of an upper
            bound, of each task's own model). unseen: accuracy on each task without a checkpoint.
    """

    title: str
    is_bound: bool
    seeds: int
    reasons: list[str] = field(default_factory=list)
    failed: bool = False
    preference_aware: bool = False
    figures: dict[str, Spread] = field(default_factory=dict)
    per_task: dict[str, Spread] = field(default_factory=dict)
    unseen: dict[str, Spread] = field(default_factory=dict)

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure; None where it is not defined."""
        return self.figures[figure].mean if figure in self.figures else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, the figures beside the rest."""
        value: dict[str, Any] = {"title": self.title, "is_bound": self.is_bound, "seeds": self.seeds}
        if self.reasons:
            value |= {"reasons": self.reasons, "failed": self.failed}
        if self.seeds:
            value["preference_aware"] = self.preference_aware
            value |= {name: figure.to_json() for name, figure in self.figures.items()}
            value["per_task"] = {name: figure.to_json() for name, figure in self.per_task.items()}
        if self.unseen:
            value["unseen"] = {name: figure.to_json() for name, figure in self.unseen.items()}
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "MethodSummary":
        """Return the summary of :meth:`to_json`."""
        flat = ("title", "is_bound", "seeds", "reasons", "failed", "preference_aware")
        about = {key: value[key] for key in flat if key in value}
        by_task = ("per_task", "unseen")
        figures = {key: entry for key, entry in value.items() if key not in (*flat, *by_task)}
        per_task, unseen = (_spreads(value.get(key, {})) for key in by_task)
        return MethodSummary(**about, figures=_spreads(figures), per_task=per_task, unseen=unseen)


def _spreads(value: Mapping[str, Any]) -> dict[str, Spread]:
    return {name: Spread(**entry) for name, entry in value.items()}


def summarize(results: Sequence[Result]) -> dict[str, MethodSummary]:
    """Return figures per method, each with mean, standard deviation and the values over the seeds.

    Accuracies in percent: ``equal`` (average over the tasks), ``priority`` and ``one_hot`` (of the preferred task,
    averaged over the tasks). Hypervolume as a share of the box between the reference point and 100 % (None where a head
    of one class leaves no box); IGD+ (percent points) against the union of all methods' fronts of that seed, bounds
    left out.
    """
    done = [result for result in results if isinstance(result, Measured)]
    unions: dict[int, ArrayLike] = {}
    for seed in {result.seed for result in results}:
        fronts = [result.accuracies for result in done if result.seed == seed and not result.is_bound]
        if fronts:
            unions[seed] = union_front(fronts)
    return {
        key: _summary([result for result in results if result.method == key], unions)
        for key in dict.fromkeys(result.method for result in results)
    }


def _summary(results: Sequence[Result], unions: Mapping[int, ArrayLike]) -> MethodSummary:
    """Summarize the results of one method."""
    done = [result for result in results if isinstance(result, Measured)]
    figures = [_figures(result, unions.get(result.seed)) for result in done]
    first = done[0] if done else None
    return MethodSummary(
        results[0].title,
        results[0].is_bound,
        seeds=len(done),
        reasons=sorted({result.reason for result in results if result.status != "done"}),
        failed=any(result.status == "failed" for result in results),
        preference_aware=first is not None and first.preference_aware,
        figures={name: spread([row[name] for row in figures]) for name in (figures[0] if figures else ())},
        per_task={
            name: spread([_accuracy(result, name, "equal", f"one-hot:{name}") for result in done])
            for name in (first.tasks if first else ())
        },
        unseen={
            name: spread([result.unseen[name].accuracy for result in done]) for name in (first.unseen if first else ())
        },
    )


def _accuracy(result: Measured, task: str, *kinds: str) -> float | None:
    """Return the accuracy on a task at the first of these kinds of preference."""
    point = result.point(*kinds)
    return None if point is None else float(point.accuracy[result.tasks.index(task)])


def _own(result: Measured, kind: str) -> float | None:
    """Return the mean accuracy of the tasks, each at its own preference of a kind.

    None where one was not measured.
    """
    own = [_accuracy(result, task, f"{kind}:{task}") for task in result.tasks]
    measured = [accuracy for accuracy in own if accuracy is not None]
    return math.fsum(measured) / len(measured) if len(measured) == len(own) else None


def _figures(result: Measured, union: ArrayLike | None) -> dict[str, float | None]:
    """Return the figures of one result, by name."""
    equal = result.point("equal")
    average = None if equal is None else math.fsum(equal.accuracy) / len(equal.accuracy)
    figures: dict[str, float | None] = {
        "equal": average,
        "priority": _own(result, "priority") if result.preference_aware else average,
        "one_hot": _own(result, "one-hot") if result.preference_aware else average,
        "worst_task": None if equal is None else min(equal.accuracy),
        "seconds": result.seconds,
        "tuning_seconds": result.tuning_seconds,
        "peak_bytes": result.peak_bytes,
    }
    return figures if result.is_bound else figures | _front_figures(result, union)


def _front_figures(result: Measured, union: ArrayLike | None) -> dict[str, float | None]:
    """Return the figures of a method's models as a set."""
    points, reference, tasks = result.accuracies, result.reference_point, len(result.tasks)
    # a preference has an entry for each merged task, accuracies one for each that has held-out images
    wanted = result.gammas if all(len(gamma) == tasks for gamma in result.gammas or ()) else None
    indicated = indicators(points, reference, wanted, union)
    # 8 tasks: 90^8 says little; a share of the box does
    has_box = max(reference) < 100
    scaled = [[(a - r) / (100 - r) for a, r in zip(point, reference, strict=True)] for point in points if has_box]
    alignment = indicated.alignment
    correlations = [value for value in (alignment.spearman if alignment else ()) if value is not None]
    return {
        "hypervolume": hypervolume(scaled, [0.0] * tasks) if has_box else None,
        "non_dominated": indicated.non_dominated_points,
        "points": len(points),
        "spacing": indicated.spacing,
        "igd_plus": indicated.igd_plus,
        "cosine": alignment.cosine if alignment else None,
        "spearman": math.fsum(correlations) / len(correlations) if correlations else None,
    }
