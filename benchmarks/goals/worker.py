"""``python -m benchmarks.goals.worker``: the process that measures; :mod:`benchmarks.goals.cli` watches it."""

import argparse
import functools
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_kernels, results
from benchmarks.common.record import Record, RecordError
from benchmarks.common.session import Lost, Session, chosen
from benchmarks.common.supervisor import EXIT_COMPLETE, EXIT_LOST, EXIT_UNUSABLE
from benchmarks.goals.cli import GROUPS, NAMES, SUITE, Group


def triton_key() -> str | None:
    """Tell which compiler a cached kernel is good for; None without Triton."""
    try:
        return gpu_kernels.triton_key()
    except ImportError:
        return None


def first_lines(where: dict[str, Any], clocks: dict[str, Any]) -> list[str]:
    """Return what is said before anything is measured."""
    card = where["gpu"] or f"no GPU ({where['cpu']})"
    now = ", ".join(f"{name} {value}" for name, value in clocks.items() if value)
    lines = [f"GPU          {card}", f"driver       {where.get('driver') or '–'}"]
    lines += [f"torch        {where['torch']}, Python {where['python']}", f"Triton       {where['triton']}"]
    lines += [f"triton_key   {where['triton_key']}", f"clocks       {now}"]
    return [*lines, "a rehearsal: tiny shapes, nothing here is a measurement"] if where["quick"] else lines


def measure_groups(session: Session, wanted: Sequence[Group], context: Any, load: Callable[[str], Any]) -> None:
    """Measure groups in their order. One that needs what is not installed says so and is passed over."""
    for group in wanted:
        module, _, name = group.function.partition(":")
        try:
            function = getattr(load(module), name)
        except ImportError as error:
            session.lacks(f"{group.name}/all", error)
            continue
        session.tell(f"{group.name}: {group.about}")
        function(context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure into a record that is there; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals.worker", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic at which to be done")
    parser.add_argument("--only", nargs="+", choices=NAMES)
    parser.add_argument("--quick", action="store_true")
    wanted = parser.parse_args(arguments)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        if not wanted.quick:
            fault = "expected a CUDA GPU that torch sees, got none (--quick rehearses on the CPU)"
            print(f"goals: {fault}", file=sys.stderr)
            return EXIT_UNUSABLE
        # before a kernel is imported: without a GPU a rehearsal interprets them
        os.environ["TRITON_INTERPRET"] = "1"
        # small matrices: a second thread costs more than it brings
        torch.set_num_threads(1)
        # masked rows of a tile are 0/0 in the interpreter
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    record = Record.read(wanted.out, SUITE)
    record.resume()
    # what all runs of a file must share is part of it
    where = {**results.machine(), "triton_key": triton_key(), "quick": wanted.quick}
    clocks = results.clocks()
    try:
        record.identify(where)
    except RecordError as error:
        print(f"goals: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    record.data["runs"][-1].setdefault("clocks_before", clocks)
    record.write()
    print("\n".join(first_lines(where, clocks)), flush=True)
    only = wanted.only and ["ceilings", *wanted.only]
    synchronize = torch.cuda.synchronize if on_gpu else (lambda: None)
    say = functools.partial(print, flush=True)
    session = Session(record, wanted.until, say=say, wanted=chosen(only), synchronize=synchronize)
    from benchmarks.goals.context import Context

    gc.collect()
    # captures may collect garbage, hundreds of times: what was imported need not be looked through
    gc.freeze()
    context = Context(session, torch.device("cuda" if on_gpu else "cpu"), wanted.quick)
    groups = [group for group in GROUPS if only is None or group.name in only]
    try:
        measure_groups(session, groups, context, lambda name: importlib.import_module(f"benchmarks.goals.{name}"))
    except Lost as error:
        print(f"goals: the GPU no longer answers: {error}", file=sys.stderr)
        return EXIT_LOST
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(main())
