"""The command: a rehearsal killed again and again, and what wrong arguments say."""

import importlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common.pages import NOT_MEASURED
from benchmarks.goals import cli, table, worker
from benchmarks.goals.cli import GROUPS, NAMES

ROOT = Path(__file__).parents[3]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.goals", *arguments]


@pytest.mark.slow
def test_a_rehearsal_killed_at_any_moment_is_gone_on_from(tmp_path: Path) -> None:
    """Killed when it has so many units: the file is valid each time and nothing is measured twice."""
    out, rng = tmp_path / "goals.json", random.Random(0)
    only = ["--quick", "--minutes", "60", "--only", "correctness"]
    seconds: dict[str, float] = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
        arguments = [*only, "--resume", str(out)] if out.exists() else [*only, "--out", str(out)]
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if number is not None:
            enough = len(seconds) + rng.randint(1, 4)
            while not out.exists() or len(json.loads(out.read_text())["units"]) < enough:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
        said, errors = process.communicate()
        data = json.loads(out.read_text())
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 0}[number], errors
        begun = {*data["units"], *data["not_reached"], *([data["running"]["unit"]] if data["running"] else ())}
        assert {row["unit"] for row in data["rows"]} <= begun
        kept = {key: unit["seconds"] for key, unit in data["units"].items()}
        assert seconds.items() <= kept.items(), "what was measured stays"
        seconds = kept
    assert data["ended"] == "complete" and data["running"] is None and len(data["runs"]) == 4
    assert [row for row in data["rows"] if not row["matched"]] == []
    assert sum(key.startswith("correctness/") for key in data["units"]) == 15
    lines = said.splitlines()
    assert lines[0] == f"results go to {out}"
    for name in ("GPU", "driver", "torch", "Triton", "triton_key", "clocks"):
        assert any(line.startswith(name) for line in lines[1:8]), name
    assert data["environment"]["triton_key"] == worker.triton_key() and len(worker.triton_key() or "") == 16
    assert lines[-1] == str(out) and "a rehearsal: none of these figures is a measurement" in lines
    goals = [line for line in lines if line.endswith(NOT_MEASURED)]
    assert len(goals) == len(data["goals"]) == len(table.goals(data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "goals.json"
    done = subprocess.run(command("--out", str(out)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "goals: expected a CUDA GPU that torch sees, got none (--quick rehearses on the CPU)" in done.stderr
    assert not out.exists(), "nothing was measured, so there is no result"


def test_another_cards_figures_are_not_gone_on_from(tmp_path: Path) -> None:
    out = tmp_path / "goals.json"
    arguments = ["--quick", "--only", "ceilings", "--minutes", "30"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    data["environment"]["gpu"] = "NVIDIA H200"
    out.write_text(json.dumps(data))
    before = data["rows"]
    assert cli.main([*arguments, "--resume", str(out)]) == 2
    assert json.loads(out.read_text())["rows"] == before, "and nothing is lost"


def test_wrong_arguments_say_what_was_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "goals.json"
    assert cli.main(["--quick", "--resume", str(out)]) == 2
    assert f"goals: {out}: expected a results file, got No such file" in capsys.readouterr().err
    out.write_text("{")
    assert cli.main(["--quick", "--resume", str(out)]) == 2
    assert "expected JSON" in capsys.readouterr().err and out.read_text() == "{"
    for more in ([], ["--resume", str(tmp_path / "other.json")]):
        assert cli.main(["--quick", "--out", str(out), *more]) == 2
        assert f"{out}: --out: expected a new file" in capsys.readouterr().err and out.read_text() == "{"
    for wrong in (["--minutes", "0"], ["--minutes", "nan"], ["--only", "kernels"]):
        with pytest.raises(SystemExit) as exit_:
            cli.parse(wrong)
        assert exit_.value.code == 2
    assert "--minutes: expected more than 0 and at most a day, got 0" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    text = capsys.readouterr().out
    for expected in ("exit codes:", "--resume", "SIGTERM: 143", *NAMES):
        assert expected in text


def test_every_groups_function_is_there() -> None:
    for group in GROUPS:
        module, _, name = group.function.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.goals.{module}"), name)), group.name
