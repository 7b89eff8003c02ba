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
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.checkpoints.files import read_metadata, read_tensors, write_tensors, write_text
from pareto_merging.config import MethodSettings
from pareto_merging.data.sources import BatchStream
from pareto_merging.errors import Interrupted, TrainingError, UserError
from pareto_merging.modes import eval_mode
from pareto_merging.objectives import (
    EntropyTerms,
    WeightDistance,
    cosine_alignment,
    entropy_terms,
    scalarize,
    tensor_norm,
)
from pareto_merging.parametrize import TensorDigest, learned_parameters
from pareto_merging.preferences import (
    check_preference,
    equal_preference,
    merged_once,
    pareto_state,
    preference,
    sample_dirichlet,
)
from pareto_merging.progress import progress_bar

CHECKPOINT_NAME, LOG_NAME = "checkpoint.safetensors", "log.jsonl"
# entropy and mean-prediction entropy are averaged over about this many steps before anything is said about them
SMOOTHING = 0.95
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class MergingTask:
    """One task as the merging sees it: unlabelled images and the frozen head that reads the encoder's features.

    ``images`` is a map-style dataset of image tensors, or of (image, anything) pairs. ``head`` maps features to logits
    [n, classes].
    """

    images: Dataset[Any]
    head: nn.Module


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


Objective: TypeAlias = Callable[[], EntropyTerms]


def pareto_gradient(
    objectives: Sequence[Objective],
    parameters: Sequence[Tensor],
    gamma: Tensor,
    settings: MethodSettings,
    norm: Callable[[], Tensor] | None = None,
) -> tuple[float, list[EntropyTerms], Tensor]:
    """The exact gradient of the loss at the activation memory of one task (design: the loss needs only S_1 … S_K).

    Task by task: forward, backward to the few learned parameters, keep that small gradient, free the activations. Then
    dL/dS_k from the K numbers S, and Σ_k (dL/dS_k)·∇S_k.

    Args:
        objectives: K functions that each run one task's forward. parameters: what to differentiate, P numbers in all.
        gamma: [K]. norm: ‖A·C·Bᵀ‖ of the model at γ, if the settings use it.

    Returns:
        (loss, the K objectives without their graphs, the gradient as one flat tensor [P]); the gradient holds NaN where
        an objective does.
    """
    terms: list[EntropyTerms] = []
    gradients: list[Tensor] = []
    for objective in objectives:
        term = objective()
        gradients.append(_flat_gradient(term.objective, parameters))
        terms.append(EntropyTerms(term.objective.detach(), term.entropy, term.mean_prediction_entropy))
        del term
    values = torch.stack([term.objective for term in terms])
    loss, coefficients = _scalarized(values, gamma.to(values), settings)
    total = coefficients.to(gradients[0].dtype) @ torch.stack(gradients)
    if norm is not None and settings.tensor_norm:
        size = norm()
        loss += settings.tensor_norm * float(size.detach())
        total = total + settings.tensor_norm * _flat_gradient(size, parameters)
    return loss, terms, total


def _scalarized(values: Tensor, gamma: Tensor, settings: MethodSettings) -> tuple[float, Tensor]:
    values = values.detach().requires_grad_()
    loss = scalarize(values, gamma, settings.scalarization, settings.mu)
    if settings.cosine:
        loss = loss - settings.cosine * cosine_alignment(values, gamma)
    (coefficients,) = torch.autograd.grad(loss, values)
    return float(loss.detach()), coefficients


def _flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
    parts = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    return torch.cat([part.reshape(-1).to(parameters[0]) for part in parts])


def learn_pareto_set(
    model: nn.Module,
    tasks: Mapping[str, MergingTask] | None,
    settings: MethodSettings,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    workers: int = 0,
    cache: bool | None = None,
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
        cache: keep the merged weights of a step for all its tasks, at the memory of one more model: by default on the
            CPU, where assembling a weight is slow and memory is not.
        on_warning: what to do with a warning about collapse; by default :func:`warnings.warn`.

    Raises:
        ValueError: tasks that do not match the model's. UserError: a checkpoint of another model or other settings.
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
            if not isinstance(task, MergingTask):
                raise TypeError(f"tasks: expected a MergingTask for {name}, got {type(task).__name__}")
            if not len(task.images):  # type: ignore[arg-type]
                raise ValueError(f"tasks: expected images for {name}, got none")
    if settings.gamma is not None:
        check_preference(settings.gamma, names, per_item=False)
    loop = _Loop(model, tasks, settings, total, folder, cache)
    first = loop.restore() if resume else 0
    if folder is not None:
        loop.open_log(first)
    result = TrainingResult(steps=first, resumed_from=first, seconds=0.0)
    watch = _CollapseWatch(names, tasks, settings, on_warning or (lambda text: warnings.warn(text, stacklevel=3)))
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
    state.lambda_range = bounds
    try:
        yield
    finally:
        state.lambda_range = None
        with torch.no_grad():
            for name, parameter in learned_parameters(model).items():
                if name.startswith("lam."):
                    parameter.clamp_(*bounds)


def _status(outcome: StepResult) -> str:
    text = f"loss {outcome.loss:.4f}"
    if outcome.entropies:
        text += "  entropy " + " ".join(f"{value:.2f}" for value in outcome.entropies)
    return text


class _Loop:
    """The state of one run: the parameters, Adam, the log and the checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, MergingTask] | None,
        settings: MethodSettings,
        total: int,
        folder: Path | None,
        cache: bool | None,
    ) -> None:
        self.model, self.tasks, self.settings, self.total, self.folder = model, tasks, settings, total, folder
        self.names = pareto_state(model).task_names
        everything = learned_parameters(model)
        self.learned = {
            name: parameter
            for name, parameter in everything.items()
            if settings.learn_lambda or not name.startswith("lam.")
        }
        if not self.learned:
            raise ValueError("model: expected something to learn (λ, or a low-rank term), got a model with neither")
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.learned)
        self.parameters = list(self.learned.values())
        self.device = self.parameters[0].device
        # a kernel strategy was asked for to be used, and fused to save the memory that a cache takes
        plain = pareto_state(model).strategy in ("auto", "eager")
        self.cache = (self.device.type == "cpu" and plain) if cache is None else cache
        rates = [settings.learning_rate, settings.lambda_learning_rate or settings.learning_rate]
        groups = [
            {"params": [p for name, p in self.learned.items() if name.startswith("lam.") == is_lambda], "lr": rate}
            for is_lambda, rate in enumerate(rates)
        ]
        self.optimizer = torch.optim.Adam(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.distance = (
            WeightDistance(model, settings.normalize_distance) if settings.objective == "weight-distance" else None
        )
        dtypes = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        self._log: Any = None

    def batches(self, first: int, workers: int) -> Generator[list[Tensor], None, None]:
        """One list of K batches of images per step, from step ``first`` on."""
        if self.tasks is None or self.distance is not None:
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
        """Gradient, checks, Adam, checks; on a NaN or inf nothing of the step remains."""
        gammas = self.gammas(step)
        losses, terms, gradient = [], [], None
        for gamma in gammas:
            gamma = gamma.to(self.device)
            cached = merged_once(self.model) if self.cache else contextlib.nullcontext()
            with preference(self.model, gamma), cached:
                loss, seen, flat = self._gradient(batch, gamma)
                # S and the gradient in one look, so that a GPU is waited for once
                objectives = torch.stack([term.objective for term in seen])
                if not bool(torch.isfinite(torch.cat([objectives, flat.sum()[None].to(objectives)])).all()):
                    raise self._diagnose(step, batch, seen, flat)
            losses.append(loss)
            terms.append(seen)
            gradient = flat if gradient is None else gradient + flat
        assert gradient is not None
        gradient = gradient / len(gammas)
        offset = 0
        for parameter in self.parameters:
            parameter.grad = gradient[offset : offset + parameter.numel()].view_as(parameter).to(parameter)
            offset += parameter.numel()
        before = [tensor.clone() for tensor in self._state()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        after = self._state()
        if not bool(torch.isfinite(torch.stack([tensor.sum().to(self.device) for tensor in after])).all()):
            bad = next((n for n, p in self.learned.items() if not bool(torch.isfinite(p).all())), "Adam's moments")
            self._put_back(before)
            raise self._failure(None, step, bad, "the parameter is not finite after the update")
        return StepResult(
            loss=sum(losses) / len(losses),
            objectives=_means([[float(t.objective) for t in seen] for seen in terms]),
            entropies=[] if self.distance else _means([[float(t.entropy) for t in seen] for seen in terms]),
            mean_prediction_entropies=[]
            if self.distance
            else _means([[float(t.mean_prediction_entropy) for t in seen] for seen in terms]),
            gammas=[[round(value, 6) for value in gamma.tolist()] for gamma in gammas],
        )

    def _state(self) -> list[Tensor]:
        """The learned parameters and, once Adam has stepped, its moments."""
        moments = [
            self.optimizer.state[p][key] for p in self.parameters if p in self.optimizer.state for key in _MOMENTS
        ]
        return [parameter.detach() for parameter in self.parameters] + moments

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

    def _gradient(self, batch: Sequence[Tensor], gamma: Tensor) -> tuple[float, list[EntropyTerms], Tensor]:
        if self.distance is None:
            assert self.tasks is not None
            objectives = [
                lambda images=images, task=task: entropy_terms(
                    task.head(self.model(images)), self.settings.information_maximisation
                )
                for images, task in zip(batch, self.tasks.values(), strict=True)
            ]
            norm = (lambda: tensor_norm(self.model, gamma)) if self.settings.tensor_norm else None
            return pareto_gradient(objectives, self.parameters, gamma, self.settings, norm)
        # closed forms share everything, so one graph serves all tasks
        values = self.distance(gamma)
        loss, coefficients = _scalarized(values, gamma.to(values), self.settings)
        surrogate = (values * coefficients).sum()
        if self.settings.tensor_norm:
            size = tensor_norm(self.model, gamma)
            loss += self.settings.tensor_norm * float(size.detach())
            surrogate = surrogate + self.settings.tensor_norm * size.to(surrogate)
        terms = [EntropyTerms(value, value, value) for value in values.detach()]
        return loss, terms, _flat_gradient(surrogate, self.parameters)

    def _diagnose(
        self, step: int, batch: Sequence[Tensor], terms: Sequence[EntropyTerms], gradient: Tensor
    ) -> TrainingError:
        for index, term in enumerate(terms):
            if bool(torch.isfinite(term.objective)):
                continue
            task, layer = self.names[index], "the closed-form objective"
            if self.tasks is not None and batch:
                layer = first_nonfinite(self.model, self.tasks[task].head, batch[index])
            return self._failure(task, step, layer, f"its objective is {float(term.objective)}")
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
        self.log({**event, "steps": self.total, "remaining": self.total - first})

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
        tensors = {f"parameter.{name}": parameter for name, parameter in learned_parameters(self.model).items()}
        for name, parameter in self.learned.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
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
        for name, parameter in self.learned.items() if step else ():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
                **{key: tensors[f"{key}.{name}"] for key in _MOMENTS},
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
        tasks: Mapping[str, MergingTask] | None,
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
