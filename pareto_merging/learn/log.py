"""The log of a run: one line of JSON per step and event."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pareto_merging.learn.learner import Learner, StepResult
from pareto_merging.model.state import pareto_state
from pareto_merging.system.files import write_text

LOG_NAME = "log.jsonl"
# what its lines have whatever the objective watches
LOG_KEYS = ("event", "step", "loss", "gamma", "objective", "seconds", "warnings")
Write: TypeAlias = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def open_log(learner: Learner, folder: Path | None, first: int) -> Iterator[Write]:
    """Start the log, or keep its lines up to step ``first``. Gives what writes an entry; no folder: nothing."""
    if folder is None:
        yield lambda entry: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, state = folder / LOG_NAME, pareto_state(learner.model)
    write_text(path, "".join(line + "\n" for line in (_lines_until(path, first) if first else ())))
    with path.open("a", buffering=1, encoding="utf-8") as stream:

        def write(entry: Mapping[str, Any]) -> None:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

        event = {"event": "resumed", "step": first} if first else {"event": "started", "step": 0}
        write({**event, "steps": learner.total, "remaining": learner.total - first})
        weights = {"event": "weights", "step": first, "dtype": str(learner.dtype).removeprefix("torch.")}
        write({**weights, "stored": state.stored_dtypes, "rounding_error": state.rounding_error})
        yield write


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Yield the log's lines of steps and events up to ``step``."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # a killed run may have left half a line
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= step:
                yield line


def status_of(outcome: StepResult) -> str:
    """Return what a progress bar says of one step. The loss, and the first of what the objective watches."""
    text = f"loss {outcome.loss:.4f}"
    for name, values in list(outcome.watched.items())[:1]:
        text += f"  {name} " + " ".join(f"{value:.2f}" for value in values)
    return text
