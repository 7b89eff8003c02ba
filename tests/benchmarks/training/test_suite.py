"""The training suite, rehearsed without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import names as variant_names
from benchmarks.training import runners, steps, suite, summary


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """A rehearsal, and that its rows were saved as they came."""
    saved: list[int] = []
    report = suite.run(True, lambda so_far: saved.append(len(so_far["rows"])))
    assert saved == list(range(1, len(report["rows"]) + 1))
    return report


@pytest.mark.slow
def test_every_variant_of_a_rehearsal_has_the_right_gradient(quick: dict[str, Any]) -> None:
    """Float32 against float64, each group of parameters by itself: nobody's mistake hides behind rounding."""
    assert quick["quick"]
    rows = quick["rows"]
    found = {(row["op"], row["variant"]) for row in rows}
    assert found == {(variant_names.STEP, v) for v in steps.VARIANTS[8] if v != variant_names.LIMIT_GRAPH} | {
        (variant_names.DATA_FREE, variant_names.AUTO)
    }
    assert [(row["variant"], row["reason"], row["error"]) for row in rows if not row["matched"] or row["reason"]] == []
    assert all(row["ms"] > 0 and row["host_ms"] > 0 and row["resident_bytes"] > 0 for row in rows)
    judged = [row for row in rows if row["op"] == variant_names.STEP and not row["variant"].startswith("limit")]
    assert all(0 < row["error"] < 1e-4 for row in judged)
    free = next(row for row in rows if row["op"] == variant_names.DATA_FREE)
    assert free["run_measured"] and free["run_steps"] == 3 and free["run_seconds"] > 0


@pytest.mark.slow
def test_a_rehearsal_claims_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    text = summary.markdown(quick)
    assert "these figures measure nothing" in text
    assert {goal.status for goal in summary.goals(quick)} == {"not measured"}
    for variant in runners.OURS:
        assert f"| {variant} | float32 |" in text
    tables = [line for line in text.splitlines() if line.startswith(("| auto", "| variant"))]
    assert len({line.count("|") for line in tables}) == 1
    assert [path.name for path in summary.draw(quick, tmp_path)] == ["training-tiny-vit.png"]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        suite.run(False)
