"""Results files that are whole after every row."""

import json
from pathlib import Path

import pytest

from benchmarks.common.record import DONE, LACKING, Record, RecordError, write_json

HEADER = {"suite": "made-up", "command": "c", "commit": "abc", "date": "2026-01-02", "quick": False}
WHERE = {"gpu": "A", "driver": "1", "torch": "2", "triton": "3", "triton_key": "k", "quick": False}


def made(path: Path) -> Record:
    record = Record.new(path, HEADER)
    record.identify(WHERE)
    record.begin("group/one", 10.0, 1.0)
    record.add("group/one", {"variant": "a", "ms": 1.0, "matched": True})
    record.close("group/one", 0.5)
    record.begin("group/two", 10.0, 3.0)
    return record


def test_a_file_is_there_after_every_step_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    record = made(path)
    data = json.loads(path.read_text())
    assert data["running"] == {"unit": "group/two", "since": 3.0, "limit": 10.0}
    assert data["units"] == {"group/one": {"state": DONE, "seconds": 0.5}}
    assert data["rows"] == [{"unit": "group/one", "variant": "a", "ms": 1.0, "matched": True}]
    for variant, rows in (("b", 2), ("c", 3)):
        record.add("group/two", {"variant": variant, "ms": 2.0, "matched": variant == "c"})
        data = json.loads(path.read_text())
        assert len(data["rows"]) == rows and data["running"]["unit"] == "group/two" and len(data["units"]) == 1
    record.close("group/two", 0.25)
    assert json.loads(path.read_text())["running"] is None
    assert [row["variant"] for row in record.wrong] == ["b"]
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_going_on_forgets_how_it_ended_and_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record = made(path)
    record.missed("group/three")
    record.begin("group/lacking", 10.0, 2.0)
    record.add("group/lacking", {"variant": "all", "matched": True})
    record.close("group/lacking", 0.0, LACKING)
    record.begin("group/two", 10.0, 3.0)
    record.add("group/two", {"variant": "b", "ms": 2.0, "matched": True})
    again = Record.read(path, "made-up")
    assert again.data["running"]["unit"] == "group/two" and again.data["not_reached"] == ["group/three"]
    again.resume()
    assert again.data["running"] is None and again.data["not_reached"] == []
    assert list(again.data["units"]) == ["group/one"]
    assert [row["unit"] for row in again.data["rows"]] == ["group/one"], "what was under way is measured again, whole"
    again.identify(WHERE)


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "triton", "triton_key", "quick"])
def test_figures_of_two_places_do_not_meet(tmp_path: Path, name: str) -> None:
    made(tmp_path / "results.json")
    record = Record.read(tmp_path / "results.json", "made-up")
    with pytest.raises(RecordError, match=f"{name}: expected 'another', as here, got"):
        record.identify({**WHERE, name: "another"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a results file, got No such file"),
        ('{"suite": "made-', "expected JSON, got"),
        ("[]", "expected a results file of the suite 'made-up', got 'list'"),
        ('{"suite": "digits"}', "expected a results file of the suite 'made-up', got 'digits'"),
        ('{"suite": "made-up", "units": []}', "units: expected a dict, got list"),
        ('{"suite": "made-up", "units": {}}', "rows: expected a list, got NoneType"),
    ],
)
def test_what_is_no_record_says_so(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=message):
        Record.read(path, "made-up")
