"""Comparing as a user meets it: tables, mistakes, interrupted comparisons."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import one_line, run
from safetensors.torch import save_file
from support.run_folders import own_files, steps_logged, write_config

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.config import read_config


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method, two tries each, with an unseen task."""
    folder = tmp_path_factory.mktemp("compare")
    config = write_config(folder / "run.yaml", unseen=["mirrored"])
    arguments = ("--methods", "all", "--effort", 2, "--preferences", "equal", "--quiet")
    assert run("compare", config, "--out", folder / "out", *arguments) == 0
    return folder / "out"


@pytest.mark.slow
def test_compare_all_methods(compared: Path) -> None:
    report = json.loads((compared / "compare.json").read_text())
    assert list(report["methods"]) == list(METHODS)
    for name, method in METHODS.items():
        entry = report["methods"][name]
        assert (entry["seeds"], entry["title"], entry["is_bound"]) == (1, method.title, method.is_bound)
        assert entry["unseen"]["mirrored"]["mean"] > 20
        stored = json.loads((compared / f"{name}-seed-0.json").read_text())
        tries = method.choices(2, MethodSettings.model_validate({}))
        assert len(stored["candidates"]) == min(2, len(tries)), name
    individual = report["methods"]["individual"]["one_hot"]["mean"]
    assert individual > report["methods"]["weight-averaging"]["one_hot"]["mean"]
    names = {path.name for path in compared.iterdir()}
    files = {"compare.json", "compare.md", "methods.csv", "points.csv", "config.yaml", "settings.json", "front.png"}
    assert names == files | {f"{name}-seed-0.json" for name in METHODS}
    assert read_config(compared / "config.yaml").unseen == ["mirrored"]


def test_compare_lists_the_methods(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(METHODS["pretrained"], key="own", title="My own")
    monkeypatch.setitem(METHODS, "own", own)
    monkeypatch.setenv("COLUMNS", "120")
    assert run("compare", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, method in METHODS.items():
        (row,) = (line for line in lines if f" {name} " in line)
        assert all(text in row for text in (method.title, method.needs, method.stores))


def test_compare_prints_one_json_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    arguments = ("--methods", "pretrained,adamerging", "--effort", 1, "--preferences", "equal", "--json")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert captured.err.splitlines()[0].startswith("[1/2] Pretrained: average ")
    assert "Traceback" not in captured.err
    assert run("compare", config, "--out", tmp_path / "out", *arguments, "--quiet", "--resume") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["methods"].keys() == {"pretrained", "adamerging"}


def test_compare_prints_a_table_and_an_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    arguments = ("--methods", "pretrained,weight-averaging", "--preferences", "equal", "--quiet")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "One model for everybody: Weight averaging (90.6 %)" in captured.out
    assert captured.out.splitlines()[-1] == str(tmp_path / "out" / "compare.md")


def test_compare_mistakes(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    fixed = {"method": {"preference": "fixed", "gamma": [0.5, 0.2, 0.3]}}
    cases: list[tuple[tuple[object, ...], str]] = [
        ((config,), "--out"),
        ((tmp_path / "none.yaml", "--out", out), "none.yaml"),
        ((config, "--out", out, "--methods", "regmeans"), "got 'regmeans'; near: regmean"),
        ((config, "--out", out, "--methods", "all,-tees"), "near: ties"),
        ((config, "--out", out, "--methods", ""), "expected at least one"),
        ((config, "--out", out, "--effort", 5), "--effort"),
        ((config, "--out", out, "--seeds", 0), "--seeds"),
        ((config, "--out", out, "--preferences", "0.5,0.6"), "expected a sum of 1"),
        ((config, "--out", out, "--preferences", "lattice:0"), "lattice:0"),
        ((config, "--out", finished), "got an existing folder"),
        ((config, "--out", tmp_path / "theirs"), "got an existing folder"),
        ((config, "--out", tmp_path / "theirs", "--resume"), "got an existing folder"),
        ((config, "--out", tmp_path / "file"), "got an existing file"),
        ((config, "--out", tmp_path / "file" / "out"), "got a file"),
        ((write_config(tmp_path / "a.yaml", **fixed), "--out", out), "preference: expected shape [2]"),
        ((write_config(tmp_path / "b.yaml", unseen=["sideways"]), "--out", out), "sideways"),
        ((write_config(tmp_path / "c.yaml", unseen=["upright"]), "--out", out), "not merged, got upright"),
    ]
    capsys.readouterr()
    for arguments, expected in cases:
        assert run("compare", *arguments) == 2, arguments
        assert expected in one_line(capsys), arguments
        assert not out.exists(), arguments


def test_compare_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    capsys.readouterr()
    # nobody, not even root, makes a folder there
    assert run("compare", config, "--out", "/proc/compare", "--methods", "pretrained") == 2
    assert "/proc/compare" in one_line(capsys)


def test_compare_wants_the_files_of_unseen_tasks(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_files(tmp_path, finished)
    unseen = {"head": "rotated_head.safetensors", "merging": "merging", "evaluation": "test"}
    path = tmp_path / "own.yaml"
    save_file({"weight": torch.zeros(2, 15)}, tmp_path / "wide.safetensors")
    save_file({"weight": torch.ones(3, 16)}, tmp_path / "three.safetensors")
    for change, expected in (
        ({"head": "none.safetensors"}, "none.safetensors: expected a checkpoint, got no such file"),
        ({"head": "wide.safetensors"}, "expected a head of [classes, 16] for this encoder, got [2, 15]"),
        ({"head": "three.safetensors"}, "expected 3 sub-folders, one for each class of new's head"),
        ({"merging": "nowhere"}, "nowhere"),
    ):
        path.write_text(yaml.safe_dump({**config, "unseen": {"new": {**unseen, **change}}}))
        capsys.readouterr()
        assert run("compare", path, "--out", tmp_path / "out") == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "out").exists()
    path.write_text(yaml.safe_dump({**config, "unseen": {"new": unseen}}))
    arguments = ("--methods", "pretrained", "--quiet", "--json")
    assert run("compare", path, "--out", tmp_path / "out", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["pretrained"]["unseen"].keys() == {"new"}
    # written anew since
    os.utime(tmp_path / "rotated_head.safetensors", ns=(1, 1))
    assert run("compare", path, "--out", tmp_path / "out", "--resume") == 2
    assert "rotated_head.safetensors" in one_line(capsys)


def test_a_failed_method_is_exit_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", method={"learning_rate": 1e38, "steps": 5})
    arguments = ("--methods", "pareto,pretrained", "--effort", 1, "--preferences", "equal", "--quiet")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 1
    captured = capfd.readouterr()
    assert captured.err.startswith("pareto-merging: Pareto Merging failed: step ")
    assert captured.err.count("\n") == 1
    assert "failed" in captured.out and "One model for everybody: Pretrained" in captured.out
    assert "- Pareto Merging: step " in (tmp_path / "out" / "compare.md").read_text()


def test_a_skipped_method_is_no_failure(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = own_files(tmp_path, finished)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert run("compare", path, "--out", tmp_path / "out", "--methods", "multitask,pretrained") == 0
    captured = capsys.readouterr()
    assert "Multi-task training: skipped: training: expected labelled images of every task" in captured.err
    assert "skipped" in captured.out


@pytest.mark.slow
def test_ctrl_c_leaves_a_comparison_that_resumes(tmp_path: Path) -> None:
    """The command that is printed works, whatever is in the names."""
    folder = tmp_path / "with spaces"
    folder.mkdir()
    config = write_config(folder / "run.yaml", method={"steps": 120, "checkpoint_every": 1000})
    methods = "weight-averaging,adamerging,pretrained"
    command = [sys.executable, "-m", "pareto_merging", "compare", str(config), "--out", str(folder / "out")]
    command += ["--methods", methods, "--effort", "1", "--preferences", "equal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "out" / ".adamerging-seed-0" / "0" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not steps_logged(log) > 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in errors
    done = steps_logged(log)
    assert 3 < done < 120
    again = errors.splitlines()[-1].partition("; go on with: ")[2]
    assert errors.splitlines()[-1].startswith(f"pareto-merging: stopped after step {done} of 120; go on with: ")
    arguments = shlex.split(again)
    assert arguments[0] == "pareto-merging"
    assert run(*arguments[1:], "--quiet") == 0
    report = json.loads((folder / "out" / "compare.json").read_text())
    assert list(report["methods"]) == methods.split(",")


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_figures(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", method={"steps": 12, "checkpoint_every": 4})
    command = [sys.executable, "-m", "pareto_merging", "compare", str(config), "--quiet"]
    command += ["--methods", "weight-averaging,adamerging,pareto,dare", "--effort", "2", "--preferences", "equal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "out" / ".pareto-seed-0" / "1" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not steps_logged(log) > 1:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (tmp_path / "out" / "adamerging-seed-0.json").exists()
    assert not (tmp_path / "out" / "dare-seed-0.json").exists()
    assert run(*command[3:], "--out", tmp_path / "out", "--resume") == 0
    assert run(*command[3:], "--out", tmp_path / "whole") == 0
    first, second = ((tmp_path / name / "points.csv").read_text() for name in ("out", "whole"))
    assert first == second
    reports = [json.loads((tmp_path / name / "compare.json").read_text()) for name in ("out", "whole")]
    assert reports[0]["choices"] == reports[1]["choices"] and reports[0]["answer"] == reports[1]["answer"]
    assert not list((tmp_path / "out").glob(".*-seed-0"))
