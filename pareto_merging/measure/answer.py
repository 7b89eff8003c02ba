"""A comparison in plain sentences: which method for which use."""

from collections.abc import Collection, Mapping

from pareto_merging.measure.metrics import Spread
from pareto_merging.measure.summary import MethodSummary
from pareto_merging.methods.registry import METHODS


def cell(value: Spread | None, factor: float = 1, digits: int = 1) -> str:
    """Return ``86.9 ± 1.0`` of a spread; a dash where there is none."""
    if value is None or value.mean is None:
        return "–"
    text = f"{factor * value.mean:.{digits}f}"
    return text if value.sd is None else f"{text} ± {factor * value.sd:.{max(digits, 1)}f}"


def answer(summary: Mapping[str, MethodSummary]) -> list[str]:
    """Return the sentences of a comparison. None if no method gave a model."""
    merged = {key: entry for key, entry in summary.items() if entry.seeds and not entry.is_bound}
    # one task has one preference
    aware = [key for key, entry in merged.items() if entry.preference_aware and len(entry.per_task) > 1]
    front, own = _best(merged, aware, "hypervolume"), _best(merged, aware, "one_hot")
    lines = _for_everybody(merged)
    if front is not None:
        lines += _for_each_preference(merged, aware, front)
    if own is not None and own != front:
        lines.append(f"Each user caring for one task alone: {_named(merged[own], 'one_hot')} at one-hot preferences.")
    return lines


def _for_everybody(merged: Mapping[str, MethodSummary]) -> list[str]:
    first = _best(merged, merged, "equal")
    if first is None:
        return []
    level = _level(merged, merged, first, "equal")
    lines = [f"One model for everybody: {_named(merged[first], 'equal')} has the highest average accuracy{level}."]
    # a title not in METHODS is somebody else's method
    free = _best(merged, [key for key in merged if key in METHODS and METHODS[key].needs == "weights"], "equal")
    if free is not None and free != first:
        lines.append(f"From the weights alone: {_named(merged[free], 'equal')}.")
    return lines


def _for_each_preference(merged: Mapping[str, MethodSummary], aware: Collection[str], front: str) -> list[str]:
    volume = _named(merged[front], "hypervolume", 100)
    level = _level(merged, aware, front, "hypervolume")
    lines = [f"A model per preference: {volume} dominates the largest volume{level}."]
    single = _best(merged, [key for key in merged if not merged[key].preference_aware], "hypervolume")
    if single is not None and _mean(merged[single], "hypervolume") > _mean(merged[front], "hypervolume"):
        volume = _named(merged[single], "hypervolume", 100)
        lines.append(f"Yet {volume}, one model for every preference, dominates more.")
    kept = [key for key in merged if key in METHODS and METHODS[key].stores in ("1 model", "1 model + low rank")]
    small = _best(merged, kept, "hypervolume")
    if front in METHODS and front not in kept and small is not None:
        volume = _named(merged[small], "hypervolume", 100)
        lines.append(f"It keeps {METHODS[front].stores}; of those that keep one: {volume}.")
    return lines


def _mean(entry: MethodSummary, figure: str) -> float:
    """Return the mean of a figure, less than any where it is not defined."""
    mean = entry.mean(figure)
    return float("-inf") if mean is None else mean


def _best(merged: Mapping[str, MethodSummary], among: Collection[str], figure: str) -> str | None:
    known = [key for key in among if merged[key].mean(figure) is not None]
    return max(known, key=lambda key: _mean(merged[key], figure), default=None)


def _named(entry: MethodSummary, figure: str, factor: float = 1) -> str:
    return f"{entry.title} ({cell(entry.figures[figure], factor)} %)"


def _level(merged: Mapping[str, MethodSummary], among: Collection[str], best: str, figure: str) -> str:
    """Return which others have the same mean, in brackets."""
    mean = merged[best].mean(figure)
    same = [merged[key].title for key in among if key != best and merged[key].mean(figure) == mean]
    if not same:
        return ""
    more = f" and {len(same) - 3} more" if len(same) > 3 else ""
    return f" (as {'does' if len(same) == 1 else 'do'} {', '.join(same[:3])}{more})"
