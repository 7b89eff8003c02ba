"""How a method's setting is chosen. Each is tried and scored, a failed one is passed over."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pareto_merging.errors import Interrupted
from pareto_merging.measure.results import Try
from pareto_merging.methods.interface import Choice, Merged, Method, Problem
from pareto_merging.system.environment import measured
from pareto_merging.system.files import write_json

# what ends one method and not the comparison: NaN, a matrix that cannot be inverted, no memory
FAILURES = (ValueError, RuntimeError, MemoryError)


def tune(
    method: Method, problem: Problem, choices: Sequence[Choice], score: Callable[[Merged, Method], float | None]
) -> tuple[list[Try], tuple[Merged, Try] | None]:
    """Try a method's settings; return all tries, and the best with its model.

    The first of equals is the best, None where all failed. Each keeps its checkpoints in a folder of its own in the
    problem's.

    Raises:
        Interrupted: Ctrl-C while a method learns.
    """
    tries: list[Try] = []
    best: tuple[Merged, Try] | None = None
    for number, choice in enumerate(choices):
        tried = Try(choice=choice)
        tries.append(tried)
        inside = problem if problem.folder is None else replace(problem, folder=problem.folder / f"{number}")
        try:
            merged = _run(method, inside, tried)
            tried.score = score(merged, method) if len(choices) > 1 else None
        except Interrupted:
            raise
        except FAILURES as error:
            tried.error = one_line(error)
            continue
        if best is None or (tried.score is not None and tried.score > (best[1].score or 0.0)):
            best = (merged, tried)
    return tries, best


def _run(method: Method, problem: Problem, tried: Try) -> Merged:
    """Run a method with one setting; note its warnings, seconds and memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged, seconds, peak_bytes = _timed(problem.folder, lambda: method.run(problem, tried.choice))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if messages:
        tried.warnings = list(dict.fromkeys(messages))
    tried.seconds, tried.peak_bytes = round(seconds, 2), peak_bytes
    return merged


def _timed(folder: Path | None, work: Callable[[], Merged]) -> tuple[Merged, float, int]:
    """Measure the work; in a folder, add the seconds of the same try before Ctrl-C.

    Those before a kill are lost.
    """
    if folder is None:
        return measured(work)
    path = folder.with_name(f"{folder.name}-seconds.json")
    before = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
    start = time.perf_counter()
    try:
        merged, seconds, peak_bytes = measured(work)
    finally:
        write_json(path, before + time.perf_counter() - start)
    return merged, before + seconds, peak_bytes


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
