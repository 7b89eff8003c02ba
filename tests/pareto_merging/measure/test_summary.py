"""A comparison's figures, by hand, and the answer in words."""

import json
import math
from typing import Any

import pytest

from pareto_merging.measure.metrics import Spread
from pareto_merging.measure.results import Result
from pareto_merging.measure.summary import MethodSummary, answer, cell, summarize


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
    about: dict[str, Any] = {
        "title": "B",
        "seed": 0,
        "is_bound": False,
        "tasks": ["a", "b"],
        "reference_point": [1.0, 2.0],
    }
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


def test_cells() -> None:
    assert cell(None) == cell(Spread(None, None, [None])) == "–"
    assert cell(Spread(0.5, None, [0.5]), 100) == "50.0"
    assert cell(Spread(3.0, 0.5, [3]), 1, 0) == "3 ± 0.5"


def summary(**methods: dict[str, Any]) -> dict[str, MethodSummary]:
    """``equal``, ``one_hot`` and ``hypervolume`` by method name; those with the last two follow preferences."""
    nothing = Spread(None, None, [])
    return {
        name: MethodSummary(
            name,
            is_bound=figures.get("is_bound", False),
            seeds=1,
            preference_aware="one_hot" in figures,
            figures={key: Spread(mean, None, [mean]) for key, mean in figures.items() if key != "is_bound"},
            per_task={"a": nothing, "b": nothing},
        )
        for name, figures in methods.items()
    }


def test_the_answer_names_the_best_of_each_kind() -> None:
    weights = {"pretrained": {"equal": 30.0}, "dare": {"equal": 70.0}, "ties": {"equal": 60.0}}
    aware = {
        "pareto": {"equal": 80.0, "one_hot": 82.0, "hypervolume": 0.5},
        "pareto++": {"equal": 75.0, "one_hot": 90.0, "hypervolume": 0.4},
    }
    bound = {"individual": {"equal": 99.0, "one_hot": 99.0, "hypervolume": 0.9, "is_bound": True}}
    assert answer(summary(**weights, **aware, **bound)) == [
        "One model for everybody: pareto (80.0 %) has the highest average accuracy.",
        "From the weights alone: dare (70.0 %).",
        "A model per preference: pareto (50.0 %) dominates the largest volume.",
        "Each user caring for one task alone: pareto++ (90.0 %) at one-hot preferences.",
    ]
    assert answer(summary(**weights)) == ["One model for everybody: dare (70.0 %) has the highest average accuracy."]
    assert answer(summary(**bound)) == []
    failed = {"ties": MethodSummary("TIES", is_bound=False, seeds=0, reasons=["NaN"], failed=True)}
    assert answer(failed) == []
    assert answer({**summary(dare={"equal": 1.0}), **failed})[0].startswith("One model for everybody: dare (1.0 %)")


def test_the_answer_says_what_must_be_kept() -> None:
    aware = {
        "task-arithmetic-preference": {"equal": 70.0, "one_hot": 94.0, "hypervolume": 0.6},
        "pareto": {"equal": 80.0, "one_hot": 82.0, "hypervolume": 0.5},
        "pareto++": {"equal": 75.0, "one_hot": 90.0, "hypervolume": 0.4},
    }
    lines = answer(summary(**aware))
    assert lines[2:] == [
        "A model per preference: task-arithmetic-preference (60.0 %) dominates the largest volume.",
        "It keeps all models; of those that keep one: pareto (50.0 %).",
    ]
    larger = {"regmean": {"equal": 79.0, "hypervolume": 0.7}}
    line = "Yet regmean (70.0 %), one model for every preference, dominates more."
    assert answer(summary(pareto=aware["pareto"], **larger))[2] == line
    # one model may dominate more than a set does
    single = {"regmean": {"equal": 79.0, "hypervolume": 0.55}}
    assert answer(summary(**aware, **single))[3] == "It keeps all models; of those that keep one: regmean (55.0 %)."
    assert len(answer(summary(**{"task-arithmetic-preference": aware["task-arithmetic-preference"]}))) == 2


def test_the_answer_says_what_is_level() -> None:
    level = {name: {"equal": 70.0} for name in ("dare", "ties", "regmean")}
    assert answer(summary(**level)) == [
        "One model for everybody: dare (70.0 %) has the highest average accuracy (as do ties, regmean)."
    ]
    level = {name: {"equal": 70.0} for name in "abcdef"}
    assert answer(summary(**level))[0].endswith("(as do b, c, d and 2 more).")
    aware = {name: {"equal": e, "one_hot": 80.0, "hypervolume": 0.5} for name, e in (("pareto", 1), ("x", 2))}
    assert answer(summary(**aware)) == [
        "One model for everybody: x (2.0 %) has the highest average accuracy.",
        "A model per preference: pareto (50.0 %) dominates the largest volume (as does x).",
    ]


def test_the_answer_without_a_volume() -> None:
    aware = {"pareto": {"equal": 80.0, "one_hot": 82.0, "hypervolume": None}}
    assert answer(summary(**aware))[1:] == [
        "Each user caring for one task alone: pareto (82.0 %) at one-hot preferences."
    ]
