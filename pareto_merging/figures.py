"""Pictures: legible in a column of a two-column paper, in grey and to the colour-blind (markers differ too)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from pareto_merging.checkpoints.files import atomic_path

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
_MARKERS = ("s", "D", "^", "v", "P", "X", "*")
_COLOURS = (ORANGE, GREEN, VERMILION, PURPLE, GREY)


def two_task_front(
    path: Path,
    task_names: Sequence[str],
    front: Sequence[Sequence[float]],
    gammas: Sequence[Sequence[float]],
    points: Mapping[str, Sequence[float]],
    reference: Sequence[float] | None = None,
) -> None:
    """The accuracies of a two-task Pareto set, joined in the order of γ₁, with other models as points; written to PNG.

    Args:
        task_names: two names. front: [n, 2] accuracies in percent. gammas: [n, 2], ascending in γ₁. points: name ->
            two accuracies. reference: the hypervolume's reference point, drawn as a corner if given.
    """
    figure, axes = plt.subplots(figsize=(5.2, 4.2), dpi=160)
    x, y = [p[0] for p in front], [p[1] for p in front]
    axes.plot(x, y, "-o", color=BLUE, markersize=5, linewidth=1.4, label="Pareto Merging", zorder=3)
    for index in (0, len(front) - 1):
        axes.annotate(
            f"γ₁ = {gammas[index][0]:g}",
            (x[index], y[index]),
            textcoords="offset points",
            xytext=(7, 5),
            fontsize=8,
            color=BLUE,
        )
    for number, (name, point) in enumerate(points.items()):
        axes.scatter(
            [point[0]],
            [point[1]],
            marker=_MARKERS[number % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            edgecolor="black",
            linewidth=0.5,
            s=48,
            label=name,
            zorder=4,
        )
    if reference is not None:
        axes.scatter([reference[0]], [reference[1]], marker="+", color=GREY, s=60, label="reference point", zorder=2)
    axes.set_xlabel(f"{task_names[0]}: held-out accuracy (%)")
    axes.set_ylabel(f"{task_names[1]}: held-out accuracy (%)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=True, framealpha=0.9, loc="best")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
