"""Mutants tried one by one, in worker processes that may be lost."""

import contextlib
import faulthandler
import io
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fuzz.judging import judge
from fuzz.mutants import CANARY, Mutant, mutate
from fuzz.readers import READERS
from fuzz.samples import sample, valid_files, write_files

from pareto_merging.errors import UserError

SECONDS, STALLED_SECONDS, MEMORY, LONGEST_MESSAGE = 1.0, 30.0, 512 * 2**20, 500
KEPT_FINDINGS = 20


@dataclass
class Finding:
    """A mutant that gave neither an error of one line nor the right answer."""

    index: int
    kind: str
    what: str
    path: str = ""


@dataclass
class Summary:
    """What came of the mutants of one reader. ``kinds``: how many of each; seconds are the workers' own."""

    reader: str
    seed: int
    mutations: int
    refused: int = 0
    right: int = 0
    findings: list[Finding] = field(default_factory=list)
    found: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0


class _Slow(BaseException):
    """No Exception, so that no reader can take it for an error in the file."""


def _too_slow(number: int, frame: object) -> None:
    raise _Slow


# while a mutant is read: what no reader of data may do
_FORBIDDEN_EVENTS = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request", "shutil.rmtree", "ctypes.dlopen"),
)
_watching: list[str] = []
_armed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed:
        return
    if event in _FORBIDDEN_EVENTS:
        _watching.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _watching.append(f"open for writing {arguments[0]!r:.80}")


def try_mutant(reader: str, mutant: Mutant, folder: Path) -> tuple[str, str]:
    """("refused" | "right" | "finding", what was said)."""
    global _armed
    path = write_files(folder, mutant.files, sample(reader).opened)
    _watching.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        _armed = True
        answer = READERS[reader](path)
        _armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        wrong = judge(reader, mutant, answer)
        outcome = ("right", "") if wrong is None else ("finding", wrong)
    except UserError as error:
        _armed = False
        text = str(error).replace(str(folder), "")
        outcome = ("refused", text)
        if not text.isprintable() or len(text) > LONGEST_MESSAGE:
            outcome = ("finding", f"an error of {len(text)} characters, or with others than text: {text!r:.120}")
        elif mutant.forbidden is not None and not _names(text, mutant):
            outcome = ("finding", f"an error that does not name {mutant.forbidden}: {text!r:.200}")
    except _Slow:
        outcome = ("finding", f"more than {SECONDS} s")
    except BaseException as error:
        outcome = ("finding", f"{type(error).__name__}: {str(error)!r:.200}")
    finally:
        _armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (folder / CANARY).exists():
        (folder / CANARY).unlink()
        outcome = ("finding", "the payload ran")
    elif _watching:
        outcome = ("finding", f"reading it did {', '.join(_watching)[:200]}")
    return outcome


def _names(text: str, mutant: Mutant) -> bool:
    """Whether the error names the payload's global, or is about something in front of it."""
    assert mutant.forbidden is not None
    # in the middle of a line or a frame the payload is text; nothing else stands in front of it in a valid pickle
    return mutant.forbidden in text or mutant.forbidden.replace("posix", "os") in text


def _work(reader: str, seed: int, indices: range, pipe: Any, current: Any, folder: str) -> None:
    """A worker: try mutants, send ("done", how many, kinds, …) and every finding."""
    os.chdir(folder)
    # the traceback of a crash goes where the parent's errors go
    with contextlib.suppress(io.UnsupportedOperation, ValueError):
        faulthandler.enable(file=sys.__stderr__ or sys.stderr)
    signal.signal(signal.SIGPROF, _too_slow)
    sys.addaudithook(_hook)
    inside = Path(folder)
    READERS[reader](write_files(inside, sample(reader).files, sample(reader).opened))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    slowest, begun = 0.0, time.perf_counter()
    for index in indices:
        current.value = index
        mutant = mutate(reader, seed, index)
        start = time.process_time()
        outcome, said = try_mutant(reader, mutant, inside)
        slowest = max(slowest, time.process_time() - start)
        counts[outcome] += 1
        kinds[mutant.kind] += 1
        if outcome == "finding":
            pipe.send(("finding", index, mutant.kind, said))
        if index == indices[-1] or sum(counts.values()) == 200:
            pipe.send(("done", counts, kinds, slowest, time.perf_counter() - begun))
            counts, kinds, slowest, begun = Counter(), Counter(), 0.0, time.perf_counter()
    pipe.send(None)


def fuzz(
    reader: str,
    mutations: int,
    seed: int = 0,
    *,
    keep: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Summary:
    """Try ``mutations`` mutants of one reader's file in a worker process, started again where one kills it.

    Args:
        reader: one of :data:`READERS`. keep: a folder for the mutants that are findings. advance: told how many are
            done.
    """
    summary = Summary(reader, seed, mutations)
    # what readers import at their first call is imported here, once
    sample(reader)
    for other in READERS:
        valid_files(other)
    context, kinds, begin = get_context("fork"), Counter[str](), 0
    current = context.Value("q", 0, lock=False)
    done = 0
    while begin < mutations:
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            arguments = (reader, seed, range(begin, mutations), sender, current, folder)
            current.value = begin
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            sender.close()
            why = "its process ended"
            while True:
                before = current.value
                try:
                    if not receiver.poll(STALLED_SECONDS):
                        if current.value != before:
                            continue
                        why = f"more than {STALLED_SECONDS} s"
                        worker.kill()
                        break
                    message = receiver.recv()
                except EOFError:
                    break
                if message is None:
                    why = ""
                    break
                if message[0] == "finding":
                    _found(summary, message[1], message[2], message[3], keep)
                else:
                    _, counts, some_kinds, slowest, seconds = message
                    summary.refused += counts["refused"]
                    summary.right += counts["right"]
                    kinds += some_kinds
                    summary.slowest = max(summary.slowest, round(slowest, 4))
                    summary.seconds += seconds
                    done += sum(counts.values())
                    if advance is not None:
                        advance(done)
            worker.join()
        if not why:
            break
        code = worker.exitcode
        mutant = mutate(reader, seed, current.value)
        signalled = signal.Signals(-code).name if code is not None and code < 0 else code
        _found(summary, current.value, mutant.kind, f"{why} ({signalled})", keep)
        begin = current.value + 1
    summary.kinds = dict(sorted(kinds.items()))
    summary.seconds = round(summary.seconds, 2)
    return summary


def _found(summary: Summary, index: int, kind: str, what: str, keep: Path | None) -> None:
    summary.found += 1
    if len(summary.findings) >= KEPT_FINDINGS:
        return
    path = ""
    if keep is not None:
        folder = keep / f"{summary.reader}-{summary.seed}-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, mutate(summary.reader, summary.seed, index).files, "")
        path = str(folder)
    summary.findings.append(Finding(index, kind, what, path))
