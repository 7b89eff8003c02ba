"""Tables in Markdown and pictures, as the summaries of the suites have them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

REHEARSAL = "A rehearsal: these figures measure nothing."
RULES = {"l": "---|", "r": "---:|"}


def table(columns: Sequence[str], rows: Iterable[Iterable[str]], align: str) -> list[str]:
    """Return the lines of a table. ``align``: l or r for each column, the last for all after it too."""
    rule = "|" + "".join(RULES[letter] for letter in align.ljust(len(columns), align[-1]))
    head = f"| {' | '.join(columns)} |".replace("|  |", "| |")
    return [head, rule, *(f"| {' | '.join(cells)} |" for cells in rows)]


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, across: int) -> Iterator[tuple[Any, Any]]:
    """Draw one figure of so many panels beside each other and write it. Yields the figure and its panels."""
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
        yield figure, figure.subplots(1, across, squeeze=False).flatten()
        figure.savefig(path)


def style(number: int) -> dict[str, Any]:
    """Return the marker, line and colour of one of many lines."""
    markers, lines = "osD^vPX*<>", ("-", "--", ":")
    look = {"marker": markers[number % len(markers)], "linestyle": lines[number % len(lines)]}
    return {**look, "color": f"C{number % 10}", "markersize": 4, "linewidth": 1.0}


def file_name(model: str) -> str:
    """Return a model's name as files spell it: ``ViT-B/32`` -> ``vit-b-32``."""
    return model.lower().replace("/", "-").replace(" ", "-")
