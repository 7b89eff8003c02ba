"""A comparison's figures, by hand."""

import json
import math
from typing import Any

import pytest

from pareto_merging.measure.results import Result
from pareto_merging.measure.summary import MethodSummary, summarize


def result(
    method: str, seed: int, points: list[tuple[list[str], list[float] | None, list[float]]], **more: Any
) -> Result:
    return Result.from_json(
        {
            "method": method,
            "title": method.title(),
            "seed": seed,
            "is_bound": False,
            "tasks": ["a", "b"],
            "reference_point": [10.0, 20.0],
            "status": "done",
            "preference_aware": points[0][1] is not None,
            "choice": {},
            "seconds": 1.0,
            "tuning_seconds": 2.0,
            "peak_bytes": 3,
            "points": [{"kinds": kinds, "gamma": gamma, "accuracy": accuracy} for kinds, gamma, accuracy in points],
            **more,
        }
    )


def summarized(*results: Result) -> dict[str, Any]:
    """The summaries as JSON, as they are read from it again."""
    entries = {key: entry.to_json() for key, entry in summarize(results).items()}
    assert {key: MethodSummary.from_json(entry).to_json() for key, entry in entries.items()} == entries
    return entries


def test_summary_by_hand() -> None:
    aware = [
        (["equal", "priority:a", "priority:b"], [0.5, 0.5], [55.0, 60.0]),
        (["one-hot:a"], [1.0, 0.0], [82.0, 36.0]),
        (["one-hot:b"], [0.0, 1.0], [28.0, 84.0]),
    ]
    found = summarized(
        result("aware", 0, aware),
        result("single", 0, [(["equal"], None, [64.0, 68.0])]),
        result("single", 1, [(["equal"], None, [46.0, 52.0])]),
        result("bound", 0, [(["equal"], None, [100.0, 100.0])], is_bound=True),
    )
    a, s = found["aware"], found["single"]
    assert a["equal"] == {"mean": 57.5, "sd": None, "values": [57.5]}
    assert a["priority"]["mean"] == (55 + 60) / 2
    assert a["one_hot"]["mean"] == (82 + 84) / 2
    assert a["worst_task"]["mean"] == 55
    # shares of the box of 90 by 80: (0.5, 0.5), (0.8, 0.2), (0.2, 0.8)
    assert a["hypervolume"]["mean"] == pytest.approx(0.2 * 0.8 + 0.3 * 0.5 + 0.3 * 0.2)
    # the union of seed 0: (82, 36), (64, 68), (28, 84); the bound is not in it, and dominates nothing
    assert a["igd_plus"]["mean"] == pytest.approx(math.hypot(64 - 55, 68 - 60) / 3, abs=1e-4)
    assert a["points"]["mean"] == a["non_dominated"]["mean"] == 3
    assert a["spearman"]["mean"] == 1
    cosines = [
        115 / (math.sqrt(2) * math.hypot(55, 60)),
        82 / math.hypot(82, 36),
        84 / math.hypot(28, 84),
    ]
    assert a["cosine"]["mean"] == pytest.approx(sum(cosines) / 3, abs=1e-4)
    assert a["per_task"]["b"]["values"] == [60.0]
    assert s["seeds"] == 2
    assert s["equal"] == {"mean": 57.5, "sd": pytest.approx(12.0208, abs=1e-4), "values": [66.0, 49.0]}
    assert s["one_hot"] == s["priority"] == s["equal"], "one model, whatever the preference"
    assert s["hypervolume"]["values"] == [pytest.approx(0.6 * 0.6), pytest.approx(0.4 * 0.4)]
    gaps = [math.hypot(82 - 64, 0), 0, math.hypot(0, 84 - 68)]
    assert s["igd_plus"]["values"] == [pytest.approx(sum(gaps) / 3, abs=1e-4), 0], "each seed has a union of its own"
    assert s["cosine"]["mean"] is None
    assert "hypervolume" not in found["bound"] and found["bound"]["equal"]["mean"] == 100
    json.dumps(found, allow_nan=False)


def test_summary_of_what_is_missing() -> None:
    about: dict[str, Any] = {"title": "B", "seed": 0, "is_bound": False, "tasks": ["a", "b"], "reference_point": [1.0, 2.0]}
    failed = Result(method="b", **about, candidates=[], tuning_seconds=1.0, status="failed", reason="NaN")
    skipped = Result(method="c", **about, status="skipped", reason="no images")
    done = result("b", 1, [(["equal"], None, [50.0, 50.0])])
    found = summarized(failed, done, skipped)
    assert found["b"]["seeds"] == 1 and found["b"]["failed"] and found["b"]["reasons"] == ["NaN"]
    assert found["b"]["equal"]["values"] == [50.0]
    assert found["c"] == {"title": "B", "is_bound": False, "seeds": 0, "reasons": ["no images"], "failed": False}
    assert "failed" not in summarized(done)["b"]


def test_summary_of_fewer_evaluated_than_merged_tasks() -> None:
    points = [(["equal"], [0.5, 0.5], [60.0]), (["one-hot:a"], [1.0, 0.0], [80.0])]
    entry = summarized(result("aware", 0, points, tasks=["a"], reference_point=[10.0]))["aware"]
    assert entry["one_hot"]["mean"] == 80
    assert entry["hypervolume"]["mean"] == pytest.approx(70 / 90, abs=1e-4)
    assert entry["cosine"]["mean"] is None and entry["spearman"]["mean"] is None
