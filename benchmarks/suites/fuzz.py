"""The committed figures of fuzzing, which ``make fuzz`` measures."""

from collections.abc import Mapping
from typing import Any

from benchmarks.common.pages import table


def markdown(report: Mapping[str, Any]) -> str:
    """Return the committed figures for docs/: a row for each reader."""
    columns = {"mutations": "damaged files", "refused": "refused", "right": "right answer", "found": "findings"}
    rows = ([row["reader"], *(f"{row[key]:,}" for key in columns)] for row in report["rows"])
    return "\n".join(table(["reader", *columns.values()], rows, "lr")) + "\n"
