"""Pictures: legible in a column of a two-column paper, in grey and to the colour-blind (markers differ too)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pareto_merging.checkpoints.files import atomic_path

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#777777",
    "#111111",
)
_MARKERS = ("s", "D", "^", "P", "X", "*")
_COLOURS = (ORANGE, GREEN, VERMILION, PURPLE)


def two_task_front(
    path: Path,
    task_names: Sequence[str],
    front: Sequence[Sequence[float]],
    gammas: Sequence[Sequence[float]],
    points: Mapping[str, Sequence[float]],
    individuals: Mapping[str, Sequence[float]],
) -> None:
    """A two-task Pareto set among other models, written to PNG: all of it, and beside it the front enlarged.

    Args:
        task_names: two names. front: [n, 2] accuracies in percent. gammas: [n, 2], ascending in γ₁. points: merged
            model -> two accuracies. individuals: fine-tuned model -> its two accuracies.
    """
    figure, (whole, near) = plt.subplots(1, 2, figsize=(9.2, 4.2), dpi=160, width_ratios=(1, 1.25))
    for axes in (whole, near):
        _front(axes, front, size=3 if axes is whole else 5.5)
        _points(axes, points, _MARKERS, _COLOURS)
        axes.set_xlabel(f"{task_names[0]}: held-out accuracy (%)")
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _points(whole, {f"fine-tuned on {name}": point for name, point in individuals.items()}, ("<", ">"), (BLACK, GREY))
    whole.set_ylabel(f"{task_names[1]}: held-out accuracy (%)")
    whole.set_title("with the individual models", fontsize=10)
    near.set_title("the front and the merged models", fontsize=10)
    for index in (0, len(front) - 1):
        near.annotate(
            f"γ₁ = {gammas[index][0]:g}",
            (front[index][0], front[index][1]),
            textcoords="offset points",
            xytext=(7, 5),
            fontsize=9,
            color=BLUE,
        )
    near.margins(0.12)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def _front(axes: Axes, front: Sequence[Sequence[float]], size: float) -> None:
    x, y = [p[0] for p in front], [p[1] for p in front]
    axes.plot(x, y, "-o", color=BLUE, markersize=size, linewidth=1.3, label="Pareto Merging", zorder=3)


def _points(axes: Axes, points: Mapping[str, Sequence[float]], markers: Sequence[str], colours: Sequence[str]) -> None:
    for number, (name, point) in enumerate(points.items()):
        axes.scatter(
            [point[0]],
            [point[1]],
            marker=markers[number % len(markers)],
            color=colours[number % len(colours)],
            edgecolor="black",
            linewidth=0.5,
            s=46,
            label=name,
            zorder=4,
        )
