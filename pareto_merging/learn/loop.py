"""Learning a Pareto set: the loop, with its guards, its log and its checkpoints."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME, restore_checkpoint, save_checkpoint
from pareto_merging.learn.distillation import AGREEMENT
from pareto_merging.learn.entropy import MEAN_PREDICTION
from pareto_merging.learn.gradient import CudaGraphs, Execution, TasksAtOnce
from pareto_merging.learn.guards import AgreementWatch, CollapseWatch, clamped, stop_requested
from pareto_merging.learn.held_back import LOOKS, BestState
from pareto_merging.learn.learner import Learner, StepFailure
from pareto_merging.learn.log import LOG_KEYS, Write, open_log, status_of
from pareto_merging.learn.prepared import prepare
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.copies import Weights
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar


@dataclass
class TrainingResult:
    """What a run did. ``steps`` in all, ``resumed_from`` of them before; ``history`` has an entry for each other.

    ``chosen`` says which state was kept, where images were held back.
    """

    steps: int
    resumed_from: int
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    collapsed: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)


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
    finetuned: Sequence[Weights] | Mapping[str, Weights] | None = None,
) -> TrainingResult:
    """Train what a Pareto model learns, in place. Longer than 60 lines because there is much to say.

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
        finetuned: the copies that :func:`parametrize` was given, for the objectives ``distillation`` and ``features``.
            None: W0 + τ_k, which is exact unless task vectors were preprocessed or the base is another (``start``); or
            each task's own ``teacher``. Each is run once over its task's images, one after another, and not kept.

    Raises:
        ValueError: tasks that do not match the model's, settings that contradict it, CUDA graphs without a GPU, images
            of several shapes for all tasks at once. UserError: a checkpoint of another model or other settings.
        TrainingError: a NaN or inf, naming task, step and layer; the model and the checkpoint hold the last good state.
        Interrupted: Ctrl-C or SIGTERM; the step in hand was finished and a checkpoint written.
    """
    if not isinstance(settings, MethodSettings):
        raise TypeError(f"settings: expected MethodSettings, got {type(settings).__name__}")
    warn = on_warning or (lambda text: warnings.warn(text, stacklevel=3))
    folder = None if folder is None else Path(folder)
    prepared = prepare(model, tasks, settings, finetuned, folder=folder, resume=resume, progress=progress, warn=warn)
    settings = prepared.settings
    execution = Execution(cache, cuda_graphs, tasks_at_once)
    learner = Learner(model, prepared.tasks, settings, execution, on_warning=warn)
    if taken := [name for name in LOG_KEYS if name in learner.watches]:
        expected = f"expected other names to watch than the log's own ({', '.join(LOG_KEYS)})"
        raise ValueError(f"objective {settings.objective}: {expected}, got {', '.join(taken)}")
    best = BestState(model, prepared.held, settings.loss) if prepared.held else None
    first = restore_checkpoint(learner, folder, best) if resume and folder is not None else 0
    total, result = learner.total, TrainingResult(steps=first, resumed_from=first)
    watch, start = CollapseWatch(learner.tasks, settings, warn, learner.images_together), time.monotonic()
    agreement = AgreementWatch(warn, settings.sampling.batch_size * len(learner.names))
    with (
        open_log(learner, folder, first) as log,
        eval_mode(model, *(task.head for task in learner.tasks.values())),
        clamped(model, (0.0, 1.0) if settings.optimiser.clamp_lambda else None),
        stop_requested() as stop,
        progress_bar("learning", total, first, progress) as advance,
        contextlib.closing(learner.batches(first, workers)) as batches,
        _last_good_state(learner, folder, log, best),
    ):
        for event in prepared.events:
            log({"event": event.pop("event"), "step": first, **event})
        if best is not None and not best.looks:
            best.look(first)
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
            if AGREEMENT in outcome.watched:
                agreement.look(step, outcome.watched[AGREEMENT])
            result.history.append(entry)
            result.steps = step
            log(entry)
            advance(step, status_of(outcome))
            if best is not None and (step % max(1, total // LOOKS) == 0 or step == total):
                best.look(step)
            if folder is not None and (step % settings.log.checkpoint_every == 0 or step == total or stop()):
                save_checkpoint(learner, folder, step, best)
            if stop() and step < total:
                raise Interrupted(f"stopped after step {step} of {total}", step)
        if best is not None:
            best.put_back()
            result.chosen = {"step": best.step, "agreement": best.score, "looks": best.looks}
            log({"event": "chosen", **result.chosen})
    result.seconds = time.monotonic() - start
    result.collapsed = watch.collapsed
    return result


@contextlib.contextmanager
def _last_good_state(learner: Learner, folder: Path | None, log: Write, best: BestState | None) -> Iterator[None]:
    """Keep the state before a step that fails, and say where it is. Without a folder there is nowhere to keep it."""
    try:
        yield
    except StepFailure as failure:
        if folder is None:
            raise
        step, task, layer, reason = failure.step, failure.task, failure.layer, failure.reason
        save_checkpoint(learner, folder, step - 1, best)
        log({"event": "stopped", "step": step, "task": task, "layer": layer, "reason": reason})
        kept = f"the state after step {step - 1} is in {folder / CHECKPOINT_NAME}"
        raise StepFailure(task, step, layer, reason, kept) from None
