"""Tables of what was measured and what was not."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.common.rows import LayerRow
from benchmarks.common.timing import Times


def test_tables_say_what_was_never_measured_and_take_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "before\n<!-- results:kernels -->\nold\n<!-- end -->\nafter\n"
    assert "Times on a GPU: **not measured** yet" in tables.updated(text)
    row = LayerRow(op="forward", layer="layer", dtype="bfloat16", variant="fused", rows=8, bound_ms=0.25)
    row.note_times(Times(0.5, 0.4, 0.6))
    for date, gpu in (("2026-01-02", "some-gpu"), ("2026-01-03", "another-gpu")):
        suite = {"tasks": 8, "rank": 16, "ceilings": {"copy": 1e12, "bfloat16": 1e14}, "rows": [asdict(row)]}
        report = {"date": date, "command": "c", "suites": {"kernels": suite}, "environment": {"gpu": gpu, "torch": "2"}}
        results.write(tmp_path / f"{gpu}-{date}.json", report)
        results.write(tmp_path / f"quick-{date}.json", {**report, "date": "2027-01-01", "quick": True})
    found = tables.updated(text)
    assert "another-gpu-2026-01-03.json" in found
    assert "| layer | bfloat16 | fused | 0.5000 |  | 50% |" in found
    assert found.startswith("before\n")
    assert tables.updated(found) == found
