"""The study with a few steps, and the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run, tables
from benchmarks.suites import digits
from pareto_merging.data import digits as suite
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.results import Measured, Result
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
    assert "| 8: Pareto Merging |" in digits.following_markdown(report)


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


def test_how_accuracies_follow_their_preferences() -> None:
    """Two tasks, by hand: a gains 10 and then 10, b gains 4 and then loses 6."""
    points = [
        ("equal", [0.5, 0.5], [70, 80]),
        ("priority:a", [0.75, 0.25], [80, 79]),
        ("one-hot:a", [1, 0], [90, 60]),
        ("priority:b", [0.25, 0.75], [65, 84]),
        ("one-hot:b", [0, 1], [60, 78]),
    ]
    plain = {"method": "pareto", "seed": 3, "is_bound": False, "tasks": ["a", "b"], "reference_point": [10, 10]}
    named = [{"kinds": [kind], "gamma": gamma, "accuracy": accuracy} for kind, gamma, accuracy in points]
    done = {"status": "done", "preference_aware": True, "choice": {}, "seconds": 1.0, "peak_bytes": 1, "facts": {}}
    result = Result.from_json({**plain, **done, "points": named})
    assert isinstance(result, Measured)
    gain, rises, ranks = digits._following(result)
    assert gain == (20 - 2) / 2
    assert rises == 3 / 4
    assert ranks["a"] == pytest.approx(1.0)
    # at γ_b = 0, ¼, ½, ¾, 1 the accuracies on b have the ranks 1, 3, 4, 5, 2
    assert ranks["b"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 1 + 9) / (5 * 24))
    # where two preferences are one, a step is one: of two tasks a priority of 0.5 is the equal preference
    both = Result.from_json({**plain, **done, "points": [{**named[0], "kinds": ["equal", "priority:a"]}, *named[2:]]})
    assert isinstance(both, Measured) and digits._following(both)[1] == 2 / 3


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
        lacking = report.get("lacking", {}).get(tasks, [])
        expected = {(seed, key) for seed in report["seeds"] for key in METHODS if key not in lacking}
        assert {(row["seed"], row["method"]) for row in rows if row["method"] not in lacking} == expected
        again = {key: entry.to_json() for key, entry in summarize([Result.from_json(row) for row in rows]).items()}
        for key, entry in report["summary"][tasks].items():
            for figure in ("equal", "priority", "one_hot", "hypervolume", "igd_plus"):
                assert again[key].get(figure) == entry.get(figure), (tasks, key, figure)
    for document in tables.DOCUMENTS:
        text, depth = document.read_text(), len(document.relative_to(tables.ROOT).parts) - 1
        assert tables.updated(text, "../" * depth) == text, "run python -m benchmarks.tables"
