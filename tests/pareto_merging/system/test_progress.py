"""Progress says where it is and how long is left, on a terminal or not."""

import pytest

from pareto_merging.system import progress


def test_plain_lines_with_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("learning", 100, done=20) as advance:
        for step in range(21, 61):
            now[0] += 1.0
            advance(step, "loss 0.5")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "learning 30/100, 70 s left  loss 0.5"
    assert lines[-1] == "learning 60/100, 40 s left  loss 0.5"
    assert len(lines) == 4


def test_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("learning", 2, enabled=False) as advance:
        advance(1, "x")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.progress_bar("learning", 3) as advance:
        for step in (1, 2, 3):
            advance(step, f"loss 0.{step}")
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "loss 0.3" in text
    assert "left" in text
