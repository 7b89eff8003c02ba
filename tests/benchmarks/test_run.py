"""The benchmark command, with a few steps, and the committed results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import pmkernels
from benchmarks import digits, kernels, results, run, tables
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
    path = tables.newest("digits")
    assert path is not None
    report = json.loads(path.read_text())
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


def test_the_kernels_suite_is_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    """Tiny shapes, interpreted: every variant of every operation runs and matches float64."""
    out = tmp_path / "rehearsal.json"
    assert run.main(["--suite", "all", "--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = report["suites"]["kernels"]["rows"]
    variants = {(row["op"], row["variant"]) for row in rows}
    for op in ("forward", "dx", "forward and backward", "forward, 3 preferences"):
        assert {(op, "fused"), (op, "streamed"), (op, "auto"), (op, "PyTorch")} <= variants
        assert any(variant.startswith("limit") for name, variant in variants if name == op)
    for op in ("weight gradient", "low-rank gradient, λ frozen", "merge", "softmax entropy, forward and backward"):
        assert {(op, "fused"), (op, "PyTorch")} <= variants
    for variant in ("merge again for each request", "loop over the preferences' adapters"):
        assert ("forward, 3 preferences", variant) in variants
    assert all(row["matched"] and row["ms"] > 0 and row["bound_ms"] > 0 for row in rows)
    text = kernels.markdown(report["suites"]["kernels"])
    assert all(f"**{op}**" in text for op, _ in variants)
    # a rehearsal is nobody's result
    assert report["quick"]


def test_a_wrong_result_has_no_time_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = pmkernels.merge_weight
    monkeypatch.setattr(pmkernels, "merge_weight", lambda *a, **k: correct(*a, **k) * 1.01)
    out = tmp_path / "wrong.json"
    assert run.main(["--suite", "kernels", "--quick", "--out", str(out)]) == 1
    suite = json.loads(out.read_text())["suites"]["kernels"]
    wrong = [row for row in suite["rows"] if not row["matched"]]
    assert {(row["op"], row["variant"]) for row in wrong} == {("merge", "fused")}
    assert all(row["ms"] is None for row in wrong)
    assert "wrong: error" in kernels.markdown(suite)


def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        run.main(["--suite", "kernels"])


def test_tables_say_what_was_never_measured_and_take_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "before\n<!-- results:kernels -->\nold\n<!-- end -->\nafter\n"
    assert "Times on a GPU: **not measured** yet" in tables.updated(text)
    row = kernels.Row("forward", "layer", "bfloat16", "fused", 8, 0.0, 0.0, True, 0.5, 0.4, 0.6, 0.25)
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
