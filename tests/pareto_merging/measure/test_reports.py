"""What a comparison or an evaluation leaves behind: tables that agree with the JSON, and pictures."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pareto_merging.measure.evaluation import Scores
from pareto_merging.measure.metrics import indicators
from pareto_merging.measure.reports import (
    COLUMNS,
    Evaluation,
    Report,
    head,
    markdown_table,
    summary_rows,
    write_comparison,
    write_evaluation,
)
from pareto_merging.measure.results import Result
from pareto_merging.measure.summary import summarize

TASKS = ["a | b", "c, d"]


def result(method: str, title: str, points: list[Any], seed: int = 0, **more: Any) -> Result:
    """``points``: (kinds, γ or None, accuracies)."""
    return Result.from_json(
        {
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
    )


def unseen(accuracy: float) -> dict[str, Any]:
    return {"e": {"accuracy": accuracy, "entropy": 0.5, "gamma": None}}


def results() -> list[Result]:
    front = [
        (["equal", "priority:a | b", "priority:c, d"], [0.5, 0.5], [60.0, 61.0]),
        (["one-hot:a | b"], [1.0, 0.0], [80.0, 30.0]),
        (["one-hot:c, d"], [0.0, 1.0], [31.0, 82.0]),
    ]
    bound = [(kinds, gamma, [95.0, 96.0]) for kinds, gamma, _ in front[1:]]
    return [
        result("individual", "Individual", bound, is_bound=True, unseen=unseen(40.0)),
        result("weight-averaging", "Weight averaging", [(["equal"], None, [65.0, 66.0])], unseen=unseen(5)),
        result("weight-averaging", "Weight averaging", [(["equal"], None, [67.0, 68.0])], 1, unseen=unseen(6)),
        result("pareto", "Pareto Merging", front, unseen=unseen(50.0)),
        result("ties", "TIES-Merging", points=[("", None, [])], status="failed", reason="NaN | inf"),
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
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("reports")
    return folder, write_comparison(folder, TASKS, results(), {"settings": {"effort": 1}})


def test_json_is_strict_and_whole(written: tuple[Path, Report]) -> None:
    folder, report = written

    def refuse(name: str) -> None:
        raise AssertionError(name)

    stored = json.loads((folder / "compare.json").read_text(), parse_constant=refuse)
    assert stored == report.to_json()
    assert stored["methods"] == {key: entry.to_json() for key, entry in summarize(results()).items()}
    assert stored["choices"]["weight-averaging"] == {"0": {"coefficient": 0.3}, "1": {"coefficient": 0.3}}
    assert stored["settings"] == {"effort": 1}
    assert stored["reference_point"] == [10.0, 12.5]


def test_markdown_says_what_the_json_says(written: tuple[Path, Report]) -> None:
    folder, report = written
    text = (folder / "compare.md").read_text()
    methods, tasks, unseen = parsed(text)
    assert methods[0] == head()
    assert all(len(row) == len(head()) for row in methods)
    by_title = {row[0]: row for row in methods[1:]}
    assert list(by_title) == ["Individual", "Weight averaging", "Pareto Merging", "TIES-Merging"]
    for number, (key, _, factor, digits) in enumerate(COLUMNS, start=3):
        spread = report.methods["pareto"].figures[key]
        expected = "–" if spread.mean is None else f"{factor * spread.mean:.{digits}f}"
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
    for line in report.answer:
        assert f"- {line}" in text


def test_csv_says_what_the_results_say(written: tuple[Path, Report]) -> None:
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
        assert list(csv.reader(stream)) == [head(), *summary_rows(report.methods)]


def test_pictures_are_there(written: tuple[Path, Report]) -> None:
    folder, _ = written
    named = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "compare.md").read_text())
    assert named == ["front.png"]
    with Image.open(folder / named[0]) as picture:
        assert picture.width > 600
    assert {p.name for p in folder.iterdir()} == {"compare.json", "compare.md", "methods.csv", "points.csv", *named}


def test_nothing_worked(tmp_path: Path) -> None:
    rows = [r for r in results() if r.status == "failed"]
    report = write_comparison(tmp_path, TASKS, rows, {})
    assert (report.reference_point, report.answer, report.evaluated_tasks) == (None, [], TASKS)
    text = (tmp_path / "compare.md").read_text()
    assert "- TIES-Merging: NaN | inf" in text
    assert parsed(text) == []


def test_only_bounds(tmp_path: Path) -> None:
    rows = results()[:1]
    report = write_comparison(tmp_path, TASKS, rows, {})
    assert report.answer == []
    assert "![" not in (tmp_path / "compare.md").read_text()


def test_a_bar_in_a_cell_is_escaped() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


def evaluation(tasks: list[str], scores: list[Scores]) -> Evaluation:
    points = [list(score.accuracy.values()) for score in scores]
    indicated = indicators(points, [10.0] * len(points[0]))
    return Evaluation("a run", tasks, [[0.25, 0.75], [1, 0]], scores, indicated)


def test_an_evaluation_in_files(tmp_path: Path) -> None:
    scores = [
        Scores({"a": 50.0, "b": 75.5}, {"a": 0.5, "b": 0.25}, {"a": 0.0, "b": 0.0}),
        Scores({"a": 90.0, "b": 20}, {"a": 0, "b": 1}, {"a": 0.0, "b": 0.0}),
    ]
    written = write_evaluation(tmp_path, evaluation(["a", "b"], scores))
    assert [path.name for path in written] == ["evaluation.json", "evaluation.csv", "evaluation.md", "front.png"]
    with (tmp_path / "evaluation.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["gamma a", "gamma b", "accuracy a", "accuracy b", "average", "entropy a", "entropy b"]
    assert table[1] == ["0.25", "0.75", "50", "75.5", "62.75", "0.5", "0.25"]
    assert parsed((tmp_path / "evaluation.md").read_text()) == [table]
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["gamma"] for row in stored["results"]] == [[0.25, 0.75], [1, 0]]
    assert stored["results"][0]["average"] == 62.75 and stored["indicators"]["points"] == 2
    only = [Scores({"b": score.accuracy["b"]}, {"b": 0.5}, {"b": 0.0}) for score in scores]
    assert len(write_evaluation(tmp_path, evaluation(["a", "b"], only))) == 3
