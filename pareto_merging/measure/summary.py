"""A comparison's figures for each method, over its seeds, and the answer in plain sentences."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import ArrayLike

from pareto_merging.measure.metrics import Spread, hypervolume, indicators, spread, union_front
from pareto_merging.measure.results import Measured, Result
from pareto_merging.methods.registry import METHODS


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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, the figures beside the rest."""
        value: dict[str, Any] = {"title": self.title, "is_bound": self.is_bound, "seeds": self.seeds}
        if self.reasons:
            value |= {"reasons": self.reasons, "failed": self.failed}
        if self.seeds:
            value["preference_aware"] = self.preference_aware
            value |= {name: asdict(figure) for name, figure in self.figures.items()}
            value["per_task"] = {name: asdict(figure) for name, figure in self.per_task.items()}
        if self.unseen:
            value["unseen"] = {name: asdict(figure) for name, figure in self.unseen.items()}
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "MethodSummary":
        """Return the summary of :meth:`to_json`."""
        flat, by_task = ("title", "is_bound", "seeds", "reasons", "failed", "preference_aware"), ("per_task", "unseen")
        about = {key: value[key] for key in flat if key in value}
        figures = {key: entry for key, entry in value.items() if key not in (*flat, *by_task)}
        tables = {"figures": figures, **{key: value.get(key, {}) for key in by_task}}
        spreads: dict[str, Any] = {
            key: {name: Spread(**entry) for name, entry in table.items()} for key, table in tables.items()
        }
        return MethodSummary(**about, **spreads)


def summarize(results: Sequence[Result]) -> dict[str, MethodSummary]:
    """Return figures per method, each with mean, standard deviation and the values over the seeds.

    Accuracies in percent: ``equal`` (average over the tasks), ``priority`` and ``one_hot`` (of the preferred task,
    averaged over the tasks). Hypervolume as a share of the box between the reference point and 100 % (None where a head
    of one class leaves no box); IGD+ (percent points) against the union of all methods' fronts of that seed, bounds
    left out.
    """
    done = [result for result in results if isinstance(result, Measured)]
    fronts: dict[int, list[ArrayLike]] = {}
    for result in done:
        if not result.is_bound:
            fronts.setdefault(result.seed, []).append(result.accuracies)
    unions = {seed: union_front(own) for seed, own in fronts.items()}
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
    """Return the mean accuracy of the tasks, each at its own preference of a kind. None where one was not measured."""
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


def cell(value: Spread | None, factor: float = 1, digits: int = 1) -> str:
    """Return ``86.9 ± 1.0`` of a spread; a dash where there is none."""
    if value is None or value.mean is None:
        return "–"
    text = f"{factor * value.mean:.{digits}f}"
    return text if value.sd is None else f"{text} ± {factor * value.sd:.{max(digits, 1)}f}"


def answer(summary: Mapping[str, MethodSummary]) -> list[str]:
    """Return the sentences of a comparison: which method for which use. None if no method gave a model."""
    merged = {key: entry for key, entry in summary.items() if entry.seeds and not entry.is_bound}
    # a title not in METHODS is somebody else's method
    listed = {key: METHODS[key] for key in merged if key in METHODS}
    # one task has one preference
    aware = [key for key, entry in merged.items() if entry.preference_aware and len(entry.per_task) > 1]

    def mean(key: str, figure: str) -> float:
        """Return the mean of a figure, less than any where it is not defined."""
        value = merged[key].figures[figure].mean if figure in merged[key].figures else None
        return -math.inf if value is None else value

    def best(among: Collection[str], figure: str) -> str | None:
        known = [key for key in among if mean(key, figure) > -math.inf]
        return max(known, key=lambda key: mean(key, figure), default=None)

    def named(key: str, figure: str, factor: float = 1) -> str:
        return f"{merged[key].title} ({cell(merged[key].figures[figure], factor)} %)"

    def level(among: Collection[str], first: str, figure: str) -> str:
        """Return which others have the same mean, in brackets."""
        same = [merged[key].title for key in among if key != first and mean(key, figure) == mean(first, figure)]
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        return f" (as {'does' if len(same) == 1 else 'do'} {', '.join(same[:3])}{more})" if same else ""

    lines = []
    if (first := best(merged, "equal")) is not None:
        level_with = level(merged, first, "equal")
        lines.append(f"One model for everybody: {named(first, 'equal')} has the highest average accuracy{level_with}.")
        free = best([key for key, method in listed.items() if method.needs == "weights"], "equal")
        if free is not None and free != first:
            lines.append(f"From the weights alone: {named(free, 'equal')}.")
    front, own = best(aware, "hypervolume"), best(aware, "one_hot")
    if front is not None:
        volume, level_with = named(front, "hypervolume", 100), level(aware, front, "hypervolume")
        lines.append(f"A model per preference: {volume} dominates the largest volume{level_with}.")
        single = best([key for key in merged if not merged[key].preference_aware], "hypervolume")
        if single is not None and mean(single, "hypervolume") > mean(front, "hypervolume"):
            lines.append(f"Yet {named(single, 'hypervolume', 100)}, one model for every preference, dominates more.")
        kept = [key for key, method in listed.items() if method.stores in ("1 model", "1 model + low rank")]
        small = best(kept, "hypervolume")
        if front in listed and front not in kept and small is not None:
            volume = named(small, "hypervolume", 100)
            lines.append(f"It keeps {listed[front].stores}; of those that keep one: {volume}.")
    if own is not None and own != front:
        lines.append(f"Each user caring for one task alone: {named(own, 'one_hot')} at one-hot preferences.")
    return lines
