"""What a comparison leaves behind: tables that agree with the JSON, pictures, and an answer in words."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pareto_merging.measure.comparison import summarize
from pareto_merging.measure.reports import (
    COLUMNS,
    answer,
    cell,
    head,
    markdown_table,
    summary_rows,
    write_comparison,
    write_evaluation,
)

TASKS = ["a | b", "c, d"]


def result(method: str, title: str, points: list[Any], seed: int = 0, **more: Any) -> dict[str, Any]:
    """``points``: (kinds, γ or None, accuracies)."""
    return {
        "method": method,
        "title": title,
        "seed": seed,
        "is_bound": False,
        "tasks": TASKS,
        "reference_point": [10.0, 12.5],
        "status": "done",
        "preference_aware": points[0][1] is not None,
        "choice": {"coefficient": 0.3},
        "seconds": 1.25,
        "tuning_seconds": 2.0,
        "peak_bytes": 3,
        "points": [{"kinds": k, "gamma": g, "accuracy": a, "entropy": [0.125, 0.25]} for k, g, a in points],
        **more,
    }


def results() -> list[dict[str, Any]]:
    front = [
        (["equal", "priority:a | b", "priority:c, d"], [0.5, 0.5], [60.0, 61.0]),
        (["one-hot:a | b"], [1.0, 0.0], [80.0, 30.0]),
        (["one-hot:c, d"], [0.0, 1.0], [31.0, 82.0]),
    ]
    bound = [(kinds, gamma, [95.0, 96.0]) for kinds, gamma, _ in front[1:]]
    failed = {"method": "ties", "title": "TIES-Merging", "seed": 0, "is_bound": False, "status": "failed"}
    return [
        result("individual", "Individual", bound, is_bound=True, unseen={"e": {"accuracy": 40.0}}),
        result(
            "weight-averaging", "Weight averaging", [(["equal"], None, [65.0, 66.0])], unseen={"e": {"accuracy": 5}}
        ),
        result(
            "weight-averaging", "Weight averaging", [(["equal"], None, [67.0, 68.0])], 1, unseen={"e": {"accuracy": 6}}
        ),
        result("pareto", "Pareto Merging", front, unseen={"e": {"accuracy": 50.0}}),
        {**failed, "reason": "NaN | inf"},
    ]


def parsed(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of cells, the rule left out."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [[row for number, row in enumerate(table) if number != 1] for table in tables if table]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reports")
    return folder, write_comparison(folder, TASKS, results(), {"settings": {"effort": 1}})


def test_json_is_strict_and_whole(written: tuple[Path, dict[str, Any]]) -> None:
    folder, report = written

    def refuse(name: str) -> None:
        raise AssertionError(name)

    stored = json.loads((folder / "compare.json").read_text(), parse_constant=refuse)
    assert stored == report
    assert stored["methods"] == json.loads(json.dumps(summarize(results())))
    assert stored["choices"]["weight-averaging"] == {"0": {"coefficient": 0.3}, "1": {"coefficient": 0.3}}
    assert stored["settings"] == {"effort": 1}
    assert stored["reference_point"] == [10.0, 12.5]


def test_markdown_says_what_the_json_says(written: tuple[Path, dict[str, Any]]) -> None:
    folder, report = written
    text = (folder / "compare.md").read_text()
    methods, tasks, unseen = parsed(text)
    assert methods[0] == head()
    assert all(len(row) == len(head()) for row in methods)
    by_title = {row[0]: row for row in methods[1:]}
    assert list(by_title) == ["Individual", "Weight averaging", "Pareto Merging", "TIES-Merging"]
    for number, (key, _, factor, digits) in enumerate(COLUMNS, start=3):
        spread = report["methods"]["pareto"][key]
        expected = "–" if spread["mean"] is None else f"{factor * spread['mean']:.{digits}f}"
        assert by_title["Pareto Merging"][number] == expected, key
    assert by_title["Weight averaging"][:4] == ["Weight averaging", "weights", "1 model", "66.5 ± 1.4"]
    assert by_title["TIES-Merging"][3:] == ["failed", *[""] * (len(COLUMNS) - 1)]
    assert tasks[0] == ["method", *TASKS]
    assert ["Individual", "95.0", "96.0"] in tasks and ["Pareto Merging", "60.0", "61.0"] in tasks
    assert unseen == [
        ["method", "e (%)"],
        ["Individual", "40.0"],
        ["Weight averaging", "5.5 ± 0.7"],
        ["Pareto Merging", "50.0"],
    ]
    assert "Reference point: 10, 12.5 % (chance)" in text
    assert "- TIES-Merging: NaN | inf" in text
    for line in report["answer"]:
        assert f"- {line}" in text


def test_csv_says_what_the_results_say(written: tuple[Path, dict[str, Any]]) -> None:
    folder, report = written
    with (folder / "points.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("method", "seed", "kind", "gamma a | b", "gamma c, d"),
        *("accuracy a | b", "accuracy c, d", "entropy a | b", "entropy c, d"),
    ]
    assert len(rows) == 2 + 1 + 1 + 3
    single = next(row for row in rows if row["method"] == "weight-averaging")
    assert (single["gamma a | b"], single["accuracy c, d"], single["entropy c, d"]) == ("", "66.0", "0.25")
    assert [float(row["accuracy a | b"]) for row in rows if row["method"] == "pareto"] == [60, 80, 31]
    with (folder / "methods.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [head(), *summary_rows(report["methods"])]


def test_pictures_are_there(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    named = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "compare.md").read_text())
    assert named == ["front.png"]
    with Image.open(folder / named[0]) as picture:
        assert picture.width > 600
    assert {p.name for p in folder.iterdir()} == {"compare.json", "compare.md", "methods.csv", "points.csv", *named}


def test_nothing_worked(tmp_path: Path) -> None:
    rows = [r for r in results() if r["status"] == "failed"]
    report = write_comparison(tmp_path, TASKS, rows, {})
    assert (report["reference_point"], report["answer"], report["evaluated_tasks"]) == (None, [], TASKS)
    text = (tmp_path / "compare.md").read_text()
    assert "- TIES-Merging: NaN | inf" in text
    assert parsed(text) == []


def test_only_bounds(tmp_path: Path) -> None:
    rows = results()[:1]
    report = write_comparison(tmp_path, TASKS, rows, {})
    assert report["answer"] == []
    assert "![" not in (tmp_path / "compare.md").read_text()


def test_cells() -> None:
    assert cell(None) == cell({"mean": None, "sd": None, "values": [None]}) == "–"
    assert cell({"mean": 0.5, "sd": None, "values": [0.5]}, 100) == "50.0"
    assert cell({"mean": 3.0, "sd": 0.5, "values": [3]}, 1, 0) == "3 ± 0.5"
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


# the answer


def summary(**methods: dict[str, Any]) -> dict[str, Any]:
    """``equal``, ``one_hot`` and ``hypervolume`` by method name; those with the last two follow preferences."""
    found = {}
    for name, figures in methods.items():
        spreads = {key: {"mean": v, "sd": None, "values": [v]} for key, v in figures.items() if key != "is_bound"}
        aware = "one_hot" in figures
        more = {"is_bound": figures.get("is_bound", False), "seeds": 1, "preference_aware": aware}
        found[name] = {"title": name, "per_task": {"a": {}, "b": {}}, **more, **spreads}
    return found


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
    failed = {"ties": {"title": "TIES", "is_bound": False, "seeds": 0, "failed": True, "reasons": ["NaN"]}}
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


# evaluations


def test_an_evaluation_in_files(tmp_path: Path) -> None:
    rows = [
        ([0.25, 0.75], {"a": 50.0, "b": 75.5}, {"a": 0.5, "b": 0.25}),
        ([1, 0], {"a": 90.0, "b": 20}, {"a": 0, "b": 1}),
    ]
    assert write_evaluation(tmp_path, ["a", "b"], ["a", "b"], rows) == [tmp_path / "front.png"]
    with (tmp_path / "evaluation.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["gamma a", "gamma b", "accuracy a", "accuracy b", "average", "entropy a", "entropy b"]
    assert table[1] == ["0.25", "0.75", "50", "75.5", "62.75", "0.5", "0.25"]
    assert parsed((tmp_path / "evaluation.md").read_text()) == [table]
    only = [(gamma, {"b": accuracy["b"]}, {"b": 0.5}) for gamma, accuracy, _ in rows]
    assert write_evaluation(tmp_path, ["a", "b"], ["b"], only) == []
