"""Learning a Pareto set: the loop, with its guards, its log and its checkpoints."""

import contextlib
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME, restore_checkpoint, save_checkpoint
from pareto_merging.learn.entropy import MEAN_PREDICTION
from pareto_merging.learn.gradient import CudaGraphs, Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner, StepFailure, StepResult
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state
from pareto_merging.system.files import write_text
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar

LOG_NAME = "log.jsonl"
# what its lines have whatever the objective watches
LOG_KEYS = ("event", "step", "loss", "gamma", "objective", "seconds", "warnings")
Write: TypeAlias = Callable[[Mapping[str, Any]], None]
# averages go over about this many steps before anything is said about them
SMOOTHING = 0.95


@dataclass
class TrainingResult:
    """What a run did. ``steps`` in all, ``resumed_from`` of them before; ``history`` has an entry for each other."""

    steps: int
    resumed_from: int
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)


def learn_pareto_set(
    model: nn.Module,
    tasks: Mapping[str, Task] | None,
    settings: MethodSettings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    workers: int = 0,
    cache: bool | None = None,
    cuda_graphs: CudaGraphs = "auto",
    tasks_at_once: TasksAtOnce = "one",
    on_warning: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train λ, A, G and B of a Pareto model in place. Longer than 60 lines because there is much to say.

    Args:
        model: from :func:`parametrize`; run in eval mode (no dropout, fixed batch-norm statistics), mode restored.
        tasks: by task name, one for each task of the model; None for an objective on the weights alone.
        settings: see :class:`MethodSettings`; those that are the model's (rank, core, granularity …) need not be
            given, and must be the model's where they are.
        folder: where ``log.jsonl`` and ``checkpoint.safetensors`` go; None writes nothing.
        resume: continue from the folder's checkpoint, if there is one: only the remaining steps are run, and the
            result has the bits an uninterrupted run on the same machine has.
        cache: keep the merged weights of a step for all its tasks, at the memory of one more model; None: as the
            model's strategy and memory budget say (:func:`pareto_merging.set_strategy`).
        cuda_graphs: ``"auto"``: on a GPU, capture a step's gradient once and replay it, unless the model cannot be
            captured; ``"on"``: an error then; ``"off"``.
        tasks_at_once: ``"one"``: a forward and a backward for each task, at the activation memory of one. ``"all"``:
            one of all their images together, at K times that memory: the same gradient to rounding, larger products,
            fewer launches, and the task vectors read once a step instead of K times: faster for small models. For
            images of one shape and models that treat each image of a batch by itself.
        on_warning: what to do with a warning about collapse, or a model that cannot be captured; by default
            :func:`warnings.warn`.

    Raises:
        ValueError: tasks that do not match the model's, settings that contradict it, CUDA graphs without a GPU, images
            of several shapes for all tasks at once. UserError: a checkpoint of another model or other settings.
        TrainingError: a NaN or inf, naming task, step and layer; the model and the checkpoint hold the last good state.
        Interrupted: Ctrl-C or SIGTERM; the step in hand was finished and a checkpoint written.
    """
    if not isinstance(settings, MethodSettings):
        raise TypeError(f"settings: expected MethodSettings, got {type(settings).__name__}")
    warn = on_warning or (lambda text: warnings.warn(text, stacklevel=3))
    learner = Learner(model, tasks, settings, Execution(cache, cuda_graphs, tasks_at_once), on_warning=warn)
    if taken := [name for name in LOG_KEYS if name in learner.watches]:
        expected = f"expected other names to watch than the log's own ({', '.join(LOG_KEYS)})"
        raise ValueError(f"objective {settings.objective}: {expected}, got {', '.join(taken)}")
    folder = None if folder is None else Path(folder)
    first = restore_checkpoint(learner, folder) if resume and folder is not None else 0
    total, result = learner.total, TrainingResult(steps=first, resumed_from=first)
    watch, start = _CollapseWatch(learner.tasks, settings, warn), time.monotonic()
    with (
        _open_log(learner, folder, first) as log,
        eval_mode(model, *(task.head for task in learner.tasks.values())),
        _clamped(model, (0.0, 1.0) if settings.optimiser.clamp_lambda else None),
        _stop_requested() as stop,
        progress_bar("learning", total, first, progress) as advance,
        contextlib.closing(learner.batches(first, workers)) as batches,
        _last_good_state(learner, folder, log),
    ):
        for step, batch in enumerate(batches, start=first + 1):
            outcome = learner.step(step, batch)
            means = outcome.watched.get(MEAN_PREDICTION)
            entry = {
                "step": step,
                "loss": outcome.loss,
                "gamma": outcome.gammas,
                **{name: dict(zip(learner.names, values, strict=True)) for name, values in outcome.watched.items()},
                "objective": dict(zip(learner.names, outcome.objectives, strict=True)),
                "seconds": round(time.monotonic() - start, 3),
                "warnings": [] if means is None else watch.look(step, means),
            }
            result.history.append(entry)
            result.steps = step
            log(entry)
            advance(step, status_of(outcome))
            if folder is not None and (step % settings.log.checkpoint_every == 0 or step == total or stop()):
                save_checkpoint(learner, folder, step)
            if stop() and step < total:
                raise Interrupted(f"stopped after step {step} of {total}", step)
    result.seconds = time.monotonic() - start
    result.collapsed = watch.collapsed
    return result


@contextlib.contextmanager
def _open_log(learner: Learner, folder: Path | None, first: int) -> Iterator[Write]:
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


class _CollapseWatch:
    """Watches the entropy of each task's mean prediction. It falls when every image ends up in one class.

    On a batch of n images and C classes it can reach log min(n, C); staying under a share of that is reported once.
    """

    def __init__(self, tasks: Mapping[str, Task], settings: MethodSettings, warn: Callable[[str], None]) -> None:
        self.warn, self.threshold = warn, settings.log.collapse_threshold
        self.collapsed: list[str] = []
        self._means: list[float] = []
        self._steps = 0
        self._ceilings: dict[str, float] = {}
        for name, task in tasks.items():
            weight = getattr(task.head, "weight", None)
            classes = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else math.inf
            self._ceilings[name] = math.log(max(2, min(settings.sampling.batch_size, classes)))

    def look(self, step: int, values: Sequence[float]) -> list[str]:
        """Update the running means; warn of and return the tasks that have newly collapsed."""
        self._means = self._means or list(values)
        self._steps += 1
        self._means = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(self._means, values, strict=True)]
        new: list[str] = []
        if self._steps < 1 / (1 - SMOOTHING):
            return new
        for (name, ceiling), mean in zip(self._ceilings.items(), self._means, strict=True):
            if name not in self.collapsed and mean < self.threshold * ceiling:
                self.collapsed.append(name)
                new.append(name)
                self.warn(
                    f"step {step}: task {name} may be collapsing: the entropy of its mean prediction is {mean:.2f} of "
                    f"at most {ceiling:.2f} (most images fall into few classes); consider information_maximisation, a "
                    "larger tensor_norm or fewer steps"
                )
        return new


@contextlib.contextmanager
def _clamped(model: nn.Module, bounds: tuple[float, float] | None) -> Iterator[None]:
    """Use λ clamped inside the block. It is learned and saved as it is; afterwards the model holds what was used."""
    if bounds is None:
        yield
        return
    try:
        with pareto_state(model).now.changed(lambda_range=bounds):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in learned_parameters(model).items():
                if name.startswith("lam."):
                    parameter.clamp_(*bounds)


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C or SIGTERM has come. A second Ctrl-C interrupts at once as usual."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # only the main thread may set handlers; elsewhere whoever owns the process decides
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(outcome: StepResult) -> str:
    """Return what a progress bar says of one step. The loss, and the first of what the objective watches."""
    text = f"loss {outcome.loss:.4f}"
    for name, values in list(outcome.watched.items())[:1]:
        text += f"  {name} " + " ".join(f"{value:.2f}" for value in values)
    return text


@contextlib.contextmanager
def _last_good_state(learner: Learner, folder: Path | None, log: Write) -> Iterator[None]:
    """Keep the state before a step that fails, and say where it is. Without a folder there is nowhere to keep it."""
    try:
        yield
    except StepFailure as failure:
        if folder is None:
            raise
        step, task, layer, reason = failure.step, failure.task, failure.layer, failure.reason
        save_checkpoint(learner, folder, step - 1)
        log({"event": "stopped", "step": step, "task": task, "layer": layer, "reason": reason})
        kept = f"the state after step {step - 1} is in {folder / CHECKPOINT_NAME}"
        raise StepFailure(task, step, layer, reason, kept) from None
