"""The benchmark command, with a few steps, and the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import digits, run, tables
from pareto_merging.data import digits as suite

ROOT = Path(run.__file__).parent.parent


@pytest.mark.slow
def test_quick_run_writes_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PRETRAINING", {**suite.PRETRAINING, "steps": 2})
    monkeypatch.setattr(suite, "FINETUNING", {**suite.FINETUNING, "steps": 2})
    monkeypatch.setattr(digits, "CANDIDATES", digits.CANDIDATES[:2])
    monkeypatch.setattr(digits, "LEARNING_RATES", digits.LEARNING_RATES[:1])
    out = tmp_path / "result.json"
    run.main(["--suite", "digits", "--seeds", "7", "8", "--quick", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["quick"]
    assert [r["seed"] for r in report["results"]] == [7, 8]
    assert len(report["results"][0]["two_tasks"]["fronts"][digits.PUBLISHED]) == 11
    average = report["summary"]["averages"]["AdaMerging"]
    values = [r["methods"]["AdaMerging"]["average"] for r in report["results"]]
    assert average["mean"] == pytest.approx(sum(values) / 2, abs=1e-3)
    assert "| AdaMerging |" in digits.markdown(report)
    assert report["environment"]["torch"]


def test_committed_results_are_whole_and_seen_by_the_readme() -> None:
    report = json.loads(tables.newest("digits").read_text())
    assert not report["quick"]
    assert len(report["seeds"]) >= 3
    assert not set(report["seeds"]) & {0, 1, 2}, "figures to be believed come from seeds the design did not see"
    assert report["command"].startswith("python -m benchmarks.run")
    for result in report["results"]:
        methods = result["methods"]
        for name in ("Individual", "Weight averaging", "Task arithmetic", "AdaMerging"):
            entry = methods[name]
            assert entry["average"] == pytest.approx(sum(entry["per_task"].values()) / 8, abs=0.02)
    assert report["summary"] == digits.summarize(report["results"])
    readme = (ROOT / "README.md").read_text()
    assert tables.updated(readme) == readme, "run python -m benchmarks.tables"
