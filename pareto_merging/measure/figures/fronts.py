"""Two tasks: fronts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from pareto_merging.measure.figures import look
from pareto_merging.measure.figures.sets import CheckedFront, CheckedSet, Set, checked, checked_individuals, first_front
from pareto_merging.measure.metrics import non_dominated

_INDIVIDUAL_MARKERS = ("x", "+", "1", "2", "3", "4")


def fronts(
    path: Path, task_names: Sequence[str], sets: Sequence[Set], individuals: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Draw methods on two tasks: all with the individual models, and the merged ones enlarged.

    A set with preferences is a line in the order of γ₁; solutions that another of the same set dominates are hollow.
    The enlarged panel holds the first set with preferences and the models near it; its title counts the others.
    ``individuals``: task -> accuracies [2] of the model fine-tuned on it. Raises ValueError as :func:`.checked`.
    """
    methods = checked(task_names, sets, exactly=2)
    alone = checked_individuals(individuals, 2)
    with look.picture(path, look.SEVERAL_PANELS, 3.2) as figure:
        whole, near = figure.subplots(1, 2, width_ratios=(1, 1.25))
        handles: list[Artist] = []
        for axes, size in ((whole, 3.0), (near, 4.6)):
            handles = _draw_fronts(axes, methods, size)
            axes.set_xlabel(f"{look.short(task_names[0])}: held-out accuracy (%)")
            axes.set_ylabel(f"{look.short(task_names[1])}: held-out accuracy (%)")
            axes.grid(True)
        labels = [method.name for method in methods]
        for number, (name, point) in enumerate(alone.items()):
            labels.append(f"fine-tuned on {name}")
            style: look.Style = {"marker": _INDIVIDUAL_MARKERS[number % len(_INDIVIDUAL_MARKERS)], "linestyle": "none"}
            style |= {"color": look.BLACK if number % 2 == 0 else look.GREY, "markersize": 6.5, "markeredgewidth": 1.4}
            handles += whole.plot(point[:1], point[1:], label=labels[-1], zorder=5, **style)
        if any(isinstance(m, CheckedFront) and not non_dominated(m.accuracies).all() for m in methods):
            labels.append("hollow: dominated within its set")
            handles.append(look.key(**look.mark("o", 4.6), markerfacecolor="white", markeredgecolor=look.GREY))

        everything = np.concatenate([method.accuracies for method in methods])
        shown = np.concatenate([everything, *(point[None] for point in alone.values())])
        limits = (min(0.0, shown.min()) - 3, max(100.0, shown.max()) + 3)
        whole.set(xlim=limits, ylim=limits, title="whole range" + (", with the individual models" if alone else ""))
        whole.set_aspect("equal")
        low, high, outside = _enlarged(methods)
        near.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        near.set_title("enlarged" + (f" ({outside} outside)" if outside else ""))
        corner, opposite = np.maximum(low, limits[0] + 0.5), np.minimum(high, limits[1] - 0.5)
        line: look.Style = {"fill": False, "edgecolor": look.GREY, "linewidth": 0.7}
        whole.add_patch(Rectangle((corner[0], corner[1]), *(opposite - corner), **line))
        _name_ends(near, first_front(methods))
        look.legend_below(figure, handles, labels)


def _draw_fronts(axes: Axes, methods: Sequence[CheckedSet], size: float) -> list[Artist]:
    """Draw lines and points of two tasks; return what the legend shows for each method."""
    handles: list[Artist] = []
    lines = 0
    for method in methods:
        dot = method.coloured_mark(size) | {"markeredgewidth": 0.6, "label": method.name}
        if not isinstance(method, CheckedFront):
            dot |= method.coloured_mark(1.25 * size) | {"markeredgecolor": "black"}
            handles += axes.plot(*method.accuracies.T, zorder=4, **dot)
            continue
        line = {"color": dot["color"], "linestyle": look.LINES[lines % len(look.LINES)], "linewidth": 1.1}
        lines += 1
        accuracies = method.accuracies[np.argsort(method.gammas[:, 0], kind="stable")]
        best = non_dominated(accuracies)
        axes.plot(*accuracies.T, zorder=3, label=method.name, **line)
        axes.plot(*accuracies[best].T, zorder=3.2, **dot)
        axes.plot(*accuracies[~best].T, zorder=3.1, markerfacecolor="white", **dot)
        handles.append(look.key(**method.coloured_mark(size) | line))
    return handles


def _enlarged(methods: Sequence[CheckedSet]) -> tuple[look.Array, look.Array, int]:
    """Return corners [2] of the enlarged box, and how many models are outside.

    It is around the first set with preferences and the models near it: within half the extent of the set, or five
    points, from it. Without such a set all models are in the box.
    """
    points = np.concatenate([method.accuracies for method in methods])
    first = first_front(methods)
    inside = np.ones(len(points), dtype=bool)
    if first is not None:
        low, high = first.accuracies.min(axis=0), first.accuracies.max(axis=0)
        reach = np.maximum((high - low) / 2, 5.0)
        inside = ((points >= low - reach) & (points <= high + reach)).all(axis=1)
    low, high = points[inside].min(axis=0), points[inside].max(axis=0)
    margin = np.maximum(0.1 * (high - low), 0.5)
    # γ₁ is written on the right of a point
    return low - margin, high + margin * (1.7, 1.0), int((~inside).sum())


def _name_ends(axes: Axes, method: CheckedFront | None) -> None:
    """Write γ₁ beside the first and the last solution of a set."""
    if method is None:
        return
    order = np.argsort(method.gammas[:, 0], kind="stable")
    ends = sorted({int(order[0]), int(order[-1])}, key=lambda row: -method.accuracies[row, 1])
    above: look.Style = {"xytext": (0, 5), "horizontalalignment": "center", "verticalalignment": "bottom"}
    beside: look.Style = {"xytext": (5, 0), "horizontalalignment": "left", "verticalalignment": "center"}
    style: look.Style = {"color": method.coloured_mark(1)["color"], "textcoords": "offset points", "zorder": 6}
    style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
    for row, where in zip(ends, (above, beside), strict=False):
        text = f"γ₁ = {round(method.gammas[row, 0], 3):g}"
        axes.annotate(text, method.accuracies[row], **where, **style)
