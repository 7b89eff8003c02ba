"""The process that measures."""

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import Record
from benchmarks.common.session import Session
from benchmarks.goals import worker
from benchmarks.goals.cli import SUITE, Group


def test_a_group_that_needs_what_is_not_installed_is_passed_over(tmp_path: Path) -> None:

    session = Session(Record.new(tmp_path / "goals.json", {"suite": SUITE}), say=lambda line: None)
    groups = [Group("first", "", 1, "missing:measure"), Group("second", "", 1, "there:measure")]

    def load(name: str) -> Any:
        if name == "missing":
            raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

        class There:
            @staticmethod
            def measure(context: Any) -> None:
                session.measure("second/one", lambda: [{"variant": "a", "ms": 1.0, "matched": True}], 1.0)

        return There

    worker.measure_groups(session, groups, None, load)
    first, second = session.record.data["rows"]
    assert first["reason"] == "not measured, for want of pydantic" and first["matched"]
    assert second["unit"] == "second/one"


def test_the_environment_of_a_run_says_which_compiler() -> None:
    lines = worker.first_lines(
        {
            "gpu": None,
            "cpu": "a processor",
            "torch": "2",
            "python": "3",
            "triton": "3.6",
            "triton_key": "k",
            "quick": True,
        },
        {"clocks.sm": "1980 MHz", "pstate": None},
    )
    assert "triton_key   k" in lines and "clocks       clocks.sm 1980 MHz" in lines
    assert os.environ.get("TRITON_INTERPRET") or torch.cuda.is_available()
