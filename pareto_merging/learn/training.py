"""Learning a Pareto set: the exact gradient task by task, the loop, its guards, its log and its checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors, write_tensors
from pareto_merging.data.sources import BatchStream
from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, TrainingError, UserError
from pareto_merging.learn.gradient import CudaGraphs, GradientOfStep, TasksAtOnce, widest
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state, preference
from pareto_merging.preferences import check_preference, equal_preference, sample_dirichlet
from pareto_merging.system.files import write_text
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar

CHECKPOINT_NAME, LOG_NAME = "checkpoint.safetensors", "log.jsonl"
# entropy and mean-prediction entropy are averaged over about this many steps before anything is said about them
SMOOTHING = 0.95
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class StepResult:
    """What one optimiser step saw, averaged over its preferences: plain numbers, [K] lists in the tasks' order."""

    loss: float
    objectives: list[float]
    entropies: list[float]
    mean_prediction_entropies: list[float]
    gammas: list[list[float]]


@dataclass
class TrainingResult:
    """``steps`` done in all, of them ``resumed_from`` in an earlier process; one dictionary per step of this one."""

    steps: int
    resumed_from: int
    seconds: float
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
    """Train λ, A, G and B of a Pareto model in place.

    Args:
        model: from :func:`parametrize`; run in eval mode (no dropout, fixed batch-norm statistics), mode restored.
        tasks: by task name, one for each task of the model; None for the data-free ``weight-distance`` objective.
        settings: see :class:`MethodSettings`; rank, low_rank, init_lambda, granularity and buffers are the model's.
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
        ValueError: tasks that do not match the model's, CUDA graphs without a GPU, images of several shapes for all
            tasks at once. UserError: a checkpoint of another model or other settings.
        TrainingError: a NaN or inf, naming task, step and layer; the model and the checkpoint hold the last good state.
        Interrupted: Ctrl-C or SIGTERM; the step in hand was finished and a checkpoint written.
    """
    if not isinstance(settings, MethodSettings):
        raise TypeError(f"settings: expected MethodSettings, got {type(settings).__name__}")
    folder = None if folder is None else Path(folder)
    names = pareto_state(model).task_names
    total = settings.steps_for(len(names))
    if settings.objective == "entropy":
        if tasks is None or set(tasks) != set(names):
            got = "none" if tasks is None else ", ".join(tasks)
            raise ValueError(f"tasks: expected images and a head for each of {', '.join(names)}; got {got}")
        tasks = {name: tasks[name] for name in names}
        for name, task in tasks.items():
            if not isinstance(task, Task):
                raise TypeError(f"tasks: expected a Task for {name}, got {type(task).__name__}")
            if not len(task.images):  # type: ignore[arg-type]
                raise ValueError(f"tasks: expected images for {name}, got none")
    if settings.gamma is not None:
        check_preference(settings.gamma, names, per_item=False)
    warn = on_warning or (lambda text: warnings.warn(text, stacklevel=3))
    loop = Learner(
        model,
        tasks,
        settings,
        total=total,
        folder=folder,
        cache=cache,
        cuda_graphs=cuda_graphs,
        tasks_at_once=tasks_at_once,
        on_warning=warn,
    )
    first = loop.restore() if resume else 0
    if folder is not None:
        loop.open_log(first)
    result = TrainingResult(steps=first, resumed_from=first, seconds=0.0)
    watch = _CollapseWatch(names, tasks, settings, warn)
    start = time.monotonic()
    heads = [] if tasks is None else [task.head for task in tasks.values()]
    try:
        with (
            eval_mode(model, *heads),
            _clamped(model, (0.0, 1.0) if settings.clamp_lambda else None),
            _stop_requested() as stop,
            progress_bar("learning", total, first, progress) as advance,
            contextlib.closing(loop.batches(first, workers)) as batches,
        ):
            for step, batch in enumerate(batches, start=first + 1):
                outcome = loop.step(step, batch)
                entry = loop.entry(step, outcome, start)
                entry["warnings"] = watch.look(step, outcome)
                result.history.append(entry)
                result.steps = step
                loop.log(entry)
                advance(step, _status(outcome))
                if step % settings.checkpoint_every == 0 or step == total or stop():
                    loop.save(step)
                if stop() and step < total:
                    raise Interrupted(f"stopped after step {step} of {total}", step)
    finally:
        loop.close()
    result.seconds = time.monotonic() - start
    result.collapsed = watch.collapsed
    return result


@contextlib.contextmanager
def _clamped(model: nn.Module, bounds: tuple[float, float] | None) -> Iterator[None]:
    """λ is used clamped inside, and learned and checkpointed as it is; afterwards the model holds what was used."""
    if bounds is None:
        yield
        return
    state = pareto_state(model)
    state.now.lambda_range = bounds
    try:
        yield
    finally:
        state.now.lambda_range = None
        with torch.no_grad():
            for name, parameter in learned_parameters(model).items():
                if name.startswith("lam."):
                    parameter.clamp_(*bounds)


def _status(outcome: StepResult) -> str:
    text = f"loss {outcome.loss:.4f}"
    if outcome.entropies:
        text += "  entropy " + " ".join(f"{value:.2f}" for value in outcome.entropies)
    return text


class Learner:
    """The state of one run: the parameters, Adam, the log and the checkpoint. :meth:`step` is one optimiser step.

    The hundreds of small learned parameters are stepped as two long vectors, λ and the rest (which may differ in their
    rate), and copied to their places in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task] | None,
        settings: MethodSettings,
        *,
        total: int | None = None,
        folder: Path | None = None,
        cache: bool | None = None,
        cuda_graphs: CudaGraphs = "auto",
        tasks_at_once: TasksAtOnce = "one",
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self.names = pareto_state(model).task_names
        if settings.objective == "entropy":
            if tasks is None or set(tasks) != set(self.names):
                got = "none" if tasks is None else ", ".join(tasks)
                raise ValueError(f"tasks: expected images and a head for each of {', '.join(self.names)}; got {got}")
            tasks = {name: tasks[name] for name in self.names}
        self.model, self.tasks, self.settings, self.folder = model, tasks, settings, folder
        self.total = settings.steps_for(len(self.names)) if total is None else total
        everything = learned_parameters(model)
        lambdas, others = (
            {name: p for name, p in everything.items() if name.startswith("lam.") == wanted} for wanted in (True, False)
        )
        self.learned = {**(lambdas if settings.learn_lambda else {}), **others}
        if not self.learned:
            raise ValueError("model: expected something to learn (λ, or a low-rank term), got a model with neither")
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.learned)
        self.parameters = list(self.learned.values())
        self.device, self.wide = self.parameters[0].device, widest(self.parameters)
        rates = (settings.lambda_learning_rate or settings.learning_rate, settings.learning_rate)
        groups = [
            (list(group), rate)
            for group, rate in zip((lambdas if settings.learn_lambda else {}, others), rates, strict=True)
            if group
        ]
        self._groups = [names for names, _ in groups]
        self._flat = [nn.Parameter(self._gathered(self.learned, names)) for names in self._groups]
        self.optimizer = torch.optim.Adam(
            [{"params": [flat], "lr": rate} for flat, (_, rate) in zip(self._flat, groups, strict=True)],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.gradient = GradientOfStep(
            model,
            None if tasks is None or settings.objective != "entropy" else [task.head for task in tasks.values()],
            self.learned,
            settings,
            cache=cache,
            cuda_graphs=cuda_graphs,
            tasks_at_once=tasks_at_once,
            on_warning=on_warning,
        )
        dtypes = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        self._log: Any = None

    def _gathered(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """The tensors of these names as one long vector."""
        return torch.cat([tensors[name].detach().reshape(-1).to(self.device, self.wide) for name in names])

    def _places(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """By parameter name, views of λ's and the others' long vectors, or of moments laid out alike."""
        return {
            name: part.view(self.learned[name].shape)
            for vector, names in zip(vectors, self._groups, strict=True)
            for name, part in zip(
                names, vector.detach().split([self.learned[name].numel() for name in names]), strict=True
            )
        }

    def _scatter(self) -> None:
        """The long vectors' values to the model's parameters."""
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), list(self._places(self._flat).values()))

    def batches(self, first: int, workers: int) -> Generator[list[Tensor], None, None]:
        """One list of K batches of images per step, from step ``first`` on."""
        if self.tasks is None or self.gradient.heads is None:
            for _ in range(first, self.total):
                yield []
            return
        seed, size = self.settings.seed, self.settings.batch_size
        streams = [
            BatchStream(task.images, size, first, self.total, (seed, 1, index), workers)
            for index, task in enumerate(self.tasks.values())
        ]
        for _ in range(first, self.total):
            yield [self._on_device(next(stream)) for stream in streams]

    def _on_device(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)

    def gammas(self, step: int) -> list[Tensor]:
        """The preferences of one step: a function of the seed and the step alone."""
        tasks = len(self.names)
        if self.settings.preference == "equal":
            return [equal_preference(tasks)]
        if self.settings.gamma is not None:
            return [check_preference(self.settings.gamma, self.names, per_item=False)]
        rng = np.random.default_rng([self.settings.seed, 2, step])
        return [
            sample_dirichlet(self.settings.concentration, tasks, rng) for _ in range(self.settings.preferences_per_step)
        ]

    def step(self, step: int, batch: Sequence[Tensor]) -> StepResult:
        """Gradient, Adam, checks; on a NaN or inf nothing of the step remains. Waits for the device once.

        ``batch``: the images of each task on the device; empty for the data-free objective.
        """
        gammas = self.gammas(step)
        seen, gradients = [], []
        for gamma in gammas:
            outcome = self.gradient(batch, gamma)
            seen.append(torch.cat([outcome.loss.reshape(1).to(outcome.terms), outcome.terms.reshape(-1)]))
            # the next call overwrites it
            gradients.append(outcome.gradient.clone() if len(gammas) > 1 else outcome.gradient)
        gradient = gradients[0] if len(gammas) == 1 else torch.stack(gradients).mean(dim=0)
        before = [tensor.clone() for tensor in self._state()]
        for flat, part in zip(self._flat, gradient.split([f.numel() for f in self._flat]), strict=True):
            flat.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums = torch.stack([tensor.sum() for tensor in (gradient, *self._state())])
        numbers = torch.cat([torch.stack(seen).reshape(-1).to(torch.float64), sums.to(torch.float64)]).tolist()
        tasks, wide = len(self.names), 3 * len(self.names) + 1
        rows = [numbers[i * wide : (i + 1) * wide] for i in range(len(gammas))]
        terms = [[row[1 + 3 * k : 4 + 3 * k] for k in range(tasks)] for row in rows]
        sound = [all(math.isfinite(term[0]) for term in row) for row in terms]
        if not all(sound) or not all(map(math.isfinite, numbers[len(rows) * wide :])):
            raise self._failed(step, batch, gammas, terms, sound, gradients, before)
        self._scatter()
        return StepResult(
            loss=sum(row[0] for row in rows) / len(rows),
            objectives=_means([[term[0] for term in row] for row in terms]),
            entropies=_means([[term[1] for term in row] for row in terms]) if self.gradient.heads is not None else [],
            mean_prediction_entropies=_means([[term[2] for term in row] for row in terms])
            if self.gradient.heads is not None
            else [],
            gammas=[[round(value, 6) for value in gamma.tolist()] for gamma in gammas],
        )

    def _failed(
        self,
        step: int,
        batch: Sequence[Tensor],
        gammas: Sequence[Tensor],
        terms: Sequence[Sequence[Sequence[float]]],
        sound: Sequence[bool],
        gradients: Sequence[Tensor],
        before: Sequence[Tensor],
    ) -> TrainingError:
        """What went wrong, after everything is as it was before the step."""
        updated = self._places([flat.clone() for flat in self._flat])
        self._put_back(before)
        for gamma, row, fine, gradient in zip(gammas, terms, sound, gradients, strict=True):
            if not fine or not bool(torch.isfinite(gradient).all()):
                with preference(self.model, gamma):
                    return self._diagnose(step, batch, [term[0] for term in row], gradient)
        bad = next((name for name, value in updated.items() if not bool(torch.isfinite(value).all())), None)
        return self._failure(None, step, bad or "Adam's moments", "the parameter is not finite after the update")

    def _state(self) -> list[Tensor]:
        """The long vectors and, once Adam has stepped, its moments."""
        moments = [self.optimizer.state[p][key] for p in self._flat if p in self.optimizer.state for key in _MOMENTS]
        return [flat.detach() for flat in self._flat] + moments

    def _put_back(self, before: Sequence[Tensor]) -> None:
        """Undo an update of Adam."""
        now = self._state()
        for tensor, value in zip(now, before, strict=False):
            tensor.copy_(value)
        if len(before) < len(now):
            # it was the first: there were no moments
            self.optimizer.state.clear()
        else:
            for state in self.optimizer.state.values():
                state["step"] -= 1

    def _diagnose(
        self, step: int, batch: Sequence[Tensor], objectives: Sequence[float], gradient: Tensor
    ) -> TrainingError:
        for index, objective in enumerate(objectives):
            if math.isfinite(objective):
                continue
            task, layer = self.names[index], "the closed-form objective"
            if self.tasks is not None and batch:
                layer = first_nonfinite(self.model, self.tasks[task].head, batch[index])
            return self._failure(task, step, layer, f"its objective is {objective}")
        offset = 0
        for name, parameter in self.learned.items():
            if not bool(torch.isfinite(gradient[offset : offset + parameter.numel()]).all()):
                return self._failure(None, step, name, "its gradient is not finite")
            offset += parameter.numel()
        return self._failure(None, step, "the sum of the gradient", "it overflows")

    def _failure(self, task: str | None, step: int, layer: str, what: str) -> TrainingError:
        kept = "the model holds the state before it"
        if self.folder is not None:
            self.save(step - 1)
            kept = f"the state after step {step - 1} is in {self.folder / CHECKPOINT_NAME}"
            self.log({"event": "stopped", "step": step, "task": task, "layer": layer, "reason": what})
        where = f"task {task}, " if task is not None else ""
        return TrainingError(f"step {step}, {where}{layer}: {what}; {kept}", task, step, layer)

    def entry(self, step: int, outcome: StepResult, start: float) -> dict[str, Any]:
        """One line of the log."""
        entry: dict[str, Any] = {"step": step, "loss": outcome.loss, "gamma": outcome.gammas}
        if outcome.entropies:
            entry["entropy"] = dict(zip(self.names, outcome.entropies, strict=True))
            entry["mean_prediction_entropy"] = dict(zip(self.names, outcome.mean_prediction_entropies, strict=True))
        entry["objective"] = dict(zip(self.names, outcome.objectives, strict=True))
        entry["seconds"] = round(time.monotonic() - start, 3)
        return entry

    # the log

    def open_log(self, first: int) -> None:
        """Start the log, or keep its lines up to step ``first`` and say that the run goes on from there."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG_NAME
        kept = []
        if first and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # a killed run may have left half a line
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= first:
                        kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))
        self._log = path.open("a", buffering=1, encoding="utf-8")
        event = {"event": "resumed", "step": first} if first else {"event": "started", "step": 0}
        state = pareto_state(self.model)
        weights = {
            "event": "weights",
            "step": first,
            "dtype": str(self.dtype).removeprefix("torch."),
            "stored": state.stored_dtypes,
            "rounding_error": state.rounding_error,
        }
        self.log({**event, "steps": self.total, "remaining": self.total - first})
        self.log(weights)

    def log(self, entry: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._log.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    # checkpoints

    def save(self, step: int) -> None:
        """Write the learned parameters, Adam's moments, the step and what they belong to, atomically."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {f"parameter.{n}": p for n, p in learned_parameters(self.model).items()}
        for key in _MOMENTS if self.optimizer.state else ():
            moments = self._places([self.optimizer.state[flat][key] for flat in self._flat])
            tensors.update({f"{key}.{name}": moment for name, moment in moments.items()})
        metadata = {"format": "pareto-checkpoint", "step": step, **self._identity()}
        write_tensors(self.folder / CHECKPOINT_NAME, tensors, metadata)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on with: the settings, the tasks, the weights and the heads."""
        state = pareto_state(self.model)
        # how often to save changes nothing about the result
        settings = {k: v for k, v in json.loads(self.settings.model_dump_json()).items() if k != "checkpoint_every"}
        heads = {}
        for name, task in (self.tasks or {}).items():
            digest = TensorDigest()
            for key, tensor in task.head.state_dict().items():
                if isinstance(tensor, Tensor):
                    digest.add(key, tensor)
            heads[name] = digest.hexdigest()
        model = json.loads(json.dumps(state.settings))
        return {
            "settings": settings,
            "task_names": list(self.names),
            "model": model,
            "digests": state.digests,
            "heads": heads,
        }

    def restore(self) -> int:
        """Load the folder's checkpoint and return how many steps it has done; 0 if there is none."""
        if self.folder is None or not (self.folder / CHECKPOINT_NAME).exists():
            return 0
        path = self.folder / CHECKPOINT_NAME
        metadata = read_metadata(path)
        if metadata.get("format") != "pareto-checkpoint":
            raise UserError(f"{path}: expected a training checkpoint, got another safetensors file")
        differs = []
        for part, now in self._identity().items():
            try:
                saved = json.loads(metadata.get(part, ""))
            except ValueError as error:
                raise UserError(f"{path}: expected {part} in the header of a checkpoint, got none") from error
            if saved == now:
                continue
            if not isinstance(saved, dict) or not isinstance(now, dict):
                differs.append(f"{part} ({saved!r}, now {now!r})")
                continue
            label = "" if part == "settings" else f"{part}: "
            differs += [
                f"{label}{key} ({_short(saved.get(key))}, now {_short(now.get(key))})"
                for key in [*now, *(key for key in saved if key not in now)]
                if saved.get(key) != now.get(key)
            ]
        if differs:
            raise UserError(
                f"{path}: expected one of the same settings and weights, but it differs in {', '.join(differs)}"
            )
        step = int(metadata["step"]) if metadata.get("step", "").isdecimal() else -1
        if not 0 <= step <= self.total:
            raise UserError(f"{path}: expected a step from 0 to {self.total}, got {metadata.get('step')!r}")
        tensors = read_tensors(path, self.device)
        everything = learned_parameters(self.model)
        wanted = {f"parameter.{name}": parameter for name, parameter in everything.items()}
        if step:
            wanted |= {f"{key}.{name}": p for name, p in self.learned.items() for key in _MOMENTS}
        for name, parameter in wanted.items():
            value = tensors.get(name)
            if value is None or value.shape != parameter.shape:
                raise UserError(f"{path}: expected {name} of shape {list(parameter.shape)}, got {_shape(value)}")
            if not bool(torch.isfinite(value).all()):
                raise UserError(f"{path}: expected finite numbers in {name}, got NaN or inf")
        with torch.no_grad():
            for name, parameter in everything.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        with torch.no_grad():
            for flat, names in zip(self._flat, self._groups, strict=True):
                flat.copy_(self._gathered(self.learned, names))
                if step:
                    self.optimizer.state[flat] = {
                        "step": torch.tensor(float(step), dtype=torch.float32, device=flat.device),
                        **{key: self._gathered(tensors, [f"{key}.{name}" for name in names]) for key in _MOMENTS},
                    }
        return step


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)


def _shape(value: Tensor | None) -> str:
    return "none" if value is None else str(list(value.shape))


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


class _CollapseWatch:
    """Watches the entropy of each task's mean prediction, which falls when every image ends up in one class.

    On a batch of n images and C classes it can reach log min(n, C); staying under a share of that is reported once.
    """

    def __init__(
        self,
        names: Sequence[str],
        tasks: Mapping[str, Task] | None,
        settings: MethodSettings,
        warn: Callable[[str], None],
    ) -> None:
        self.names, self.settings, self.warn = names, settings, warn
        self.collapsed: list[str] = []
        self._means: list[float] | None = None
        self._seen = 0
        self._ceilings: list[float] | None = None
        self._tasks = tasks

    def look(self, step: int, outcome: StepResult) -> list[str]:
        """Update the running means; warn of and return the tasks that have newly collapsed."""
        values = outcome.mean_prediction_entropies
        if not values or self._tasks is None:
            return []
        if self._means is None:
            self._means = list(values)
            self._ceilings = [
                math.log(max(2, min(self.settings.batch_size, _classes(task.head)))) for task in self._tasks.values()
            ]
        assert self._ceilings is not None
        self._seen += 1
        self._means = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(self._means, values, strict=True)]
        new: list[str] = []
        if self._seen < 1 / (1 - SMOOTHING):
            return new
        for name, mean, ceiling in zip(self.names, self._means, self._ceilings, strict=True):
            if name not in self.collapsed and mean < self.settings.collapse_threshold * ceiling:
                self.collapsed.append(name)
                new.append(name)
                self.warn(
                    f"step {step}: task {name} may be collapsing: the entropy of its mean prediction is {mean:.2f} of "
                    f"at most {ceiling:.2f} (most images fall into few classes); consider information_maximisation, a "
                    "larger tensor_norm or fewer steps"
                )
        return new


def _classes(head: nn.Module) -> int:
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else 2**31


def first_nonfinite(model: nn.Module, head: nn.Module, images: Tensor) -> str:
    """Where a NaN or inf first appears on the way from images [n, …] to logits: a parameter's or a module's name."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"parameter {name}"
    if not bool(torch.isfinite(images).all()):
        return "the images"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if not found and any(
                isinstance(o, Tensor) and o.is_floating_point() and not bool(torch.isfinite(o).all()) for o in outputs
            ):
                found.append(f"layer {name or 'the whole model'}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            logits = head(model(images))
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "the head" if not bool(torch.isfinite(logits).all()) else "the objective"


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C or SIGTERM has come; a second Ctrl-C interrupts at once as usual."""
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
