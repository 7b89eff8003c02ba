"""Figures and ratios as the page of limits writes them."""

from collections.abc import Iterable, Sequence

from benchmarks.common import pages
from benchmarks.common.towers import Layer
from benchmarks.limits.predictions import Prediction

# task vectors of the goals, and how far a predicted time may be off
GOAL_TASKS = 8
UNCERTAINTY = 0.25


def figure(value: float) -> str:
    """Return three digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """Return a table between empty lines. Its first ``text`` columns are words, the others figures."""
    return ["", *pages.table(columns, rows, "l" * text + "r" * (len(columns) - text)), ""]


def layer_name(layer: Layer) -> str:
    rows = layer.items * layer.tokens
    return f"{layer.name}, {rows} {'row' if rows == 1 else 'rows'}"


def folded(title: str, lines: list[str], folded: bool) -> list[str]:
    """Return a table under its title, folded away where it is one of many."""
    if not folded:
        return [title, *lines]
    return ["<details>", f"<summary>{title.replace('**', '')}</summary>", *lines, "</details>", ""]


def ratio_text(value: float, off: float, digits: int = 2) -> str:
    """Write a predicted ratio and its bounds, where it is so much more or less."""
    return f"*{value:.{digits}f}× ({value - off:.{digits}f}–{value + off:.{digits}f})*"


def over_text(ours: Prediction, other: Prediction, digits: int = 2) -> str:
    """Write the ratio of two predictions; parts that are alike in both are off alike."""
    return ratio_text(ours.seconds / other.seconds, UNCERTAINTY * ours.apart(other) / other.seconds, digits)


def seconds_text(value: float) -> str:
    return f"*{figure(value)} s ({figure(value * (1 - UNCERTAINTY))}–{figure(value * (1 + UNCERTAINTY))})*"


def extremes(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[-1]


def share_text(least: float, most: float) -> str:
    return f"*{least:.0%}–{most:.0%} ({least / (1 + UNCERTAINTY):.0%}–{most / (1 - UNCERTAINTY):.0%})*"
