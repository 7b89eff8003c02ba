"""Three tasks or more: parallel coordinates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pareto_merging.measure.figures import look
from pareto_merging.measure.figures.sets import CheckedFront, Set, checked, checked_individuals, first_front

# more methods than this want the width of the page
MANY = 8


def parallel_coordinates(
    path: Path, task_names: Sequence[str], sets: Sequence[Set], individuals: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Draw methods on K ≥ 3 tasks, an axis per task on one scale.

    Thin lines are the solutions of the first set with preferences, in the colour of the task that the preference
    favours most and marked on that task's axis; the one nearest to the equal preference is thick and black. Every other
    model is one broken line; a further set with preferences shows its solution nearest to the equal preference.

    ``individuals``: model -> accuracies [K]; each axis marks the best. Raises ValueError as :func:`.checked`.
    """
    methods = checked(task_names, sets, at_least=3)
    alone = checked_individuals(individuals, len(task_names))
    first = first_front(methods)
    # many methods want the width of the page, or their legend would be longer than the picture
    width = look.ONE_PANEL if len(methods) <= MANY else look.SEVERAL_PANELS
    with look.picture(path, width, 2.6) as figure:
        axes = figure.subplots()
        at = np.arange(len(task_names))
        handles: list[Artist] = []
        labels: list[str] = []
        values: list[look.Array] = []
        if first is not None:
            handles, labels = _draw_solutions(axes, first)
            values.append(first.accuracies)
        broken = 0
        for method in methods:
            if method is first:
                continue
            broken += 1
            front = method if isinstance(method, CheckedFront) else None
            rows = method.accuracies if front is None else front.accuracies[[front.balanced()]]
            style: look.Style = {"color": look.GREY, "linewidth": 0.6, "label": method.name, "zorder": 3}
            style |= method.grey_mark(3.4) | {"linestyle": look.LINES[1 + broken % (len(look.LINES) - 1)]}
            handles.append(axes.plot(at, rows.T, **style)[0])
            labels.append(method.name + ("" if front is None else f" ({front.balance()})"))
            values.append(rows)
        if alone:
            best = np.max(list(alone.values()), axis=0)
            style = look.mark("_", min(9.0, 120 / len(at))) | {"markeredgewidth": 1.6, "color": look.VERMILION}
            labels.append("best fine-tuned model of each task")
            handles += axes.plot(at, best, label=labels[-1], zorder=2.5, **style)
            values.append(best)

        shown = np.concatenate([np.ravel(value) for value in values])
        room = max(0.06 * np.ptp(shown), 0.5)
        axes.set(xlim=(-0.4, len(at) - 0.6), ylim=(shown.min() - room, shown.max() + room), ylabel="accuracy (%)")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", alpha=0.8)
        axes.grid(axis="y")
        if first is not None:
            for task in range(len(task_names)):
                axes.plot(task, -0.04, transform=axes.get_xaxis_transform(), clip_on=False, **_task_mark(task, 4.2))
        _name_axes(axes, task_names, pad=11 if first is not None else 3)
        names = max(label.get_window_extent().height for label in axes.get_xticklabels())
        figure.set_size_inches(width, 2.6 + names / look.DPI)
        look.legend_below(figure, handles, labels)


def _task_mark(task: int, size: float) -> look.Style:
    """Return the marker that stands for a task."""
    edge = {"color": look.COLOURS[task % len(look.COLOURS)], "markeredgecolor": "black", "markeredgewidth": 0.4}
    return look.mark(look.MARKERS[task % len(look.MARKERS)], size) | edge


def _draw_solutions(axes: Axes, method: CheckedFront) -> tuple[list[Artist], list[str]]:
    """Draw the lines of a set with preferences; return what the legend shows for them."""
    at = np.arange(method.accuracies.shape[1])
    even = method.balanced()
    for row, (task, accuracy) in enumerate(zip(method.favoured(), method.accuracies, strict=True)):
        if row == even or task is None:
            continue
        colour = look.COLOURS[task % len(look.COLOURS)]
        axes.plot(at, accuracy, color=colour, linewidth=0.7, alpha=0.75, label=method.name, zorder=3.5)
        axes.plot(task, accuracy[task], zorder=3.6, **_task_mark(task, 3.4))
    thick = axes.plot(at, method.accuracies[even], color="black", linewidth=1.8, label=method.name, zorder=5)
    if len(method.accuracies) == 1:
        return [*thick], [f"{method.name}, {method.balance()}"]
    thin = look.key(**_task_mark(0, 3.4) | {"linestyle": "-", "linewidth": 0.7})
    return [thin, *thick], [f"{method.name}, favoured task marked", f"{method.name}, {method.balance()}"]


def _name_axes(axes: Axes, task_names: Sequence[str], pad: float) -> None:
    """Write names under the axes: level if no word is broken, else slanting or upright."""
    characters = 48 // len(task_names)
    names = [look.short(name, 24) for name in task_names]
    level = all(len(word) <= characters for name in names for word in name.split())
    axes.set_xticks(range(len(names)), [look.wrapped(name, characters) if level else name for name in names])
    axes.tick_params(axis="x", length=0, pad=pad)
    upright = len(names) > 12 or max(len(name) for name in names) > 16
    slanting = {"rotation": 45, "va": "top", "ha": "right", "rotation_mode": "anchor"}
    for label in () if level else axes.get_xticklabels():
        label.set(**({"rotation": 90, "va": "top", "ha": "center"} if upright else slanting))
