"""Tables in Markdown, goals and pictures, as the summaries of the suites have them."""

import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REHEARSAL = "A rehearsal: these figures measure nothing."
MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
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


@dataclass(frozen=True)
class Goal:
    """One line of a table. ``measured`` and ``of_bound`` are texts, empty where there is nothing to say.

    ``where``: the model or machine, in tables of several. ``against``, ``to_reach``: where they are columns of their
    own.
    """

    goal: str
    measured: str
    status: str
    where: str = ""
    against: str = ""
    to_reach: str = ""
    of_bound: str = ""


def status_of(measured: str | None, met: bool) -> str:
    """Return whether a goal is met, by what was measured; None: nothing was."""
    return NOT_MEASURED if measured is None else MET if met else NOT_MET


def judged(where: str, goal: str, measured: str | None, met: bool, reason: str | None = None) -> Goal:
    """Return a goal of a model or machine. ``reason``: why nothing was measured, where that is known."""
    return Goal(goal, measured or reason or "", status_of(measured, met), where)


def fastest(rows: Iterable[Mapping[str, Any]], *variants: str, **where: Any) -> Mapping[str, Any]:
    """Return the fastest of ``variants`` among the rows with those values. Else one whose figures are None.

    ``reason`` then says why nothing was measured, where that is known.
    """
    own = [row for row in rows if row["variant"] in variants and all(row.get(key) == of for key, of in where.items())]
    timed = [row for row in own if row["ms"] and row["matched"]]
    nothing = collections.defaultdict[str, Any](lambda: None, reason=next((row["reason"] for row in own), None))
    return min(timed, key=lambda row: row["ms"], default=nothing)


def ratio(a: float | None, b: float | None) -> float | None:
    """Divide what was measured; None where one of both was not."""
    return None if a is None or not b else a / b


def times(value: float | None, digits: int = 3) -> str | None:
    """Write a ratio; None where there is none."""
    return None if value is None else f"{value:.{digits}f}×"


def at_most(value: float | None, most: float) -> bool:
    """Say whether something was measured and is no more."""
    return value is not None and value <= most


def goals_table(title: str, goals: Sequence[Goal]) -> str:
    """Return the table of goals of models or machines, which ``title`` says."""
    rows = ((goal.where, goal.goal, goal.measured, goal.status) for goal in goals)
    return "\n".join(table((title, "goal", "measured", ""), rows, "l")) + "\n"
