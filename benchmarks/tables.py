"""``python -m benchmarks.tables``: tables of the README and docs/, and pictures, from the newest committed results."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from benchmarks.run import GPU_SUITES, SUITES_OF_BOTH, suite_module

# in a file of its own, because it is a run of its own
GOALS = "goals"
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (
    README,
    *(ROOT / "docs" / name for name in ("study.md", "training.md", "serving_speed.md", "own_models.md", "gpu.md")),
)


def newest(suite: str, on_gpu: bool | None = None) -> Path | None:
    """The newest committed result that has a suite, or None: it was never measured; ``on_gpu``: on a GPU, or not."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        beside_others = suite in report.get("suites", {})
        there = beside_others or report.get("suite") == suite
        if not report.get("quick") and there and on_gpu in (None, beside_others or suite == GOALS):
            found.append((report["date"], path))
    return max(found)[1] if found else None


def block(name: str, to_root: str = "") -> str:
    """What a document says of a suite: its tables and where they come from, or that nothing was measured.

    ``name``: SUITE, or SUITE_PART for what the suite's ``PART_markdown`` makes. ``to_root``: from its folder, as ../.
    """
    suite, _, part = name.partition("_")
    if suite in SUITES_OF_BOTH:
        return "\n".join(_block(suite, part, on_gpu, to_root) for on_gpu in (True, False))
    return _block(suite, part, suite in (*GPU_SUITES, GOALS), to_root)


def _module(suite: str) -> Any:
    return importlib.import_module("benchmarks.goals.table") if suite == GOALS else suite_module(suite)


def _block(suite: str, part: str, on_gpu: bool, to_root: str) -> str:
    path = newest(suite, on_gpu)
    if path is None:
        if on_gpu:
            command = "make gpu-goals" if suite == GOALS else "make gpu"
            said = (
                f"Times on a GPU: **not measured** yet. `{command}` measures them and writes the file they come from.\n"
            )
            # what is aimed at can be shown before it is measured
            nothing = {"rows": [], "device": "cuda"}
            goals = suite == GOALS or part == "goals"
            return f"{_module(suite).goals_markdown(nothing)}\n{said}" if goals else said
        return "Not measured yet.\n"
    report: dict[str, Any] = json.loads(path.read_text())
    where = report["environment"]
    hardware = where["gpu"] if on_gpu else where["cpu"]
    figures = report["suites"][suite] if suite in report.get("suites", {}) else report
    source = (
        f"From [`{path.name}`]({to_root}benchmarks/results/{path.name}) (`{report['command']}`, {hardware}, "
        f"torch {where['torch']}).\n"
    )
    made = getattr(_module(suite), f"{part}_markdown" if part else "markdown")(figures)
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
    for suite in ("training", "layers"):
        path = newest(suite, True)
        if path is not None:
            figures = json.loads(path.read_text())["suites"][suite]
            for picture in suite_module(suite).draw(figures, ROOT / "docs" / "training"):
                print(picture)
    for on_gpu in (True, False):
        serving = newest("serving", on_gpu)
        if serving is not None:
            report = json.loads(serving.read_text())
            for picture in suite_module("serving").draw(
                report["suites"]["serving"] if on_gpu else report, ROOT / "docs" / "serving"
            ):
                print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
