"""``python -m benchmarks.tables``: write the README's tables from the newest committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from benchmarks.run import GPU_SUITES, suite_module

README = Path(__file__).parent.parent / "README.md"


def newest(suite: str) -> Path | None:
    """The newest committed result that has a suite, or None: it was never measured."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        if not report.get("quick") and (report.get("suite") == suite or suite in report.get("suites", {})):
            found.append((report["date"], path))
    return max(found)[1] if found else None


def block(suite: str) -> str:
    """What the README says of a suite: its tables and where they come from, or that nothing was measured."""
    path = newest(suite)
    if path is None:
        if suite in GPU_SUITES:
            return (
                "Times on a GPU: **not measured** yet. `make gpu` measures them and writes the file they come from.\n"
            )
        return "Not measured yet.\n"
    report: dict[str, Any] = json.loads(path.read_text())
    where = report["environment"]
    hardware = where["gpu"] if suite in GPU_SUITES else where["cpu"]
    figures = report["suites"][suite] if suite in GPU_SUITES else report
    source = (
        f"From [`{path.name}`](benchmarks/results/{path.name}) (`{report['command']}`, {hardware}, "
        f"torch {where['torch']}).\n"
    )
    return f"{suite_module(suite).markdown(figures)}\n{source}"


def updated(readme: str) -> str:
    """``readme`` with everything between ``<!-- results:SUITE -->`` and ``<!-- end -->`` made anew."""
    return re.sub(
        r"<!-- results:(\w+) -->.*?<!-- end -->",
        lambda match: f"<!-- results:{match.group(1)} -->\n{block(match.group(1))}<!-- end -->",
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    print(README)
