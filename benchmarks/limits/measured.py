"""Figures of committed results files that limits are set beside."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.common.towers import RANK

# (layer, rows, operation, tasks) -> variant -> milliseconds
Figures = dict[tuple[str, int, str, int], dict[str, float]]


def _reports() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield committed results, oldest first; a rehearsal is nobody's result."""
    reports = []
    for path in sorted(results.RESULTS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report.get("quick"):
            reports.append((report.get("date", ""), path, report))
    yield from ((path, report) for _, path, report in sorted(reports, key=lambda item: item[:2]))


def _layer_rows(suites: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield rows of the kernels suite and of the layer grid. The training suite had the grid before."""
    kernels = suites.get("kernels", {})
    for row in kernels.get("rows", ()):
        if kernels["rank"] == RANK:
            yield {**row, "tasks": kernels["tasks"]}
    for grid in (suites.get("training", {}).get("layers", {}), suites.get("layers", {})):
        if grid.get("rank") == RANK:
            yield from grid.get("rows", ())


def measured(gpu: str) -> tuple[Figures, list[str]]:
    """Return the newest committed milliseconds of our variants on that GPU, and their files. Only bfloat16 counts."""
    figures: Figures = {}
    sources: dict[tuple[str, int, str, int], str] = {}
    for path, report in _reports():
        where = report.get("environment", {}).get("gpu")
        if not where or results.gpu_file_name(where) != gpu:
            continue
        mine: Figures = {}
        for row in _layer_rows(report.get("suites", {})):
            if row["ms"] is None or row["dtype"] != "bfloat16":
                continue
            if row["variant"] in ("fused", "streamed", "auto", "cached"):
                rows = 0 if row["op"] == "merge" else row["rows"]
                key = (row["layer"].removesuffix(", one image"), rows, row["op"], row["tasks"])
                mine.setdefault(key, {})[row["variant"]] = row["ms"]
        figures |= mine
        sources |= dict.fromkeys(mine, path.name)
    return figures, sorted(set(sources.values()))


def compiled(arch: str) -> tuple[Path, list[dict[str, Any]]] | None:
    """Return the architecture's newest committed budget file. With it come its 16-bit rows of main kernels."""
    newest = None
    for path, report in _reports():
        if report.get("suite") == "budget":
            rows = [row for row in report["rows"] if row["arch"] == arch and row["dtype"] == "bfloat16"]
            rows = [row for row in rows if row["kernel"] in ("linear_fwd_kernel", "weight_grad_kernel", "merge_kernel")]
            newest = (path, rows) if rows else newest
    return newest
