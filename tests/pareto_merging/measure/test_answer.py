"""The answer in words."""

from typing import Any

from pareto_merging.measure.answer import answer, cell
from pareto_merging.measure.metrics import Spread
from pareto_merging.measure.summary import MethodSummary


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
