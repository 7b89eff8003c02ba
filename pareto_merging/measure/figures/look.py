"""How pictures look: legible in a paper's column, in grey and to the colour-blind.

A picture of one panel is made to be printed 3.4 inch wide, one of several panels 7 inch wide; no text is smaller than 7
points at that width. Colours are Okabe and Ito's, and whatever a colour tells, a marker or a line style tells too.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.path import Path as MarkerPath
from numpy.typing import NDArray

from pareto_merging.system.files import atomic_path

Array = NDArray[np.float64]
Style: TypeAlias = dict[str, Any]

# inches, and pixels per inch
ONE_PANEL, SEVERAL_PANELS = 3.4, 7.0
DPI = 300

# Okabe and Ito's palette
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
GREY, BLACK = "#777777", "#111111"
# Lengths without a common factor: 6 · 17 pairs before one comes again. Blue, orange and purple come first because no
# mixture of the three looks like one of them.
COLOURS = (BLUE, ORANGE, PURPLE, GREEN, VERMILION, SKY)
_HOURGLASS = MarkerPath([(-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1)])
_BOW_TIE = MarkerPath([(-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1)])
_STAR_OF_4, _STAR_OF_6 = (4, 1, 0), (6, 1, 0)
MARKERS: tuple[Any, ...] = (
    *("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d"),
    *(_HOURGLASS, _STAR_OF_4, "h", _BOW_TIE, _STAR_OF_6),
)
# so that all look equally large
_SIZES: dict[Any, float] = {"s": 0.9, "D": 0.85, "*": 1.45, _STAR_OF_4: 1.5, _STAR_OF_6: 1.35, "P": 1.1, "X": 1.1}
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (8, 1.5, 1, 1.5, 1, 1.5)))

_SETTINGS: Any = {
    **dict.fromkeys(("text.usetex", "text.parse_math", "axes.formatter.useoffset"), False),
    **dict.fromkeys(("axes.grid", "axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
    **dict.fromkeys(("font.size", "axes.labelsize"), 7.5),
    "axes.titlesize": 8,
    "figure.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "savefig.dpi": "figure",
    "savefig.bbox": None,
}
_LEGEND: Style = {"frameon": False, "columnspacing": 1.2, "handlelength": 2.8, "borderpad": 0.7}
# where colour means a preference, methods are black, white and grey, and leave these shapes to the preferences
FAVOURED_MARKERS, EQUAL_MARKER = ("o", "^", "s"), "D"
GREY_MARKERS = tuple(m for m in MARKERS if m not in (*FAVOURED_MARKERS, EQUAL_MARKER))
FILLS = ("black", "white", "#999999")


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Give a figure of so many inches; write it when the block ends well."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def short(name: str, characters: int = 18) -> str:
    """Return a name on one line, its middle left out beyond so many characters."""
    name = " ".join(name.split())
    kept = characters // 2
    return name if len(name) <= characters else f"{name[: characters - kept - 1]}…{name[-kept:]}"


def wrapped(text: str, characters: int) -> str:
    return textwrap.fill(text, characters)


def mark(marker: Any, size: float) -> Style:
    return {"marker": marker, "markersize": size * _SIZES.get(marker, 1.0), "linestyle": "none"}


def key(**style: Any) -> Line2D:
    """Return what a legend shows for a line or a marker."""
    return Line2D([], [], **style)


def draw_legend(
    where: Axes | Figure, handles: Sequence[Artist], names: Sequence[str], width: float, characters: int, loc: Any
) -> Legend:
    """Draw a legend of as many columns as fit ``width`` inches."""
    for columns in range(min(len(handles), 6), 0, -1):
        # matplotlib leaves out names that start with an underscore
        legend = where.legend(handles, ["?"] * len(names), loc=loc, ncols=columns, **_LEGEND)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(wrapped(name, characters))
        if columns == 1 or legend.get_window_extent().width <= width * DPI:
            break
        legend.remove()
    return legend


def legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Draw a legend under everything; the figure grows by its height."""
    width, height = figure.get_size_inches()
    legend = draw_legend(figure, handles, names, width - 0.1, 24 if width < 5 else 60, loc="outside lower center")
    figure.set_size_inches(width, height + legend.get_window_extent().height / DPI)
