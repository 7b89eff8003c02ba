"""Measuring unit by unit, with a clock that the tests set."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.record import LACKING, Record
from benchmarks.common.session import FAILED, Lost, Once, Session, chosen

RIGHT = {"variant": "a", "ms": 1.0, "matched": True}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def session(tmp_path: Path, clock: Clock) -> Session:
    record = Record.new(tmp_path / "results.json", {"suite": "made-up"})
    return Session(record, 110.0, clock, say=lambda line: None)


def test_a_unit_is_measured_once(session: Session) -> None:
    calls: list[int] = []

    def rows() -> list[dict[str, Any]]:
        calls.append(1)
        # what is under way stands in the file
        assert json.loads(session.record.path.read_text())["running"]["unit"] == "group/one"
        return [RIGHT]

    for _ in range(2):
        session.measure("group/one", rows, 1.0)
    assert len(calls) == 1
    again = Session(Record.read(session.record.path, "made-up"), say=lambda line: None)
    again.measure("group/one", rows, 1.0)
    assert len(calls) == 1


def test_rows_are_saved_as_they_come_and_stay_when_the_next_fails(session: Session) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield RIGHT
        (saved,) = json.loads(session.record.path.read_text())["rows"]
        assert saved == {"unit": "group/one", **RIGHT}
        yield {**RIGHT, "variant": "b"}
        raise ValueError("the third")

    session.measure("group/one", rows, 1.0)
    found = json.loads(session.record.path.read_text())
    assert [(row["variant"], row["matched"]) for row in found["rows"]] == [("a", True), ("b", True), ("all", False)]
    assert found["rows"][2]["reason"] == "ValueError: the third" and found["running"] is None


def test_what_takes_longer_than_there_is_time_is_not_begun(session: Session, clock: Clock) -> None:
    session.measure("group/long", lambda: pytest.fail("it was begun"), 10.5)
    session.measure("group/short", lambda: [RIGHT], 10.0)
    clock.now = 109.5
    session.measure("group/late", lambda: pytest.fail("it was begun"), 1.0)
    assert session.record.data["not_reached"] == ["group/long", "group/late"]
    assert list(session.record.data["units"]) == ["group/short"]


def test_only_what_is_asked_for_is_measured(session: Session) -> None:
    session.wanted = chosen(["first"])
    session.measure("second/one", lambda: pytest.fail("it was not asked for"), 1.0)
    session.measure("first/one", lambda: [RIGHT], 1.0)
    assert list(session.record.data["units"]) == ["first/one"] and session.record.data["not_reached"] == []


def test_memory_that_ends_is_a_result_and_any_other_error_is_wrong(session: Session) -> None:
    def fails(error: Exception) -> Any:
        raise error

    session.measure("group/memory", lambda: fails(torch.cuda.OutOfMemoryError("CUDA out of memory")), 1.0)
    session.measure("group/error", lambda: fails(ValueError("x: expected\n a b")), 1.0)
    session.lacks("group/lacking", ImportError("expected timm or torchvision, got none"))
    session.measure("group/import", lambda: fails(ModuleNotFoundError("No module", name="open_clip.model")), 1.0)
    session.measure("group/ours", lambda: fails(ImportError("cannot import name", name="pmkernels.ops")), 1.0)
    session.measure("group/after", lambda: [RIGHT], 1.0)
    memory, error, lacking, missing, ours, after = session.record.data["rows"]
    assert (missing["matched"], missing["reason"]) == (True, "not measured, for want of open_clip.model")
    assert (ours["matched"], ours["reason"]) == (False, "ImportError: cannot import name")
    assert (memory["matched"], memory["reason"]) == (True, "out of memory")
    assert (error["matched"], error["reason"]) == (False, "ValueError: x: expected a b")
    assert (lacking["matched"], lacking["reason"]) == (True, "not measured: expected timm or torchvision, got none")
    assert session.record.data["units"]["group/lacking"]["state"] == LACKING
    assert after["ms"] == 1.0 and [row["unit"] for row in session.record.wrong] == ["group/error", "group/ours"]


def test_a_gpu_that_does_not_answer_ends_the_session(session: Session) -> None:
    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    session.synchronize = gone
    with pytest.raises(Lost, match="illegal memory access"):
        session.measure("group/bad", lambda: gone() or [], 1.0)
    data = json.loads(session.record.path.read_text())
    assert list(data["units"]) == ["group/bad"], "it is not tried again"
    assert data["rows"][0]["matched"] is False and "illegal memory access" in data["rows"][0]["reason"]


def test_figures_that_are_not_finite_can_be_written(session: Session) -> None:
    @dataclass
    class Row:
        error: float
        other: float
        matched: bool = False

    session.measure("group/one", lambda: [Row(math.nan, -math.inf)], 1.0)
    (row,) = json.loads(session.record.path.read_text())["rows"]
    assert row["error"] == row["other"] == FAILED


def test_a_failed_beginning_is_not_made_again() -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no")
        return 7

    once = Once(make)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            once()
    assert len(calls) == 1
    once.drop()
    assert (once(), once(), len(calls)) == (7, 7, 2)
