"""Three tasks: accuracy over the triangle of preferences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from pareto_merging.measure.figures import look
from pareto_merging.measure.figures.sets import CheckedFront, Set, checked

# preferences of the tasks at the corners of a triangle
CORNERS = np.array([[0.5, 0.75**0.5], [0.0, 0.0], [1.0, 0.0]])


def ternary(
    path: Path,
    task_names: Sequence[str],
    gammas: Sequence[Sequence[float]],
    accuracies: Sequence[Sequence[float]],
    title: str = "",
) -> None:
    """Draw accuracy over the preferences of three tasks: a triangle per task and the average's.

    Filled contours between the sampled preferences, which are dots. Where these are at most three or all on one line,
    there are only dots, coloured by accuracy. Every triangle has its own scale.

    ``gammas``: [n, 3]. ``accuracies``: [n, 3] in percent. Raises ValueError as :func:`.checked`.
    """
    (method,) = checked(task_names, [Set("", accuracies, gammas)], exactly=3, name="")
    assert isinstance(method, CheckedFront)
    where = method.gammas @ CORNERS
    panels = [*((f"accuracy on {look.short(name, 28)}", method.accuracies[:, k]) for k, name in enumerate(task_names))]
    panels.append(("average accuracy", method.accuracies.mean(axis=1)))
    with look.picture(path, look.SEVERAL_PANELS, 5.4) as figure:
        if title:
            figure.suptitle(look.wrapped(title, 80))
        for axes, (name, values) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            draw_triangle(axes, task_names, name)
            coloured = _surface(axes, where, values)
            bar = figure.colorbar(coloured, ax=axes, shrink=0.8, pad=0.04, label="accuracy (%)")
            bar.locator = MaxNLocator(5)
            bar.update_ticks()


def draw_triangle(axes: Axes, task_names: Sequence[str], title: str) -> None:
    """Draw the simplex's outline with the tasks' names at its corners and a title."""
    axes.set_title(title, pad=15)
    axes.add_patch(Polygon(CORNERS, fill=False, edgecolor="black", linewidth=0.7, zorder=3))
    for (x, y), name, side, up in zip(CORNERS, task_names, ("bottom", "top", "top"), (5, -5, -5), strict=True):
        style: look.Style = {"textcoords": "offset points", "xytext": (0, up)}
        axes.annotate(look.short(name), (x, y), horizontalalignment="center", verticalalignment=side, **style)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 0.88), aspect="equal")
    axes.axis("off")


def _surface(axes: Axes, where: look.Array, values: look.Array) -> Any:
    """Draw values [n] at where [n, 2]: contours, or dots where these span no triangle."""
    # percent: less than one item of a million
    constant = np.ptp(values) < 1e-4
    low, high = (values.mean() - 0.5, values.mean() + 0.5) if constant else (values.min(), values.max())
    places = np.unique(where.round(6), axis=0)
    flatness = np.linalg.svd(places - places.mean(axis=0), compute_uv=False)
    if len(places) <= 3 or flatness[1] < 1e-3 * flatness[0]:
        style: look.Style = {"s": 28, "edgecolor": "black", "linewidth": 0.6, "zorder": 4, "clip_on": False}
        return axes.scatter(where[:, 0], where[:, 1], c=values, cmap="cividis", vmin=low, vmax=high, **style)
    levels = [low, high] if constant else MaxNLocator(12).tick_values(low, high)
    filled = axes.tricontourf(where[:, 0], where[:, 1], values, levels=levels, cmap="cividis")
    axes.plot(*where.T, "o", color="black", markersize=2.2, markeredgecolor="white", markeredgewidth=0.4, zorder=4)
    return filled
