"""The command line in the process of the tests."""

import pytest

from pareto_merging.cli import main


def run(*arguments: object) -> int:
    """The exit code of ``pareto-merging ARGUMENTS``."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a mistake has written: one line on standard error and nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pareto-merging: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err
