"""The benchmark command: what it saves, and how it ends."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.suites import layers


def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        run.main(["--suite", "kernels"])


def test_rows_are_saved_as_they_come_and_a_time_limit_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers.json"
    seen: list[int] = []
    measured = layers.points

    def watched(*arguments: Any) -> Any:
        seen.append(len(json.loads(out.read_text())["suites"]["layers"]["rows"]) if out.exists() else 0)
        return measured(*arguments)

    monkeypatch.setattr(layers, "points", watched)
    assert run.main(["--suite", "layers", "--quick", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ended"] == "complete"
    assert seen[0] == 0 and sorted(set(seen)) == seen, "the file has every point before the next one begins"
    # so little time that the first row is the last
    assert run.main(["--suite", "layers", "--quick", "--minutes", "1e-9", "--out", str(out)]) == run.EXIT_TIME
    report = json.loads(out.read_text())
    assert report["ended"] == "time limit" and len(report["suites"]["layers"]["rows"]) == 1 < seen[1]
    assert "ended by time limit" in capsys.readouterr().out


def test_a_signal_ends_a_run_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "layers.json"
    measured = layers.points
    calls: list[int] = []

    def ended(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(*arguments)

    monkeypatch.setattr(layers, "points", ended)
    before = signal.getsignal(signal.SIGTERM)
    assert run.main(["--suite", "layers", "--quick", "--out", str(out)]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    report = json.loads(out.read_text())
    assert report["ended"] == "signal SIGTERM"
    assert len({(row["op"], row["rows"]) for row in report["suites"]["layers"]["rows"]}) == 2
