"""Three tasks or more: projections on pairs of tasks."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from pareto_merging.measure.figures import look
from pareto_merging.measure.figures.sets import CheckedFront, CheckedSet, Set, checked


def pairwise_projections(
    path: Path, task_names: Sequence[str], sets: Sequence[Set], pairs: Sequence[tuple[int, int]] | None = None
) -> None:
    """Draw methods on K ≥ 3 tasks, projected on pairs of tasks, a panel each. Figure 5 of the paper is such a picture.

    ``pairs``: two different tasks each; by default (0, 1), (2, 3), … and, where K is odd, the last task with the first.
    Raises ValueError as :func:`.checked`.
    """
    methods = checked(task_names, sets, at_least=3)
    tasks = len(task_names)
    if pairs is None:
        pairs = [(k, (k + 1) % tasks) for k in range(0, tasks, 2)]
    if not pairs or any(len(p) != 2 or p[0] == p[1] or not all(k in range(tasks) for k in p) for p in pairs):
        raise ValueError(f"pairs: expected pairs of different tasks from 0 to {tasks - 1}, got {pairs!r}")
    columns = min(len(pairs), 3 if len(pairs) in (3, 5, 6, 9) else 4)
    rows = -(-len(pairs) // columns)
    with look.picture(path, look.SEVERAL_PANELS, rows * min(look.SEVERAL_PANELS / columns, 2.8)) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (x, y) in zip(panels, pairs, strict=False):
            for method in methods:
                axes.plot(*method.accuracies[:, (x, y)].T, label=method.name, **_dots(method))
            axes.set_xlabel(f"{look.short(task_names[x], 16)} (%)")
            axes.set_ylabel(f"{look.short(task_names[y], 16)} (%)")
            axes.grid(True)
            axes.margins(0.08)
            axes.set_box_aspect(1)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4))
        for axes in panels[len(pairs) :]:
            axes.remove()
        handles = [look.key(**_dots(method)) for method in methods]
        look.legend_below(figure, handles, [method.name for method in methods])


def _dots(method: CheckedSet) -> look.Style:
    """Return a method's marks: one model large with a black edge, solutions small and behind."""
    if not isinstance(method, CheckedFront):
        return method.coloured_mark(4.8) | {"markeredgecolor": "black", "markeredgewidth": 0.5, "zorder": 4}
    return method.coloured_mark(3.2) | {"markeredgecolor": "none", "alpha": 0.8, "zorder": 3}
