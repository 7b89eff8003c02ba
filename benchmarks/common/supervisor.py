"""A run that always ends. The measuring is done by a process of its own, which is watched, ended and begun again.

A kernel that hangs, an error that leaves the GPU unusable, a compiler that does not return to Python: none of them
can be ended from within. So whoever starts a run is this process, which uses no GPU and imports no PyTorch. It ends
the worker at the time limit or when it is told to stop, gives up a unit that takes far too long, starts a worker again
that died, and finishes the results file, which the worker leaves whole after every row.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.record import COMPLETE, TIME_LIMIT, Record
from benchmarks.common.session import failure

# exit codes of a run; a signal N ends it with 128 + N
EXIT_COMPLETE, EXIT_WRONG, EXIT_UNUSABLE, EXIT_TIME = 0, 1, 2, 3
# of a worker: the GPU no longer answers, begin again
EXIT_LOST = 70
# seconds kept back for finishing the file
RESERVE = 2.0
# workers that may die without having measured anything
PATIENCE = 2


class Ended(BaseException):
    """How a run ended, as files say it and by exit code. Raised, what is there is all there will be."""

    def __init__(self, how: str, code: int) -> None:
        super().__init__(how)
        self.how, self.code = how, code


@contextlib.contextmanager
def ended_by(*signals: signal.Signals) -> Iterator[None]:
    """End what runs inside, once, on these signals. To a thread that is not the main one none is sent."""

    def stop(number: int, frame: Any) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise Ended(f"signal {signal.Signals(number).name}", 128 + number)

    before = {number: signal.getsignal(number) for number in signals}
    here = before if threading.current_thread() is threading.main_thread() else {}
    try:
        for number in here:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in here.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Let a worker be killed when its parent is, whatever it is killed by (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and what it started."""
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(patience)
            return


def supervise(
    path: Path,
    suite: str,
    command: Sequence[str],
    seconds: float,
    finish: Callable[[Record], None],
    say: Callable[[str], None] = print,
) -> Ended:
    """Run ``command`` until all is measured or ``seconds`` are over, and finish its results file.

    The file at ``path`` is a record of ``suite`` that is there already. ``command`` gets ``--until`` with the value of
    time.monotonic at which it has to be done. ``finish`` is called with the record at the end, whatever the end was,
    and may add to it.
    """
    end = time.monotonic() + seconds
    outcome = Ended(COMPLETE, EXIT_COMPLETE)
    with ended_by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        try:
            outcome = _watch(path, suite, [*command, "--until", f"{end - RESERVE:.3f}"], end - RESERVE, say)
        except Ended as stopped:
            outcome = stopped
    record = Record.read(path, suite)
    if record.data["running"] is not None:
        record.data["not_reached"].append(record.data["running"]["unit"])
    record.data |= {"running": None, "ended": outcome.how}
    if outcome.code in (EXIT_COMPLETE, EXIT_TIME) and record.wrong:
        outcome.code = EXIT_WRONG
    finish(record)
    record.write()
    return outcome


def _watch(path: Path, suite: str, command: Sequence[str], until: float, say: Callable[[str], None]) -> Ended:
    fruitless = 0
    while True:
        measured = len(Record.read(path, suite).data["units"])
        # a group of its own: a worker may have processes that compile
        worker = subprocess.Popen(
            [sys.executable, *command], start_new_session=True, preexec_fn=_die_with_parent, stdin=subprocess.DEVNULL
        )
        try:
            why = _wait(worker, path, suite, until)
        finally:
            _end(worker)
        record = Record.read(path, suite)
        running = record.data["running"]
        if why == "over":
            return Ended(TIME_LIMIT, EXIT_TIME)
        if why is None and worker.returncode == EXIT_COMPLETE:
            return Ended(TIME_LIMIT, EXIT_TIME) if record.data["not_reached"] else Ended(COMPLETE, EXIT_COMPLETE)
        if why is None and worker.returncode == EXIT_UNUSABLE:
            return Ended("not usable here", EXIT_UNUSABLE)
        reason = why or f"its process ended with {_how(worker.returncode)}"
        if running is not None:
            record.add(running["unit"], failure(reason, matched=False))
            record.close(running["unit"], 0.0)
        elif len(record.data["units"]) == measured:
            fruitless += 1
            if fruitless >= PATIENCE:
                say(f"given up: {reason}, {fruitless} times before anything was measured")
                return Ended(f"failed: {reason}", EXIT_UNUSABLE)
        about = f"{running['unit']}: " if running is not None else ""
        say(f"{about}{reason}; going on with the rest in a new process")


def _how(code: int) -> str:
    if code == EXIT_LOST:
        return "a GPU that did not answer any more"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _wait(worker: subprocess.Popen[bytes], path: Path, suite: str, until: float) -> str | None:
    """Wait for the worker. None if it ended by itself, ``over`` at the limit, else why its unit is given up."""
    stamp, running = 0, None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(min(0.25, max(until - time.monotonic(), 0.01)))
            return None
        now = time.monotonic()
        if now >= until:
            return "over"
        changed = path.stat().st_mtime_ns
        if changed != stamp:
            stamp, running = changed, Record.read(path, suite).data["running"]
        if running is not None and now - running["since"] > running["limit"]:
            return f"no answer for {now - running['since']:.0f} s"
