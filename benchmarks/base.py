"""``python -m benchmarks.run --base REV``: one operation in this tree against another commit, in one run.

A temporary worktree of REV is made, and one process for each tree. Both are given the same inputs and time the same
operation, a round at a time and in turn, so that a machine that slows down slows both down. The ratio is that of two
rounds that follow each other.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import sizes
from benchmarks.common.errors import TOLERANCE, relative_error
from benchmarks.common.operation import OPERATIONS
from benchmarks.common.timing import percentiles

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "common" / "operation.py"


class BaseError(ValueError):
    """A commit that does not exist, or a tree that cannot do the operation."""


@dataclass(frozen=True)
class Operation:
    """An operation of a layer of ``n`` × ``d``, by its names in :mod:`benchmarks.common.operation`."""

    operation: str
    n: int
    d: int
    rows: int
    tasks: int
    rank: int
    dtype: str
    strategy: str

    def __str__(self) -> str:
        size = f"{self.n}×{self.d}, {self.rows} rows, K = {self.tasks}, r = {self.rank}"
        return f"{self.operation}, {size}, {self.dtype}, {self.strategy}"


@dataclass(frozen=True)
class Figures:
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figures":
        """Return the figures of one or more values."""
        return cls(*percentiles(values))


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of both trees, ours over the base's, and how far the outputs differ."""

    operation: Operation
    base: str
    rounds: int
    ours_ms: Figures
    base_ms: Figures
    ratio: Figures
    error: float

    @property
    def matched(self) -> bool:
        """Say whether both trees compute the same, to the rounding of the type."""
        return self.error <= TOLERANCE * torch.finfo(getattr(torch, self.operation.dtype)).eps

    def __str__(self) -> str:
        lines = [f"{self.operation}; {self.rounds} rounds in turn: median, 20th to 80th percentile"]
        for name, figures in (("this tree", self.ours_ms), (self.base, self.base_ms)):
            lines.append(f"{name:<12} {figures.median:.4g} ms ({figures.p20:.4g}–{figures.p80:.4g})")
        lines.append(f"{'ratio':<12} {self.ratio.median:.3f}× ({self.ratio.p20:.3f}–{self.ratio.p80:.3f})")
        same = "the same bits" if self.error == 0 else f"{self.error:.1e} apart"
        return "\n".join([*lines, f"{'outputs':<12} {same}{'' if self.matched else ': WRONG in one of them'}"])


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


@contextlib.contextmanager
def worktree(root: Path, revision: str) -> Iterator[tuple[Path, str]]:
    """Check ``revision`` out into a temporary folder; yield it and the commit's short name.

    Raises:
        BaseError: not a commit of the repository at ``root``, or no repository.
    """
    if _git(root, "rev-parse", "--git-dir").returncode:
        raise BaseError(f"--base: expected a git checkout, got {root}")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}").stdout.strip()
    if not commit:
        raise BaseError(f"--base: expected a commit, branch or tag of {root}, got {revision!r}")
    with tempfile.TemporaryDirectory(prefix="base-") as folder:
        tree = Path(folder) / "tree"
        made = _git(root, "worktree", "add", "--detach", str(tree), commit)
        if made.returncode:
            raise BaseError(f"--base: expected a worktree of {commit}, got {made.stderr.strip().splitlines()[-1]}")
        try:
            yield tree, commit
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


@contextlib.contextmanager
def _worker(tree: Path, name: str, what: Mapping[str, Any]) -> Iterator[Callable[[], float]]:
    """Start the process of one tree, and yield what times a round of its library."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", str(WORKER), json.dumps(what)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, cwd=tree, env=environment, **pipes) as process:
        asks, answers, errors = process.stdin, process.stdout, process.stderr
        assert asks is not None and answers is not None and errors is not None

        def answer() -> Any:
            line = answers.readline()
            if not line:
                last = errors.read().strip().splitlines() or ["nothing"]
                raise BaseError(f"{name}: expected to time the operation, got {last[-1]}")
            return json.loads(line)

        def one_round() -> float:
            asks.write("\n")
            asks.flush()
            return float(answer())

        try:
            place = Path(answer()["pmkernels"])
            if not place.resolve().is_relative_to(tree.resolve()):
                raise BaseError(f"{name}: expected pmkernels of {tree}, got {place}")
            yield one_round
        finally:
            process.kill()


def compare(revision: str, operation: Operation, *, root: Path = ROOT, rounds: int = 20, calls: int = 10) -> Comparison:
    """Time ``operation`` in the tree at ``root`` and at ``revision``, in turn. ``calls``: of a round, off the GPU.

    Raises:
        BaseError: no such commit, or one of the trees cannot do it.
    """
    what = {**asdict(operation), "calls": calls, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, worktree(root, revision) as (tree, commit):
        outputs = {name: Path(folder) / f"{number}.pt" for number, name in enumerate(("this tree", commit))}
        with (
            _worker(root, "this tree", {**what, "outputs": str(outputs["this tree"])}) as ours,
            _worker(tree, commit, {**what, "outputs": str(outputs[commit])}) as base,
        ):
            times = [(ours(), base()) for _ in range(1 + rounds)]
        output, expected = (torch.load(path, weights_only=True) for path in outputs.values())
    # the first round of a process is slower than any other
    mine, theirs = zip(*times[1:], strict=True)
    ratio = Figures.of([a / b for a, b in times[1:]])
    error = relative_error([t.double() for t in output], [t.double() for t in expected])
    return Comparison(operation, commit, rounds, Figures.of(mine), Figures.of(theirs), ratio, error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is compared with a commit."""
    add = parser.add_argument_group("with --base").add_argument
    add("--base", metavar="REV", help="time one operation in this tree against that commit, and no suite")
    add("--operation", choices=tuple(OPERATIONS), default="forward", help="(default: forward)")
    add("--layer", default="3072x1024", metavar="OUTxIN", help="(default: 3072x1024)")
    add("--rows", type=int, default=257, help="of the input (default: 257)")
    add("--tasks", type=int, default=8, help="(default: 8)")
    add("--rank", type=int, default=16, help="0: no low-rank term (default: 16)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16, on a CPU float32)")
    add("--strategy", help="(default: auto on a GPU, else eager)")
    add("--rounds", type=int, default=20, help="of each tree, in turn (default: 20)")


def asked(chosen: argparse.Namespace) -> Operation:
    """Read the operation from a command line.

    Raises:
        BaseError: a layer or a number that is none.
    """
    on_gpu, size = torch.cuda.is_available(), sizes(chosen.layer)
    if size is None:
        raise BaseError(f"--layer: expected OUTxIN, as in 3072x1024, got {chosen.layer!r}")
    for name, least in (("rows", 1), ("tasks", 1), ("rank", 0), ("rounds", 1)):
        if getattr(chosen, name) < least:
            raise BaseError(f"--{name}: expected at least {least}, got {getattr(chosen, name)}")
    dtype = chosen.dtype or ("bfloat16" if on_gpu else "float32")
    strategy = chosen.strategy or ("auto" if on_gpu else "eager")
    return Operation(chosen.operation, *size, chosen.rows, chosen.tasks, chosen.rank, dtype, strategy)
