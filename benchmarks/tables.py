"""``python -m benchmarks.tables``: tables of the README and docs/, and pictures, from the newest committed results."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.suites import SUITES
from benchmarks.results import RESULTS

# in a file of its own, because it is a run of its own
GOALS = "goals"
ROOT = Path(__file__).parent.parent
PAGES = ("study.md", "training.md", "serving_speed.md", "own_models.md", "gpu.md")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES))


def newest(suite: str, on_gpu: bool | None = None) -> Path | None:
    """Return the newest committed result that has a suite (``on_gpu`` or not). None: it was never measured."""
    results = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        beside_others = suite in report.get("suites", {})
        measured = beside_others or report.get("suite") == suite
        if not report.get("quick") and measured and on_gpu in (None, beside_others or suite == GOALS):
            results.append((report["date"], path))
    return max(results)[1] if results else None


def block(name: str, to_root: str = "") -> str:
    """Return what a document says of a suite. Its tables and where they come from, or that nothing was measured.

    ``name``: SUITE, or SUITE_PART for what the suite's ``PART_markdown`` makes. ``to_root``: from its folder, as ../.
    """
    suite, _, part = name.partition("_")
    devices = {"both": (True, False), "gpu": (True,), "cpu": (False,)}[SUITES[suite].device]
    return "\n".join(_block(suite, part, on_gpu, to_root) for on_gpu in devices)


def _block(suite: str, part: str, on_gpu: bool, to_root: str) -> str:
    path = newest(suite, on_gpu)
    if path is None:
        if on_gpu:
            command = "make gpu-goals" if suite == GOALS else "make gpu"
            measured = f"`{command}` measures them and writes the file they come from."
            missing = f"Times on a GPU: **not measured** yet. {measured}\n"
            # what is aimed at can be shown before it is measured
            nothing = {"rows": [], "device": "cuda"}
            goals = suite == GOALS or part == "goals"
            return f"{SUITES[suite].showing.goals_markdown(nothing)}\n{missing}" if goals else missing
        return "Not measured yet.\n"
    report: dict[str, Any] = json.loads(path.read_text())
    where, link = report["environment"], f"[`{path.name}`]({to_root}benchmarks/results/{path.name})"
    hardware = where["gpu"] if on_gpu else where["cpu"]
    figures = report["suites"][suite] if suite in report.get("suites", {}) else report
    made = getattr(SUITES[suite].showing, f"{part}_markdown" if part else "markdown")(figures)
    others = report.get("joined")
    joined = f"; methods it does not name are of `{others['file']}`, on another CPU: {others['cpu']}" if others else ""
    return f"{made}\nFrom {link} (`{report['command']}`, {hardware}, torch {where['torch']}{joined}).\n"


def updated(text: str, to_root: str = "") -> str:
    """Return ``text`` with each :func:`block` between ``<!-- results:NAME -->`` and ``<!-- end -->`` made anew."""
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
    for suite in SUITES.values():
        for on_gpu in (True, False):
            path = newest(suite.name, on_gpu) if suite.pictures is not None else None
            if path is not None:
                report = json.loads(path.read_text())
                figures = report["suites"][suite.name] if on_gpu else report
                for picture in suite.showing.draw(figures, ROOT / "docs" / str(suite.pictures)):
                    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
