"""``python -m benchmarks.tables``: tables of the README and docs/, and pictures, from the newest committed results."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from benchmarks.run import GPU_SUITES, suite_module

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "docs" / "study.md", ROOT / "docs" / "training.md")


def newest(suite: str) -> Path | None:
    """The newest committed result that has a suite, or None: it was never measured."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        if not report.get("quick") and (report.get("suite") == suite or suite in report.get("suites", {})):
            found.append((report["date"], path))
    return max(found)[1] if found else None


def block(name: str, to_root: str = "") -> str:
    """What a document says of a suite: its tables and where they come from, or that nothing was measured.

    ``name``: SUITE, or SUITE_PART for what the suite's ``PART_markdown`` makes. ``to_root``: from its folder, as ../.
    """
    suite, _, part = name.partition("_")
    path = newest(suite)
    if path is None:
        if suite in GPU_SUITES:
            said = (
                "Times on a GPU: **not measured** yet. `make gpu` measures them and writes the file they come from.\n"
            )
            # what is aimed at can be shown before it is measured
            return f"{suite_module(suite).goals_markdown({'rows': []})}\n{said}" if part == "goals" else said
        return "Not measured yet.\n"
    report: dict[str, Any] = json.loads(path.read_text())
    where = report["environment"]
    hardware = where["gpu"] if suite in GPU_SUITES else where["cpu"]
    figures = report["suites"][suite] if suite in GPU_SUITES else report
    source = (
        f"From [`{path.name}`]({to_root}benchmarks/results/{path.name}) (`{report['command']}`, {hardware}, "
        f"torch {where['torch']}).\n"
    )
    made = getattr(suite_module(suite), f"{part}_markdown" if part else "markdown")(figures)
    return f"{made}\n{source}"


def updated(text: str, to_root: str = "") -> str:
    """``text`` with everything between ``<!-- results:NAME -->`` and ``<!-- end -->`` made anew: see :func:`block`."""
    return re.sub(
        r"<!-- results:(\w+) -->.*?<!-- end -->",
        lambda match: f"<!-- results:{match.group(1)} -->\n{block(match.group(1), to_root)}<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__).parse_args(arguments)
    for document in DOCUMENTS:
        document.write_text(updated(document.read_text(), "../" * (len(document.relative_to(ROOT).parts) - 1)))
        print(document)
    study = newest("digits")
    if study is not None:
        for picture in suite_module("digits").draw(json.loads(study.read_text()), ROOT / "docs" / "study"):
            print(picture)
    training = newest("training")
    if training is not None:
        figures = json.loads(training.read_text())["suites"]["training"]
        for picture in suite_module("training").draw(figures, ROOT / "docs" / "training"):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
