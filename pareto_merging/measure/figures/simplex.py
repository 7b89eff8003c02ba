"""Three tasks: accuracies in pairwise projections, coloured by preference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from pareto_merging.measure.figures import look
from pareto_merging.measure.figures.sets import CheckedFront, Set, checked, first_front
from pareto_merging.measure.figures.ternary import CORNERS, draw_triangle


def simplex_scatter(path: Path, task_names: Sequence[str], sets: Sequence[Set]) -> None:
    """Draw the accuracies of three tasks in three pairwise projections.

    A solution of the first set with preferences has the colour of its preference in the triangle below, and the shape
    of the task with the largest weight. All others are black, white and grey. Raises ValueError as :func:`.checked`.
    """
    methods = checked(task_names, sets, exactly=3)
    first = first_front(methods)
    others = [method for method in methods if method is not first]
    with look.picture(path, look.SEVERAL_PANELS, 2.5) as figure:
        grid = figure.add_gridspec(2, 3)
        for column, (x, y) in enumerate(((0, 1), (0, 2), (1, 2))):
            axes = figure.add_subplot(grid[0, column])
            for method in others:
                # other sets are many points: behind everything, so that the coloured one is seen
                single = not isinstance(method, CheckedFront)
                style: look.Style = method.grey_mark(4.8 if single else 2.4) | {"alpha": 1.0 if single else 0.5}
                axes.plot(*method.accuracies[:, (x, y)].T, label=method.name, zorder=3 if single else 2, **style)
            if first is not None:
                _draw_preferences(axes, first, x, y)
            axes.set_xlabel(f"{look.short(task_names[x], 16)} accuracy (%)")
            axes.set_ylabel(f"{look.short(task_names[y], 16)} accuracy (%)")
            axes.grid(True)
            axes.margins(0.08)
            axes.set_box_aspect(1)

        height = 0.0
        if first is not None:
            _colour_triangle(figure.add_subplot(grid[1, 0]), task_names, first)
            height = 1.6
        if others:
            rest = figure.add_subplot(grid[1, 1:])
            rest.axis("off")
            handles = [look.key(**method.grey_mark(4.8)) for method in others]
            names = [method.name for method in others]
            legend = look.draw_legend(rest, handles, names, look.SEVERAL_PANELS * 2 / 3 - 0.2, 40, loc="center left")
            # the row below is given its height
            legend.set_in_layout(False)
            height = max(height, legend.get_window_extent().height / look.DPI)
        grid.set_height_ratios((2.5, height))
        figure.set_size_inches(look.SEVERAL_PANELS, 2.5 + height)


def _mixed(gammas: look.Array) -> look.Array:
    """Return the colours [..., 3] of preferences [..., 3]."""
    return np.clip(gammas @ np.array([to_rgb(colour) for colour in look.COLOURS[:3]]), 0, 1)


def _draw_preferences(axes: Axes, method: CheckedFront, x: int, y: int) -> None:
    for task, marker in (*enumerate(look.FAVOURED_MARKERS), (None, look.EQUAL_MARKER)):
        rows = [row for row, value in enumerate(method.favoured()) if value == task]
        if rows:
            style: look.Style = {"s": 15, "edgecolor": "black", "linewidth": 0.35, "zorder": 4, "label": method.name}
            style |= {"c": _mixed(method.gammas[rows]), "marker": marker}
            axes.scatter(method.accuracies[rows, x], method.accuracies[rows, y], **style)


def _colour_triangle(axes: Axes, task_names: Sequence[str], method: CheckedFront) -> None:
    """Draw the legend of ``_draw_preferences``."""
    x, y = np.meshgrid(np.linspace(0, 1, 240), np.linspace(0, CORNERS[0, 1], 208))
    top = y / CORNERS[0, 1]
    gammas = np.stack([top, 1 - x - top / 2, x - top / 2], axis=-1)
    pixels = np.concatenate([_mixed(gammas), (gammas.min(axis=-1, keepdims=True) >= 0).astype(float)], axis=-1)
    axes.imshow(pixels, origin="lower", extent=(0, 1, 0, CORNERS[0, 1]), zorder=2)
    draw_triangle(axes, task_names, f"{look.short(method.name, 24)}: preference")
    for place, marker, colour in zip(CORNERS, look.FAVOURED_MARKERS, look.COLOURS, strict=False):
        axes.plot(*place, marker=marker, color=colour, markeredgecolor="black", markersize=5, clip_on=False, zorder=5)
    if None in method.favoured():
        equal = np.full(3, 1 / 3)
        style: look.Style = {"color": _mixed(equal), "markeredgecolor": "black", "markersize": 5}
        axes.plot(*(equal @ CORNERS), look.EQUAL_MARKER, zorder=5, **style)
