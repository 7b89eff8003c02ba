"""What was aimed at, what was measured beside it, and whether that is met."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.pages import table

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"


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


def markdown(title: str, goals: Sequence[Goal]) -> str:
    """Return the table of goals of models or machines, which ``title`` says."""
    rows = ((goal.where, goal.goal, goal.measured, goal.status) for goal in goals)
    return "\n".join(table((title, "goal", "measured", ""), rows, "l")) + "\n"
