"""The command line as a whole: it starts at once, teaches, and answers a mistake with one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import one_line, run
from support.run_folders import write_config

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.registry import METHODS

HEAVY = ("torch", "triton", "numpy", "scipy", "sklearn", "matplotlib", "pymoo", "moocore", "open_clip", "fastapi")


COMMANDS = ["", "demo", "train", "evaluate", "compare", "convert", "export", "plan", "serve"]


def measured(arguments: list[str]) -> tuple[set[str], float]:
    """Return the heavy modules that a fresh process loads, and its seconds of CPU time."""
    code = (
        "import json, os, sys\n"
        "import pareto_merging.cli\n"
        "sys.argv = ['pareto-merging', *sys.argv[1:]]\n"
        "try:\n    len(sys.argv) == 1 or pareto_merging.cli.main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps([[*sys.modules], sum(os.times()[:2])]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    modules, seconds = json.loads(done.stderr)
    return set(HEAVY) & set(modules), seconds


def test_importing_it_loads_nothing_that_computes() -> None:
    assert measured([])[0] == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    heavy, seconds = measured([*filter(None, [command]), "--help"])
    assert heavy == set()
    # 0.3 on an idle machine; PyTorch alone takes two
    assert seconds < 1


def test_mistakes_are_one_line_and_exit_code_2(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml")
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("train", tmp_path / "none.yaml", "--out", out), "none.yaml"),
        (("train", config, "--out", finished), str(finished)),
        (("train", config, "--out", out, "--resume"), "no such folder"),
        (("train", config), "--out"),
        (("train", write_config(tmp_path / "bad1.yaml", methods={}), "--out", out), "unknown key methods"),
        (("train", write_config(tmp_path / "bad2.yaml", tasks=["sideways"]), "--out", out), "sideways"),
        (("train", write_config(tmp_path / "bad3.yaml", device="tpu"), "--out", out), "device"),
        (("evaluate", tmp_path / "none"), "none"),
        (("evaluate", tmp_path), "config.yaml"),
        (("evaluate", finished, "--preferences", "0.5,0.6"), "expected a sum of 1, got 1.1"),
        (("evaluate", finished, "--preferences", "0.5"), "expected shape [2]"),
        (("evaluate", finished, "--preferences", "a,b"), "a,b"),
        (("evaluate", finished, "--preferences", "SVHN=1"), "SVHN"),
        (("evaluate", finished, "--preferences", "grid:1"), "grid:1"),
        (("evaluate", finished, "--preferences", ";"), "at least one"),
        (("evaluate", finished, "--preference", "1,0"), "No such option"),
        (("export", finished), "either --preference or --folded"),
        (("export", finished, "--folded", "--preference", "1,0"), "either --preference or --folded"),
        (("export", finished, "--preference", "1,1", "--out", out / "a.safetensors"), "expected a sum of 1"),
        (("export", finished, "--folded", "--out", tmp_path / "a.pt"), "ends in .safetensors"),
        (("export", finished, "--folded", "--out", finished / "pareto_set.safetensors"), "existing file"),
        (("plan", tmp_path / "none.yaml"), "none.yaml"),
        (("demo", "--out", finished), "existing folder"),
        (("demo", "--out", finished, "--overwrite"), "expected an earlier demo to replace"),
        (("nonsense",), "nonsense"),
    ]
    before = sorted(str(path) for path in finished.parent.rglob("*"))
    capsys.readouterr()
    for arguments, expected in cases:
        assert run(*arguments) == 2, arguments
        assert expected in one_line(capsys), arguments
        assert not out.exists(), arguments
    assert sorted(str(path) for path in finished.parent.rglob("*")) == before


@pytest.mark.parametrize("command", ["", "demo", "train", "evaluate", "compare", "export", "plan"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*filter(None, [command, "--help"])) == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    if command == "train":
        assert all(name in text for name in MethodSettings.model_fields)
        assert "smooth-tchebycheff, tchebycheff, linear" in " ".join(text.split())
    if command == "compare":
        assert "--list" in text
        assert " ".join(text.partition("Methods: ")[2].split()) == f"{', '.join(METHODS)}."
    if command:
        assert "--" in text
    else:
        assert all(name in text for name in ("demo", "train", "evaluate", "compare", "export", "plan"))


def test_a_terminal_without_greek(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pareto_merging", "plan", str(config)]
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert finished.returncode == 0
    assert b"task vectors" in finished.stdout
