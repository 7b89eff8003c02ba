"""One operation in a tree against another commit: in a small repository of its own, and in this one."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import base, run
from benchmarks.base import BaseError, Operation

ROOT = Path(__file__).parents[2]
MERGE = Operation("merge", 6, 4, rows=3, tasks=2, rank=0, dtype="float32", strategy="eager")
# a library of one function, which writes down who was called
LIBRARY = """
import pathlib

def merge_weight(weight, task_vectors, lam, strategy):
    with pathlib.Path({log!r}).open("a") as log:
        log.write("{name} ")
    return {factor} * weight
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_library(folder: Path, name: str, factor: float = 1.0) -> None:
    (folder / "pmkernels").mkdir(exist_ok=True)
    text = LIBRARY.format(log=str(folder.parent / "calls"), name=name, factor=factor)
    (folder / "pmkernels" / "__init__.py").write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose only commit has the tag ``old``; its tree has gone on since."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    write_library(folder, "old")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "tag", "old")
    write_library(folder, "new")
    return folder


def compare(repository: Path, revision: str = "old", operation: Operation = MERGE) -> base.Comparison:
    return base.compare(revision, operation, root=repository, rounds=3, calls=2)


def test_both_trees_are_called_in_turn(repository: Path) -> None:
    comparison = compare(repository)
    calls = (repository.parent / "calls").read_text().split()
    # outputs, then rounds of two calls, the first of which is not counted
    assert sorted(calls[:2]) == ["new", "old"]
    assert calls[2:] == 4 * ["new", "new", "old", "old"]
    assert comparison.rounds == 3 and comparison.base == git(repository, "rev-parse", "--short", "old").strip()
    assert comparison.error == 0 and comparison.matched
    for figures in (comparison.ours_ms, comparison.base_ms, comparison.ratio):
        assert 0 < figures.p20 <= figures.median <= figures.p80


def test_the_worktree_is_gone_afterwards(repository: Path) -> None:
    compare(repository)
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    write_library(repository, "new")
    (repository / "pmkernels" / "__init__.py").write_text("raise ImportError('half done')")
    with pytest.raises(BaseError, match="this tree: expected to time the operation, got ImportError: half done"):
        compare(repository)
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_other_outputs_are_wrong_in_one_of_them(repository: Path) -> None:
    write_library(repository, "new", factor=1.001)
    comparison = compare(repository)
    assert comparison.error == pytest.approx(1e-3, rel=0.01) and not comparison.matched
    assert "outputs      1.0e-03 apart: WRONG in one of them" in str(comparison)
    write_library(repository, "new", factor=1 + 2**-23)
    assert compare(repository).matched, "rounding"


def test_a_commit_that_cannot_do_it_is_named(repository: Path) -> None:
    commit = git(repository, "rev-parse", "--short", "old").strip()
    write_library(repository, "new")
    (repository / "pmkernels" / "__init__.py").open("a").write("\ndef softmax_entropy(x, strategy):\n    return x\n")
    with pytest.raises(BaseError, match=f"{commit}: expected to time the operation, got AttributeError: .*entropy"):
        compare(repository, operation=replace(MERGE, operation="entropy"))


@pytest.mark.parametrize("revision", ["nope", "HEAD:pmkernels", "--help", ""])
def test_an_unknown_commit_is_an_error(revision: str, repository: Path) -> None:
    expected = f"--base: expected a commit, branch or tag of {repository}, got {revision!r}"
    with pytest.raises(BaseError, match=re.escape(expected)):
        compare(repository, revision)


def test_what_is_no_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=re.escape(f"--base: expected a git checkout, got {tmp_path}")):
        compare(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "3072"], "--layer: expected OUTxIN, as in 3072x1024, got '3072'"),
        (["--layer", "0x8"], "--layer: expected OUTxIN, as in 3072x1024, got '0x8'"),
        (["--rows", "0"], "--rows: expected at least 1, got 0"),
        (["--rank", "-1"], "--rank: expected at least 0, got -1"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_wrong_options_say_what_was_expected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--base", "HEAD", *arguments]) == run.EXIT_UNUSABLE
    assert capsys.readouterr().err == f"run: {message}\n"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
@pytest.mark.parametrize("operation", base.OPERATIONS)
def test_the_command_times_this_tree_against_its_last_commit(
    operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.json"
    arguments = ["--operation", operation, "--layer", "40x24", "--rows", "6", "--tasks", "2", "--rank", "4"]
    assert run.main(["--base", "HEAD", *arguments, "--rounds", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    strategy = "auto" if torch.cuda.is_available() else "eager"
    assert lines[0].startswith(f"{operation}, 40×24, 6 rows, K = 2, r = 4, ") and f", {strategy};" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["this", head(), "ratio", "outputs"]
    report = json.loads(out.read_text())
    assert report["suite"] == "base" and report["rounds"] == 2 and report["environment"]["torch"]
    assert report["ratio"]["p20"] <= report["ratio"]["median"] <= report["ratio"]["p80"]


def head() -> str:
    return git(ROOT, "rev-parse", "--short", "HEAD").strip()
