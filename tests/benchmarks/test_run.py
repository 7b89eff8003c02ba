"""The benchmark command, with a few steps, and the committed results."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pmkernels
from benchmarks import results, run, tables
from benchmarks.common.rows import LayerRow
from benchmarks.common.timing import Times
from benchmarks.suites import digits, kernels, layers
from pareto_merging.data import digits as suite
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.results import Result
from pareto_merging.measure.summary import summarize
from pareto_merging.methods.registry import METHODS


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with everything that ``--quick`` keeps of a seed, and the report beside it."""
    work = tmp_path_factory.mktemp("quick") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "PRETRAINING", {**suite.PRETRAINING, "steps": 2})
        patch.setattr(suite, "FINETUNING", {**suite.FINETUNING, "steps": 2})
        out = work.parent / "result.json"
        arguments = ["--suite", "digits", "--seeds", "7", "--quick", "--work", str(work), "--out", str(out)]
        assert run.main(arguments) == 0
    return work


@pytest.mark.slow
def test_quick_run_writes_a_whole_report(quick: Path) -> None:
    report = json.loads((quick.parent / "result.json").read_text())
    assert report["quick"] and report["seeds"] == [7]
    for tasks in ("2", "3", "8"):
        rows = report["results"][tasks]
        assert [row["method"] for row in rows] == [*digits.QUICK_METHODS]
        assert [(row["method"], row["reason"]) for row in rows if row["status"] != "done"] == []
        assert [row["seed"] for row in rows] == [7] * 4
        assert all(len(point["accuracy"]) == int(tasks) for row in rows for point in row["points"])
        assert list(report["summary"][tasks]) == list(digits.QUICK_METHODS)
        equal = report["summary"][tasks]["adamerging"]["equal"]
        values = [sum(row["points"][0]["accuracy"]) / int(tasks) for row in rows if row["method"] == "adamerging"]
        assert equal["values"] == pytest.approx(values, abs=1e-3)
        assert equal["mean"] == pytest.approx(values[0], abs=1e-3)
        assert report["answers"][tasks]
    assert set(report["summary"]["3"]["pareto"]["unseen"]) == set(digits.UNSEEN[3])
    assert "unseen" not in report["summary"]["2"]["pareto"]
    assert list(report["ablations"]["2"]) == list(digits.ABLATIONS)[:2]
    assert list(report["ablations"]["8"]) == list(digits.ABLATIONS_OF_EIGHT)[:2]
    assert len(report["ablations"]["8"]["published"]["equal"]["values"]) == 1
    assert report["environment"]["torch"]
    text = digits.markdown(report)
    columns = [
        cell.strip() for cell in next(line for line in text.splitlines() if line.startswith("| method")).split("|")
    ]
    row = [
        cell.strip()
        for cell in next(line for line in text.splitlines() if line.startswith("| AdaMerging |")).split("|")
    ]
    assert len(columns) == len(row)
    mean = report["summary"]["8"]["adamerging"]["equal"]["mean"]
    assert row[columns.index("8 models: equal")].startswith(f"{mean:.1f}")
    assert "| published |" in digits.ablations_markdown(report)
    assert "permuted (%)" in digits.unseen_markdown(report)
    assert "| 8: Pareto Merging |" in digits.fronts_markdown(report)


@pytest.mark.slow
def test_a_work_folder_is_gone_on_from_by_several_processes(quick: Path, tmp_path: Path) -> None:
    before = json.loads((quick.parent / "result.json").read_text())
    removed = [
        quick / "seed-7" / "2-models" / "adamerging-seed-7.json",
        quick / "seed-7" / "3-models" / "pareto-seed-7.json",
    ]
    removed += [quick / "seed-7" / "2-models" / "ablations" / "published.json"]
    for path in removed:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in quick.rglob("*-seed-*.json")}
    out = tmp_path / "again.json"
    arguments = ["--seeds", "7", "--quick", "--work", str(quick), "--jobs", "2", "--out", str(out)]
    assert run.main(arguments) == 0
    assert all(path.exists() for path in removed)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "what was there is not run again"
    again = json.loads(out.read_text())
    for tasks in ("2", "3", "8"):
        for key, entry in before["summary"][tasks].items():
            for figure in ("equal", "one_hot", "hypervolume", "igd_plus", "spearman"):
                assert again["summary"][tasks][key].get(figure) == entry.get(figure), (tasks, key, figure)
    assert without_seconds(again["ablations"]) == without_seconds(before["ablations"])


def without_seconds(ablations: dict[str, Any]) -> dict[str, Any]:
    return {
        tasks: {name: {k: v for k, v in entry.items() if k != "seconds"} for name, entry in entries.items()}
        for tasks, entries in ablations.items()
    }


def test_ablations_change_what_they_say() -> None:
    settings = MethodSettings.model_validate(digits.METHOD)
    for name, change in digits.ABLATIONS.items():
        changed = MethodSettings.model_validate({**settings.model_dump(), **change})
        assert (changed == settings) == (name == "published"), name
    assert set(digits.ABLATIONS_OF_EIGHT) <= set(digits.ABLATIONS)
    names = [digits._file_name(name) for name in digits.ABLATIONS]
    assert len(set(names)) == len(names)


def test_committed_results_are_whole_and_seen_by_the_documents() -> None:
    path = tables.newest("digits")
    assert path is not None
    report = json.loads(path.read_text())
    assert not report["quick"]
    assert len(report["seeds"]) >= 5
    assert not set(report["seeds"]) & {0, 1, 2}, "figures to be believed come from seeds the design did not see"
    assert report["command"].startswith("python -m benchmarks.run")
    for tasks, rows in report["results"].items():
        assert {(row["seed"], row["method"]) for row in rows} == {(s, key) for s in report["seeds"] for key in METHODS}
        again = {key: entry.to_json() for key, entry in summarize([Result.from_json(row) for row in rows]).items()}
        for key, entry in report["summary"][tasks].items():
            for figure in ("equal", "priority", "one_hot", "hypervolume", "igd_plus"):
                assert again[key].get(figure) == entry.get(figure), (tasks, key, figure)
    for document in tables.DOCUMENTS:
        text, depth = document.read_text(), len(document.relative_to(tables.ROOT).parts) - 1
        assert tables.updated(text, "../" * depth) == text, "run python -m benchmarks.tables"


def test_the_kernels_suite_is_rehearsed_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny shapes, interpreted: every variant of every operation runs and matches float64."""

    def other_suite(name: str) -> Any:
        # each has a rehearsal of its own, in its own tests
        module = SimpleNamespace(run=lambda quick, save: {"rows": []}, markdown=lambda suite: f"| {name} |")
        return SimpleNamespace(measuring=module, showing=module)

    for name in ("training", "layers", "serving"):
        monkeypatch.setitem(run.SUITES, name, other_suite(name))
    out = tmp_path / "rehearsal.json"
    assert run.main(["--suite", "all", "--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["suites"]) == ["kernels", "training", "layers", "serving"]
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("training", "layers", "serving"))
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


def test_rows_are_saved_as_they_come_and_a_time_limit_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers.json"
    seen: list[int] = []
    measured = layers.points

    def watched(*arguments: Any) -> Any:
        seen.append(len(json.loads(out.read_text())["suites"]["layers"]["rows"]) if out.exists() else 0)
        return measured(*arguments)

    monkeypatch.setattr(layers, "points", watched)
    assert run.main(["--suite", "layers", "--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ended"] == "complete"
    assert seen[0] == 0 and sorted(set(seen)) == seen, "the file has every point before the next one begins"
    # so little time that the first row is the last
    assert run.main(["--suite", "layers", "--quick", "--minutes", "1e-9", "--out", str(out)]) == run.EXIT_TIME
    report = json.loads(out.read_text())
    assert report["ended"] == "time limit" and len(report["suites"]["layers"]["rows"]) == 1 < seen[1]
    assert "ended by time limit" in capsys.readouterr().out


def test_a_signal_ends_a_run_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "layers.json"
    measured = layers.points
    calls: list[int] = []

    def ended(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(*arguments)

    monkeypatch.setattr(layers, "points", ended)
    before = signal.getsignal(signal.SIGTERM)
    assert run.main(["--suite", "layers", "--quick", "--out", str(out)]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    report = json.loads(out.read_text())
    assert report["ended"] == "signal SIGTERM"
    assert len({(row["op"], row["rows"]) for row in report["suites"]["layers"]["rows"]}) == 2
