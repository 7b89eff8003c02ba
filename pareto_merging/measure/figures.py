"""Pictures that compare merging methods: legible in a column of a two-column paper, in grey and to the colour-blind.

A picture of one panel is made to be printed 3.4 inch wide, one of several panels 7 inch wide; no text is smaller than 7
points at that width. Colours are Okabe and Ito's, and whatever a colour tells, a marker or a line style tells too.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from matplotlib.path import Path as MarkerPath
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pareto_merging.measure.metrics import non_dominated
from pareto_merging.preferences import SUM_TOLERANCE
from pareto_merging.system.files import atomic_path

Array = NDArray[np.float64]
Style: TypeAlias = dict[str, Any]

# inches, and pixels per inch
ONE_PANEL, SEVERAL_PANELS = 3.4, 7.0
MANY = 8
DPI = 300

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
    "#111111",
)
# Lengths without a common factor: 6 · 17 pairs before one comes again. Blue, orange and purple come first because no
# mixture of the three looks like one of them.
_COLOURS = (BLUE, ORANGE, PURPLE, GREEN, VERMILION, SKY)
_HOURGLASS = MarkerPath([(-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1)])
_BOW_TIE = MarkerPath([(-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1)])
_STAR_OF_4, _STAR_OF_6 = (4, 1, 0), (6, 1, 0)
_MARKERS: tuple[Any, ...] = (
    *("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d"),
    *(_HOURGLASS, _STAR_OF_4, "h", _BOW_TIE, _STAR_OF_6),
)
# so that all look equally large
_SIZES: dict[Any, float] = {"s": 0.9, "D": 0.85, "*": 1.45, _STAR_OF_4: 1.5, _STAR_OF_6: 1.35, "P": 1.1, "X": 1.1}
_LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (1, 1.2)),
    (0, (8, 1.5, 1, 1.5, 1, 1.5)),
)
_INDIVIDUAL_MARKERS = ("x", "+", "1", "2", "3", "4")

# where colour means a preference, methods are black, white and grey, and leave these shapes to the preferences
_FAVOURED_MARKERS, _EQUAL_MARKER = ("o", "^", "s"), "D"
_GREY_MARKERS = tuple(m for m in _MARKERS if m not in (*_FAVOURED_MARKERS, _EQUAL_MARKER))
_FILLS = ("black", "white", "#999999")

# preferences of the tasks at the corners of a triangle
_CORNERS = np.array([[0.5, 0.75**0.5], [0.0, 0.0], [1.0, 0.0]])

_SETTINGS: Any = {
    "text.usetex": False,
    "text.parse_math": False,
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 8.5,
    "axes.formatter.useoffset": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "savefig.dpi": "figure",
    "savefig.bbox": None,
}
_LEGEND: Style = {"frameon": False, "columnspacing": 1.2, "handlelength": 2.8, "borderpad": 0.7}


@dataclass(frozen=True)
class Set:
    """One method's solutions.

    ``gammas`` [n, K] (None for a method that gives one model) and ``accuracies`` [n, K] in percent.
    """

    name: str
    accuracies: Sequence[Sequence[float]]
    gammas: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class _Method:
    """A ``Set`` that was checked: ``accuracies`` [n, K], ``gammas`` [n, K] or None, and its place among the sets."""

    name: str
    accuracies: Array
    gammas: Array | None
    place: int

    def coloured_mark(self, size: float) -> Style:
        return _mark(_MARKERS[self.place % len(_MARKERS)], size) | {"color": _COLOURS[self.place % len(_COLOURS)]}

    def grey_mark(self, size: float) -> Style:
        return _mark(_GREY_MARKERS[self.place % len(_GREY_MARKERS)], size) | {
            "markerfacecolor": _FILLS[self.place % len(_FILLS)],
            "markeredgecolor": "black",
            "markeredgewidth": 0.6,
        }

    def balanced(self) -> int:
        """The row of the preference that is nearest to the equal one."""
        assert self.gammas is not None
        return int(np.abs(self.gammas - 1 / self.gammas.shape[1]).max(axis=1).argmin())


def compare_pictures(
    folder: Path,
    task_names: Sequence[str],
    sets: Sequence[Set],
    individuals: Mapping[str, Sequence[float]] | None = None,
) -> list[Path]:
    """Write the pictures that fit K tasks into ``folder`` and return their paths.

    None for K = 1 or without sets; ``front.png`` for K = 2; ``ternary.png`` (of the first set with preferences, if
    there is one), ``simplex.png`` and ``parallel.png`` for K = 3; ``parallel.png`` and ``projections.png`` from K = 4.

    Args:
        task_names: K names. sets: accuracies [n, K], gammas [n, K] or None. individuals: fine-tuned model -> accuracies
            [K].

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    methods = _checked(task_names, sets, at_least=1) if sets else []
    if not methods or len(task_names) == 1:
        return []
    if len(task_names) == 2:
        fronts(folder / "front.png", task_names, sets, individuals)
        return [folder / "front.png"]
    written = []
    if len(task_names) == 3:
        first = _first_set(methods)
        if first is not None and first.gammas is not None:
            written.append(folder / "ternary.png")
            ternary(written[-1], task_names, first.gammas.tolist(), first.accuracies.tolist(), first.name)
        written.append(folder / "simplex.png")
        simplex_scatter(written[-1], task_names, sets)
    written.append(folder / "parallel.png")
    parallel_coordinates(written[-1], task_names, sets, individuals)
    if len(task_names) > 3:
        written.append(folder / "projections.png")
        pairwise_projections(written[-1], task_names, sets)
    return written


def two_task_front(
    path: Path,
    task_names: Sequence[str],
    front: Sequence[Sequence[float]],
    gammas: Sequence[Sequence[float]],
    points: Mapping[str, Sequence[float]],
    individuals: Mapping[str, Sequence[float]],
) -> None:
    """A two-task Pareto set among other models, written to PNG as ``fronts`` does.

    Args:
        task_names: two names. front: [n, 2] accuracies in percent. gammas: [n, 2]. points: merged model -> two
            accuracies. individuals: fine-tuned model -> its two accuracies.
    """
    sets = [Set("Pareto Merging", front, gammas), *(Set(name, [point]) for name, point in points.items())]
    fronts(path, task_names, sets, individuals)


def fronts(
    path: Path,
    task_names: Sequence[str],
    sets: Sequence[Set],
    individuals: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Methods on two tasks, written to PNG: all of them with the individual models, and beside it the merged enlarged.

    A set with preferences is a line in the order of γ₁; solutions that another of the same set dominates are hollow.
    The enlarged panel holds the first set with preferences and the models near it; its title counts the others.

    Args:
        task_names: two names. sets: accuracies [n, 2], gammas [n, 2] or None. individuals: task -> accuracies [2] of
            the model fine-tuned on it.

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    methods = _checked(task_names, sets, exactly=2)
    alone = _checked_individuals(individuals, 2)
    with _picture(path, SEVERAL_PANELS, 3.2) as figure:
        whole, near = figure.subplots(1, 2, width_ratios=(1, 1.25))
        handles: list[Artist] = []
        for axes, size in ((whole, 3.0), (near, 4.6)):
            handles = _draw_fronts(axes, methods, size)
            axes.set_xlabel(f"{_short(task_names[0])}: held-out accuracy (%)")
            axes.set_ylabel(f"{_short(task_names[1])}: held-out accuracy (%)")
            axes.grid(True)
        labels = [method.name for method in methods]
        for number, (name, point) in enumerate(alone.items()):
            labels.append(f"fine-tuned on {name}")
            style: Style = {"marker": _INDIVIDUAL_MARKERS[number % len(_INDIVIDUAL_MARKERS)], "linestyle": "none"}
            style |= {"color": BLACK if number % 2 == 0 else GREY, "markersize": 6.5, "markeredgewidth": 1.4}
            handles += whole.plot(point[:1], point[1:], label=labels[-1], zorder=5, **style)
        if any(m.gammas is not None and not non_dominated(m.accuracies).all() for m in methods):
            labels.append("hollow: dominated within its set")
            handles.append(_key(**_mark("o", 4.6), markerfacecolor="white", markeredgecolor=GREY))

        everything = np.concatenate([method.accuracies for method in methods])
        shown = np.concatenate([everything, *(point[None] for point in alone.values())])
        limits = (min(0.0, shown.min()) - 3, max(100.0, shown.max()) + 3)
        whole.set(xlim=limits, ylim=limits, title="whole range" + (", with the individual models" if alone else ""))
        whole.set_aspect("equal")
        low, high, outside = _enlarged(methods)
        near.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        near.set_title("enlarged" + (f" ({outside} outside)" if outside else ""))
        corner, opposite = np.maximum(low, limits[0] + 0.5), np.minimum(high, limits[1] - 0.5)
        whole.add_patch(
            Rectangle((corner[0], corner[1]), *(opposite - corner), fill=False, edgecolor=GREY, linewidth=0.7)
        )
        _name_ends(near, _first_set(methods))
        _legend_below(figure, handles, labels)


def ternary(
    path: Path,
    task_names: Sequence[str],
    gammas: Sequence[Sequence[float]],
    accuracies: Sequence[Sequence[float]],
    title: str = "",
) -> None:
    """Accuracy over the preferences of three tasks, written to PNG: a triangle per task and one for the average.

    Filled contours between the sampled preferences, which are dots. Where these are at most three or all on one line,
    there are only dots, coloured by accuracy. Every triangle has its own scale.

    Args:
        task_names: three names. gammas: [n, 3]. accuracies: [n, 3] in percent.

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    (method,) = _checked(task_names, [Set("", accuracies, gammas)], exactly=3, argument="")
    assert method.gammas is not None
    where = method.gammas @ _CORNERS
    panels = [*((f"accuracy on {_short(name, 28)}", method.accuracies[:, k]) for k, name in enumerate(task_names))]
    panels.append(("average accuracy", method.accuracies.mean(axis=1)))
    with _picture(path, SEVERAL_PANELS, 5.4) as figure:
        if title:
            figure.suptitle(_wrapped(title, 80))
        for axes, (name, values) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            _triangle(axes, task_names, name)
            coloured = _surface(axes, where, values)
            bar = figure.colorbar(coloured, ax=axes, shrink=0.8, pad=0.04, label="accuracy (%)")
            bar.locator = MaxNLocator(5)
            bar.update_ticks()


def simplex_scatter(path: Path, task_names: Sequence[str], sets: Sequence[Set]) -> None:
    """The accuracies of three tasks in three pairwise projections, written to PNG.

    A solution of the first set with preferences has the colour of its preference in the triangle below, and the shape
    of the task with the largest weight. All other models are black, white and grey.

    Args:
        task_names: three names. sets: accuracies [n, 3], gammas [n, 3] or None.

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    methods = _checked(task_names, sets, exactly=3)
    first = _first_set(methods)
    others = [method for method in methods if method is not first]
    with _picture(path, SEVERAL_PANELS, 2.5) as figure:
        grid = figure.add_gridspec(2, 3)
        for column, (x, y) in enumerate(((0, 1), (0, 2), (1, 2))):
            axes = figure.add_subplot(grid[0, column])
            for method in others:
                # other sets are many points: behind everything, so that the coloured one is seen
                single = method.gammas is None
                style: Style = method.grey_mark(4.8 if single else 2.4) | {"alpha": 1.0 if single else 0.5}
                axes.plot(*method.accuracies[:, (x, y)].T, label=method.name, zorder=3 if single else 2, **style)
            if first is not None:
                _draw_preferences(axes, first, x, y)
            axes.set_xlabel(f"{_short(task_names[x], 16)} accuracy (%)")
            axes.set_ylabel(f"{_short(task_names[y], 16)} accuracy (%)")
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
            handles = [_key(**method.grey_mark(4.8)) for method in others]
            names = [method.name for method in others]
            legend = _legend(rest, handles, names, SEVERAL_PANELS * 2 / 3 - 0.2, 40, loc="center left")
            # the row below is given its height
            legend.set_in_layout(False)
            height = max(height, legend.get_window_extent().height / DPI)
        grid.set_height_ratios((2.5, height))
        figure.set_size_inches(SEVERAL_PANELS, 2.5 + height)


def parallel_coordinates(
    path: Path,
    task_names: Sequence[str],
    sets: Sequence[Set],
    individuals: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Methods on K ≥ 3 tasks, an axis per task on one scale, written to PNG.

    Thin lines are the solutions of the first set with preferences, in the colour of the task that the preference
    favours most and marked on that task's axis; the one nearest to the equal preference is thick and black. Every other
    model is one broken line; a further set with preferences shows its solution nearest to the equal preference.

    Args:
        task_names: K names. sets: accuracies [n, K], gammas [n, K] or None. individuals: model -> accuracies [K]; on
            each axis the best of them is marked.

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    methods = _checked(task_names, sets, at_least=3)
    alone = _checked_individuals(individuals, len(task_names))
    first = _first_set(methods)
    # many methods want the width of the page, or their legend would be longer than the picture
    width = ONE_PANEL if len(methods) <= MANY else SEVERAL_PANELS
    with _picture(path, width, 2.6) as figure:
        axes = figure.subplots()
        at = np.arange(len(task_names))
        handles: list[Artist] = []
        labels: list[str] = []
        values: list[Array] = []
        if first is not None:
            handles, labels = _draw_solutions(axes, first)
            values.append(first.accuracies)
        broken = 0
        for method in methods:
            if method is first:
                continue
            broken += 1
            rows = method.accuracies if method.gammas is None else method.accuracies[[method.balanced()]]
            style: Style = {"color": GREY, "linewidth": 0.6, "label": method.name, "zorder": 3}
            style |= method.grey_mark(3.4) | {"linestyle": _LINES[1 + broken % (len(_LINES) - 1)]}
            handles.append(axes.plot(at, rows.T, **style)[0])
            labels.append(method.name + (f" ({_balance(method)})" if method.gammas is not None else ""))
            values.append(rows)
        if alone:
            best = np.max(list(alone.values()), axis=0)
            style = _mark("_", min(9.0, 120 / len(at))) | {"markeredgewidth": 1.6, "color": VERMILION}
            labels.append("best fine-tuned model of each task")
            handles += axes.plot(at, best, label=labels[-1], zorder=2.5, **style)
            values.append(best)

        shown = np.concatenate([np.ravel(value) for value in values])
        room = max(0.06 * np.ptp(shown), 0.5)
        axes.set(xlim=(-0.4, at[-1] + 0.4), ylim=(shown.min() - room, shown.max() + room), ylabel="accuracy (%)")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", alpha=0.8)
        axes.grid(axis="y")
        if first is not None:
            for task in range(len(task_names)):
                axes.plot(task, -0.04, transform=axes.get_xaxis_transform(), clip_on=False, **_task_mark(task, 4.2))
        _name_axes(axes, task_names, pad=11 if first is not None else 3)
        figure.set_size_inches(width, 2.6 + max(t.get_window_extent().height for t in axes.get_xticklabels()) / DPI)
        _legend_below(figure, handles, labels)


def pairwise_projections(
    path: Path,
    task_names: Sequence[str],
    sets: Sequence[Set],
    pairs: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Methods on K ≥ 3 tasks, projected on pairs of tasks, written to PNG: a panel per pair, as Figure 5 of the paper.

    Args:
        task_names: K names. sets: accuracies [n, K], gammas [n, K] or None. pairs: two different tasks each; by default
            (0, 1), (2, 3), … and, where K is odd, the last task with the first.

    Raises:
        ValueError: a shape other than those, a value that is not finite, a preference outside the simplex.
    """
    methods = _checked(task_names, sets, at_least=3)
    tasks = len(task_names)
    if pairs is None:
        pairs = [(k, (k + 1) % tasks) for k in range(0, tasks, 2)]
    if not pairs or any(len(p) != 2 or p[0] == p[1] or not all(k in range(tasks) for k in p) for p in pairs):
        raise ValueError(f"pairs: expected pairs of different tasks from 0 to {tasks - 1}, got {pairs!r}")
    columns = min(len(pairs), 3 if len(pairs) in (3, 5, 6, 9) else 4)
    rows = -(-len(pairs) // columns)
    with _picture(path, SEVERAL_PANELS, rows * min(SEVERAL_PANELS / columns, 2.8)) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (x, y) in zip(panels, pairs, strict=False):
            for method in methods:
                axes.plot(*method.accuracies[:, (x, y)].T, label=method.name, **_dots(method))
            axes.set_xlabel(f"{_short(task_names[x], 16)} (%)")
            axes.set_ylabel(f"{_short(task_names[y], 16)} (%)")
            axes.grid(True)
            axes.margins(0.08)
            axes.set_box_aspect(1)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4))
        for axes in panels[len(pairs) :]:
            axes.remove()
        _legend_below(figure, [_key(**_dots(method)) for method in methods], [method.name for method in methods])


def _checked(
    task_names: Sequence[str],
    sets: Sequence[Set],
    exactly: int | None = None,
    at_least: int = 1,
    argument: str = "sets[{}].",
) -> list[_Method]:
    """``sets`` as arrays, once everything has the shape that it should have; ``argument`` is their name in an error."""
    tasks = len(task_names)
    if tasks < at_least or exactly not in (None, tasks):
        raise ValueError(f"task_names: expected {exactly or f'at least {at_least}'} names, got {tasks}")
    if not sets:
        raise ValueError("sets: expected at least one, got none")
    methods = []
    for place, one in enumerate(sets):
        prefix = argument.format(place)
        accuracies = _numbers(f"{prefix}accuracies", one.accuracies, f"[n, {tasks}], n ≥ 1")
        if accuracies.ndim != 2 or accuracies.shape[1] != tasks or not len(accuracies):
            raise ValueError(f"{prefix}accuracies: expected [n, {tasks}], n ≥ 1, got {list(accuracies.shape)}")
        gammas = None
        if one.gammas is not None:
            gammas = _numbers(f"{prefix}gammas", one.gammas, str(list(accuracies.shape)))
            if gammas.shape != accuracies.shape:
                raise ValueError(f"{prefix}gammas: expected {list(accuracies.shape)}, got {list(gammas.shape)}")
            for row in gammas:
                if row.min() < -SUM_TOLERANCE or abs(row.sum() - 1) > SUM_TOLERANCE:
                    raise ValueError(
                        f"{prefix}gammas: expected weights of at least 0 that sum to 1, got {row.tolist()}"
                    )
        methods.append(_Method(one.name, accuracies, gammas, place))
    return methods


def _checked_individuals(individuals: Mapping[str, Sequence[float]] | None, tasks: int) -> dict[str, Array]:
    checked = {}
    for name, values in (individuals or {}).items():
        checked[name] = _numbers(f"individuals[{name!r}]", values, f"[{tasks}]")
        if checked[name].shape != (tasks,):
            raise ValueError(f"individuals[{name!r}]: expected [{tasks}], got {list(checked[name].shape)}")
    return checked


def _numbers(argument: str, values: Any, shape: str) -> Array:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected numbers {shape}, got {values!r}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{argument}: expected finite numbers {shape}, got {values!r}")
    return numbers


def _first_set(methods: Sequence[_Method]) -> _Method | None:
    return next((method for method in methods if method.gammas is not None), None)


def _favoured(gamma: Array) -> int | None:
    """The task with the largest weight in ``gamma`` [K], the first of several; None if all weights are equal."""
    return None if np.ptp(gamma) <= SUM_TOLERANCE else int(np.argmax(gamma >= gamma.max() - SUM_TOLERANCE))


def _balance(method: _Method) -> str:
    assert method.gammas is not None
    return ("equal" if _favoured(method.gammas[method.balanced()]) is None else "most even") + " preference"


@contextlib.contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written to ``path`` when the block ends without an exception."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _short(name: str, characters: int = 18) -> str:
    """``name`` on one line, its middle left out where it is longer than so many characters."""
    name = " ".join(name.split())
    kept = characters // 2
    return name if len(name) <= characters else f"{name[: characters - kept - 1]}…{name[-kept:]}"


def _wrapped(text: str, characters: int) -> str:
    return textwrap.fill(text, characters)


def _mark(marker: Any, size: float) -> Style:
    return {"marker": marker, "markersize": size * _SIZES.get(marker, 1.0), "linestyle": "none"}


def _key(**style: Any) -> Line2D:
    """What a legend shows for a line or a marker."""
    return Line2D([], [], **style)


def _legend(
    where: Axes | Figure, handles: Sequence[Artist], names: Sequence[str], width: float, characters: int, loc: Any
) -> Legend:
    """A legend of as many columns as fit ``width`` inches, its names in lines of so many characters."""
    for columns in range(min(len(handles), 6), 0, -1):
        # matplotlib leaves out names that start with an underscore
        legend = where.legend(handles, ["?"] * len(names), loc=loc, ncols=columns, **_LEGEND)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(_wrapped(name, characters))
        if columns == 1 or legend.get_window_extent().width <= width * DPI:
            break
        legend.remove()
    return legend


def _legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend under everything, in narrow figures of two columns; the figure grows by its height."""
    width, height = figure.get_size_inches()
    legend = _legend(figure, handles, names, width - 0.1, 24 if width < 5 else 60, loc="outside lower center")
    figure.set_size_inches(width, height + legend.get_window_extent().height / DPI)


def _draw_fronts(axes: Axes, methods: Sequence[_Method], size: float) -> list[Artist]:
    """Lines and points of two tasks, and what the legend shows for each method."""
    handles: list[Artist] = []
    lines = 0
    for method in methods:
        dot = method.coloured_mark(size) | {"markeredgewidth": 0.6, "label": method.name}
        if method.gammas is None:
            dot |= method.coloured_mark(1.25 * size) | {"markeredgecolor": "black"}
            handles += axes.plot(*method.accuracies.T, zorder=4, **dot)
            continue
        line = {"color": dot["color"], "linestyle": _LINES[lines % len(_LINES)], "linewidth": 1.1}
        lines += 1
        accuracies = method.accuracies[np.argsort(method.gammas[:, 0], kind="stable")]
        best = non_dominated(accuracies)
        axes.plot(*accuracies.T, zorder=3, label=method.name, **line)
        axes.plot(*accuracies[best].T, zorder=3.2, **dot)
        axes.plot(*accuracies[~best].T, zorder=3.1, markerfacecolor="white", **dot)
        handles.append(_key(**method.coloured_mark(size) | line))
    return handles


def _enlarged(methods: Sequence[_Method]) -> tuple[Array, Array, int]:
    """Corners [2] of the box around the first set with preferences and the models near it, and how many are outside.

    Near is within half the extent of the set, or five points, from it. Without such a set all models are in the box.
    """
    points = np.concatenate([method.accuracies for method in methods])
    first = _first_set(methods)
    inside = np.ones(len(points), dtype=bool)
    if first is not None:
        low, high = first.accuracies.min(axis=0), first.accuracies.max(axis=0)
        reach = np.maximum((high - low) / 2, 5.0)
        inside = ((points >= low - reach) & (points <= high + reach)).all(axis=1)
    low, high = points[inside].min(axis=0), points[inside].max(axis=0)
    margin = np.maximum(0.1 * (high - low), 0.5)
    # γ₁ is written on the right of a point
    return low - margin, high + margin * (1.7, 1.0), int((~inside).sum())


def _name_ends(axes: Axes, method: _Method | None) -> None:
    """γ₁ beside the first and the last solution of a set."""
    if method is None or method.gammas is None:
        return
    order = np.argsort(method.gammas[:, 0], kind="stable")
    ends = sorted({int(order[0]), int(order[-1])}, key=lambda row: -method.accuracies[row, 1])
    for row, above in zip(ends, (True, False), strict=False):
        axes.annotate(
            f"γ₁ = {round(method.gammas[row, 0], 3):g}",
            method.accuracies[row],
            textcoords="offset points",
            xytext=(0, 5) if above else (5, 0),
            horizontalalignment="center" if above else "left",
            verticalalignment="bottom" if above else "center",
            color=method.coloured_mark(1)["color"],
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=6,
        )


def _triangle(axes: Axes, task_names: Sequence[str], title: str) -> None:
    """The simplex's outline with the tasks' names at its corners, a title above them, and no axes."""
    axes.set_title(title, pad=15)
    axes.add_patch(Polygon(_CORNERS, fill=False, edgecolor="black", linewidth=0.7, zorder=3))
    for (x, y), name, side in zip(_CORNERS, task_names, ("bottom", "top", "top"), strict=True):
        up = 5 if side == "bottom" else -5
        axes.annotate(
            _short(name),
            (x, y),
            textcoords="offset points",
            xytext=(0, up),
            horizontalalignment="center",
            verticalalignment=side,
        )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 0.88), aspect="equal")
    axes.axis("off")


def _surface(axes: Axes, where: Array, values: Array) -> Any:
    """Values [n] at where [n, 2]: filled contours and dots, or coloured dots where the places span no triangle."""
    # percent: less than one item of a million
    constant = np.ptp(values) < 1e-4
    low, high = (values.mean() - 0.5, values.mean() + 0.5) if constant else (values.min(), values.max())
    places = np.unique(where.round(6), axis=0)
    flatness = np.linalg.svd(places - places.mean(axis=0), compute_uv=False)
    if len(places) <= 3 or flatness[1] < 1e-3 * flatness[0]:
        style: Style = {"s": 28, "edgecolor": "black", "linewidth": 0.6, "zorder": 4}
        return axes.scatter(
            where[:, 0], where[:, 1], c=values, cmap="cividis", vmin=low, vmax=high, clip_on=False, **style
        )
    levels = [low, high] if constant else MaxNLocator(12).tick_values(low, high)
    filled = axes.tricontourf(where[:, 0], where[:, 1], values, levels=levels, cmap="cividis")
    axes.plot(*where.T, "o", color="black", markersize=2.2, markeredgecolor="white", markeredgewidth=0.4, zorder=4)
    return filled


def _mixed(gammas: Array) -> Array:
    """Colours [..., 3] of preferences [..., 3]."""
    return np.clip(gammas @ np.array([to_rgb(colour) for colour in _COLOURS[:3]]), 0, 1)


def _draw_preferences(axes: Axes, method: _Method, x: int, y: int) -> None:
    assert method.gammas is not None
    favoured = [_favoured(gamma) for gamma in method.gammas]
    for task, marker in (*enumerate(_FAVOURED_MARKERS), (None, _EQUAL_MARKER)):
        rows = [row for row, value in enumerate(favoured) if value == task]
        if rows:
            axes.scatter(
                method.accuracies[rows, x],
                method.accuracies[rows, y],
                c=_mixed(method.gammas[rows]),
                marker=marker,
                s=15,
                edgecolor="black",
                linewidth=0.35,
                label=method.name,
                zorder=4,
            )


def _colour_triangle(axes: Axes, task_names: Sequence[str], method: _Method) -> None:
    """The legend of ``_draw_preferences``."""
    x, y = np.meshgrid(np.linspace(0, 1, 240), np.linspace(0, _CORNERS[0, 1], 208))
    top = y / _CORNERS[0, 1]
    gammas = np.stack([top, 1 - x - top / 2, x - top / 2], axis=-1)
    picture = np.concatenate([_mixed(gammas), (gammas.min(axis=-1, keepdims=True) >= 0).astype(float)], axis=-1)
    axes.imshow(picture, origin="lower", extent=(0, 1, 0, _CORNERS[0, 1]), zorder=2)
    _triangle(axes, task_names, f"{_short(method.name, 24)}: preference")
    for place, marker, colour in zip(_CORNERS, _FAVOURED_MARKERS, _COLOURS, strict=False):
        axes.plot(*place, marker=marker, color=colour, markeredgecolor="black", markersize=5, clip_on=False, zorder=5)
    assert method.gammas is not None
    if any(_favoured(gamma) is None for gamma in method.gammas):
        equal = np.full(3, 1 / 3)
        style: Style = {"color": _mixed(equal), "markeredgecolor": "black", "markersize": 5}
        axes.plot(*(equal @ _CORNERS), _EQUAL_MARKER, zorder=5, **style)


def _task_mark(task: int, size: float) -> Style:
    """The marker that stands for a task in ``parallel_coordinates``."""
    edge = {"color": _COLOURS[task % len(_COLOURS)], "markeredgecolor": "black", "markeredgewidth": 0.4}
    return _mark(_MARKERS[task % len(_MARKERS)], size) | edge


def _draw_solutions(axes: Axes, method: _Method) -> tuple[list[Artist], list[str]]:
    """The lines of a set with preferences, and what the legend shows for them."""
    assert method.gammas is not None
    at = np.arange(method.accuracies.shape[1])
    even = method.balanced()
    for row, (gamma, accuracy) in enumerate(zip(method.gammas, method.accuracies, strict=True)):
        task = _favoured(gamma)
        if row == even or task is None:
            continue
        colour = _COLOURS[task % len(_COLOURS)]
        axes.plot(at, accuracy, color=colour, linewidth=0.7, alpha=0.75, label=method.name, zorder=3.5)
        axes.plot(task, accuracy[task], zorder=3.6, **_task_mark(task, 3.4))
    thick = axes.plot(at, method.accuracies[even], color="black", linewidth=1.8, label=method.name, zorder=5)
    if len(method.accuracies) == 1:
        return [*thick], [f"{method.name}, {_balance(method)}"]
    thin = _key(**_task_mark(0, 3.4) | {"linestyle": "-", "linewidth": 0.7})
    return [thin, *thick], [f"{method.name}, favoured task marked", f"{method.name}, {_balance(method)}"]


def _name_axes(axes: Axes, task_names: Sequence[str], pad: float) -> None:
    """Names under the axes: level if no word is broken, else slanting, upright if they are many or long."""
    characters = 48 // len(task_names)
    names = [_short(name, 24) for name in task_names]
    level = all(len(word) <= characters for name in names for word in name.split())
    axes.set_xticks(range(len(names)), [_wrapped(name, characters) if level else name for name in names])
    axes.tick_params(axis="x", length=0, pad=pad)
    upright = len(names) > 12 or max(len(name) for name in names) > 16
    for label in axes.get_xticklabels():
        if upright and not level:
            label.set(rotation=90, va="top", ha="center")
        elif not level:
            label.set(rotation=45, va="top", ha="right", rotation_mode="anchor")


def _dots(method: _Method) -> Style:
    """How ``pairwise_projections`` draws a method: one model large with a black edge, solutions small and behind."""
    if method.gammas is None:
        return method.coloured_mark(4.8) | {"markeredgecolor": "black", "markeredgewidth": 0.5, "zorder": 4}
    return method.coloured_mark(3.2) | {"markeredgecolor": "none", "alpha": 0.8, "zorder": 3}
