"""Sets to draw, and what a drawn picture shows."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from pareto_merging.measure.figures.sets import Set

LATTICE = [[a / 7, b / 7, (7 - a - b) / 7] for a in range(8) for b in range(8 - a)]


WRITTEN = {
    1: [],
    2: ["front.png"],
    3: ["ternary.png", "simplex.png", "parallel.png"],
    4: ["parallel.png", "projections.png"],
    8: ["parallel.png", "projections.png"],
    12: ["parallel.png", "projections.png"],
    20: ["parallel.png", "projections.png"],
}


WIDTHS = {"parallel.png": 3.4, "front.png": 7, "ternary.png": 7, "simplex.png": 7, "projections.png": 7}


def task_names(tasks: int) -> list[str]:
    return [f"TASK_{k}" for k in range(tasks)]


def a_set(name: str, tasks: int, solutions: int, seed: int = 0) -> Set:
    rng = np.random.default_rng(seed)
    gammas = rng.dirichlet(np.ones(tasks), solutions)
    gammas[0] = 1 / tasks
    return Set(name, (70 + 20 * gammas + rng.uniform(0, 5, gammas.shape)).tolist(), gammas.tolist())


def a_model(name: str, tasks: int, seed: int = 0) -> Set:
    return Set(name, np.random.default_rng(seed).uniform(50, 90, (1, tasks)).tolist())


def many(tasks: int) -> list[Set]:
    return [a_set("Ours", tasks, 12), a_set("Other set", tasks, 9, 1)] + [
        a_model(f"Method {n}", tasks, n) for n in range(16)
    ]


def individuals(tasks: int) -> dict[str, list[float]]:
    return {name: [95.0 if k == j else 30.0 for j in range(tasks)] for k, name in enumerate(task_names(tasks))}


def drawn(axes: Axes, label: str) -> set[tuple[float, ...]]:
    """Every point of the artists with this label."""
    points = [np.column_stack(line.get_data()) for line in axes.lines if line.get_label() == label]
    points += [np.asarray(c.get_offsets()) for c in axes.collections if c.get_label() == label]
    return {tuple(point) for point in np.concatenate(points).round(9).tolist()}


def projected(one: Set, x: int, y: int) -> set[tuple[float, ...]]:
    return {tuple(point) for point in np.asarray(one.accuracies)[:, (x, y)].round(9).tolist()}


def legends(figure: Figure) -> list[Any]:
    return [legend for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)) if legend is not None]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for legend in legends(figure) for text in legend.get_texts()]


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}
