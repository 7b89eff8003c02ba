"""The committed figures of fuzzing, which ``make fuzz`` measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(report: Mapping[str, Any]) -> str:
    """Return the committed figures for docs/: a row for each reader."""
    lines = ["| reader | damaged files | refused | right answer | findings |", "|---|---:|---:|---:|---:|"]
    for row in report["rows"]:
        counts = [f"{row[key]:,}" for key in ("mutations", "refused", "right", "found")]
        lines.append(f"| {row['reader']} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"
