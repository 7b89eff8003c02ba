"""One optimiser step: preferences, gradient, Adam, and checks. A step that fails never was."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pareto_merging.data.sources import BatchStream, batch_indices, images_in_order
from pareto_merging.data.tasks import NoHead, Task
from pareto_merging.errors import TrainingError
from pareto_merging.learn.adam import Adam, pieces
from pareto_merging.learn.gradient import Execution, GradientOfStep, StepGradient
from pareto_merging.learn.guards import first_nonfinite
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.per_item import item_preferences, why_not_per_item
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state, preference
from pareto_merging.preferences import check_preference, equal_preference, sample_dirichlet
from pareto_merging.system.modes import eval_mode


@dataclass
class StepResult:
    """What one optimiser step saw, averaged over its preferences. Plain numbers, [K] lists in the tasks' order."""

    loss: float
    objectives: list[float]
    gammas: list[list[float]]
    watched: dict[str, list[float]] = field(default_factory=dict)


class StepFailure(TrainingError):
    """A step that was undone, because something in it was not finite."""

    def __init__(
        self, task: str | None, step: int, layer: str, reason: str, kept: str = "the model holds the state before it"
    ) -> None:
        where = f"task {task}, " if task is not None else ""
        super().__init__(f"step {step}, {where}{layer}: {reason}; {kept}", task, step, layer)
        self.reason = reason


class Learner:
    """The parameters, their gradient and Adam. Args, and the errors they raise, as of :func:`learn_pareto_set`."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task] | None,
        settings: MethodSettings,
        execution: Execution | None = None,
        *,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        state = pareto_state(model)
        self.names = state.task_names
        everything = learned_parameters(model)
        has_core = any(name.startswith("G.") for name in everything)
        settings.check_model(state.settings, has_core=has_core, start=state.start)
        self.needs_images = OBJECTIVES[settings.loss.objective].needs != "weights"
        self.tasks = checked_tasks(tasks, self.names, settings) if self.needs_images else dict(tasks or {})
        gamma = settings.sampling.gamma
        self._fixed = None if gamma is None else check_preference(gamma, self.names, per_item=False)
        self.model, self.settings = model, settings
        self.total = settings.steps_for(len(self.names))
        # λ first, as Adam's long vectors and the gradient have it
        learn_lambda = settings.optimiser.learn_lambda
        self.learned = {name: p for name, p in everything.items() if learn_lambda or not name.startswith("lam.")}
        if not self.learned:
            raise ValueError("model: expected something to learn (λ, or a low-rank term), got a model with neither")
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.learned)
        self.adam = Adam(self.learned, settings.optimiser)
        self.device = self.adam.device
        # a teacher may run the model
        with eval_mode(model, *(task.head for task in self.tasks.values())):
            self.gradient = GradientOfStep(model, self.tasks, self.learned, settings, execution, on_warning=on_warning)
        self.objective = self.gradient.objective
        self.watches = self.objective.watches if self.needs_images else ()
        dtypes = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        self.why_in_parts: str | None = None
        # of a task, at one preference or each at its own
        self.images_together = settings.sampling.batch_size
        self.per_item = self.gradient.per_item
        if self.per_item:
            self._choose_parts(on_warning)

    def _choose_parts(self, on_warning: Callable[[str], None] | None) -> None:
        """Find out if the model takes a preference per item. Else images are cut into parts of one preference."""
        first = next(iter(self.tasks.values()))
        images = self._on_device(next(images_in_order(first.images, 2, 2)))
        with eval_mode(self.model):
            self.why_in_parts = why_not_per_item(self.model, images)
        if self.why_in_parts is None:
            return
        self.gradient.take_parts()
        parts = item_preferences(self.settings.sampling, len(self.names), 1, in_parts=True).shape[1]
        self.images_together = max(1, self.settings.sampling.batch_size // parts)
        if on_warning is not None:
            on_warning(
                f"preference: going on with {parts} preferences per task and step instead of one per item, because "
                f"the model takes one at a time: {self.why_in_parts}"
            )

    def batches(self, first: int, workers: int) -> Generator[list[Tensor], None, None]:
        """Yield one list of K batches of images per step, after step ``first``. Empty where none are needed."""
        size = self.settings.sampling.batch_size
        tasks = enumerate(self.tasks.values() if self.needs_images else ())
        streams = [BatchStream(t.images, size, first, self.total, self._order(k), workers) for k, t in tasks]
        for _ in range(first, self.total):
            yield [self._on_device(next(stream)) for stream in streams]

    def _order(self, task: int) -> tuple[int, int, int]:
        """Return the seed of the order of a task's images."""
        return self.settings.sampling.seed, 1, task

    def _on_device(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)

    def gammas(self, step: int) -> list[Tensor]:
        """Return the preferences of one step: a function of the seed and the step alone."""
        tasks, sampling = len(self.names), self.settings.sampling
        if sampling.preference == "equal":
            return [equal_preference(tasks)]
        if self._fixed is not None:
            return [self._fixed]
        if sampling.preference == "per-item":
            return [item_preferences(sampling, tasks, step, in_parts=self.why_in_parts is not None)]
        rng = np.random.default_rng([sampling.seed, 2, step])
        return [sample_dirichlet(sampling.concentration, tasks, rng) for _ in range(sampling.preferences_per_step)]

    def _targets(self, step: int, batch: Sequence[Tensor]) -> list[Tensor]:
        """Return what the objective wants beside the images of this step. Empty where it wants nothing."""
        if not self.objective.has_targets:
            return []
        targets, size = [], self.settings.sampling.batch_size
        for k, task in enumerate(self.tasks.values()):
            indices = batch_indices(len(task.images), size, step - 1, self._order(k))  # type: ignore[arg-type]
            targets.append(self.objective.targets_of(k, indices, batch[k]).to(self.device))
        return targets

    def step(self, step: int, batch: Sequence[Tensor]) -> StepResult:
        """Move what is learned by one step of Adam. Waits for the device once.

        ``batch``: the images of each task on the device; empty for an objective on weights. Raises StepFailure if
        objectives, gradient or new parameters are not finite; then nothing of the step remains.
        """
        targets, gammas = self._targets(step, batch), self.gammas(step)
        outcomes = []
        for gamma in gammas:
            outcome = self.gradient(batch, gamma, targets)
            # the next call overwrites it
            outcomes.append(outcome if len(gammas) == 1 else StepGradient(*(t.clone() for t in outcome)))
        gradients = [outcome.gradient for outcome in outcomes]
        gradient = gradients[0] if len(gammas) == 1 else torch.stack(gradients).mean(dim=0)
        before = [tensor.clone() for tensor in self.adam.state()]
        self.adam.step(gradient, self._share_of_rates(step))
        losses, terms, sums = self._read(outcomes, [gradient, *self.adam.state()])
        if not bool(torch.isfinite(terms[..., 0]).all() and torch.isfinite(sums).all()):
            seen = list(zip(gammas, gradients, terms[..., 0].tolist(), strict=True))
            raise self._failed(step, batch, targets, seen, before)
        self.adam.scatter()
        objectives, *watched = (_means(column.tolist()) for column in terms.unbind(dim=2))
        # per item, of each task the mean
        rows = gammas[0].mean(dim=1) if self.per_item else gammas
        rounded = [[round(value, 6) for value in gamma.tolist()] for gamma in rows]
        by_name = dict(zip(self.watches, watched, strict=True))
        return StepResult(sum(losses) / len(losses), objectives, rounded, by_name)

    def _share_of_rates(self, step: int) -> float:
        """Return what warm-up and schedule make of the rates at a step, from 1 on."""
        optimiser = self.settings.optimiser
        share = min(1.0, step / optimiser.warm_up) if optimiser.warm_up else 1.0
        if optimiser.schedule == "constant":
            return share
        return share * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.total))

    def _read(self, outcomes: Sequence[StepGradient], summed: Sequence[Tensor]) -> tuple[list[float], Tensor, Tensor]:
        """Return losses, terms [preferences, K, 1 + watched] and sums on the host. Waits for the device once."""
        shape = (len(self.names), 1 + len(self.watches))
        if outcomes[0].terms.shape != shape:
            expected = f"{shape[1]} numbers of each of {shape[0]} tasks"
            got = list(outcomes[0].terms.shape)
            raise ValueError(f"objective {self.settings.loss.objective}: expected {expected}, got {got}")
        parts = (
            torch.stack([outcome.loss for outcome in outcomes]),
            torch.stack([outcome.terms for outcome in outcomes]),
            torch.stack([tensor.sum() for tensor in summed]),
        )
        numbers = torch.cat([part.reshape(-1).to(torch.float64) for part in parts]).cpu()
        losses, terms, sums = numbers.split([part.numel() for part in parts])
        return losses.tolist(), terms.view(len(outcomes), *shape), sums

    def _failed(
        self,
        step: int,
        batch: Sequence[Tensor],
        targets: Sequence[Tensor],
        seen: Sequence[tuple[Tensor, Tensor, Any]],
        before: Sequence[Tensor],
    ) -> StepFailure:
        """Return what went wrong, after everything is as it was before the step. ``seen``: γ, gradient and S."""
        updated = self.adam.places([vector.clone() for vector in self.adam.vectors])
        self.adam.put_back(before)
        for gamma, gradient, values in seen:
            if not all(map(math.isfinite, values)) or not bool(torch.isfinite(gradient).all()):
                one = gamma.flatten(0, -2).mean(dim=0) if self.per_item else gamma
                with preference(self.model, one):
                    return self._diagnosed(step, batch, targets, gradient, values)
        bad = next((name for name, value in updated.items() if not bool(torch.isfinite(value).all())), None)
        return StepFailure(None, step, bad or "Adam's moments", "the parameter is not finite after the update")

    def _diagnosed(
        self,
        step: int,
        batch: Sequence[Tensor],
        targets: Sequence[Tensor],
        gradient: Tensor,
        objectives: Sequence[float],
    ) -> StepFailure:
        for index, objective in enumerate(objectives):
            if math.isfinite(objective):
                continue
            task, layer = self.names[index], "the closed-form objective"
            if batch:
                layer = first_nonfinite(self.model, self.tasks[task].head, batch[index])
                if targets and not bool(torch.isfinite(targets[index]).all()):
                    layer = "what its teacher says"
            return StepFailure(task, step, layer, f"its objective is {objective}")
        for name, part in zip(self.learned, pieces(gradient, self.adam.parameters), strict=True):
            if not bool(torch.isfinite(part).all()):
                return StepFailure(None, step, name, "its gradient is not finite")
        return StepFailure(None, step, "the sum of the gradient", "it overflows")


def checked_tasks(tasks: Mapping[str, Task] | None, names: Sequence[str], settings: MethodSettings) -> dict[str, Task]:
    """Return the tasks in the model's order. ValueError or TypeError if they are not the model's, or lack something."""
    kind = OBJECTIVES[settings.loss.objective]
    if tasks is None or set(tasks) != set(names):
        got = "none" if tasks is None else ", ".join(tasks)
        raise ValueError(f"tasks: expected images and a head for each of {', '.join(names)}; got {got}")
    for name in names:
        if not isinstance(tasks[name], Task):
            raise TypeError(f"tasks: expected a Task for {name}, got {type(tasks[name]).__name__}")
        if not len(tasks[name].images):  # type: ignore[arg-type]
            raise ValueError(f"tasks: expected images for {name}, got none")
        if kind.needs == "images" and isinstance(tasks[name].head, NoHead):
            raise ValueError(f"tasks: expected a head for {name} with the objective {kind.name}, got none")
    return {name: tasks[name] for name in names}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
