"""The gradient of one optimiser step: exact, at the activation memory of one task.

The loss depends on the learned parameters only through S_1 … S_K and the closed-form norm. So for each task: forward,
backward, keep that task's small gradient, free its activations (a micro-step); then dL/dS_k from the K numbers S, and
Σ_k (dL/dS_k)·∇S_k.

Around that, what makes it fast: merged weights are kept for the K micro-steps (:mod:`pareto_merging.model.cache`), what
is small is merged and differentiated at once (:mod:`.gathered`), the images and γ lie at fixed places, and on a GPU the
whole of it is captured once and replayed, so that Python launches one graph instead of thousands of kernels.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.flat import flat_gradient
from pareto_merging.learn.gathered import Gathered
from pareto_merging.learn.objectives import OBJECTIVES, TaskTerms
from pareto_merging.learn.regularizers import cosine_alignment, tensor_norm
from pareto_merging.learn.scalarize import scalarize
from pareto_merging.learn.settings import LossSettings, MethodSettings
from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.state import pareto_state
from pmkernels.autocast import autocast_enabled
from pmkernels.graphs import capture, warm_up

CudaGraphs: TypeAlias = Literal["auto", "on", "off"]
TasksAtOnce: TypeAlias = Literal["one", "all"]


@dataclass(frozen=True)
class Execution:
    """How a step is computed: nothing of it changes the result but its rounding.

    Attributes:
        cache: keep merged weights for the K tasks; None: by the model's strategy and memory budget, on the CPU always
            and on a GPU where half of what is free suffices.
        cuda_graphs: ``"on"``; ``"off"``; ``"auto"``: on a GPU, unless the model cannot be captured.
        tasks_at_once: ``"one"``, at the activation memory of one task; ``"all"``: see :func:`learn_pareto_set`.
    """

    cache: bool | None = None
    cuda_graphs: CudaGraphs = "auto"
    tasks_at_once: TasksAtOnce = "one"

    def __post_init__(self) -> None:
        if self.tasks_at_once not in ("one", "all"):
            raise ValueError(f"tasks_at_once: expected one or all, got {self.tasks_at_once!r}")
        if self.cache is not None and not isinstance(self.cache, bool):
            raise TypeError(f"cache: expected True, False or None, got {self.cache!r}")
        if self.cuda_graphs not in ("auto", "on", "off"):
            raise ValueError(f"cuda_graphs: expected auto, on or off, got {self.cuda_graphs!r}")


class StepGradient(NamedTuple):
    """The outcome of one preference, on the device.

    ``loss`` []; of each task S_k and what its objective watches [K, 1 + watched]; the gradient [P].
    """

    loss: Tensor
    terms: Tensor
    gradient: Tensor


def pareto_gradient(
    objectives: Sequence[Callable[[], TaskTerms]],
    parameters: Sequence[Tensor],
    gamma: Tensor,
    settings: LossSettings,
    norm: Callable[[], Tensor] | None = None,
    gathered: Gathered | None = None,
) -> StepGradient:
    """Return the exact gradient of the loss at the activation memory of one task.

    The loss needs only S_1 … S_K. Nothing here waits for the device. The gradient holds NaN where an objective does.

    Args:
        objectives: K functions that each run one task's forward. parameters: what to differentiate, P numbers in all.
        gamma: [K]. norm: ‖A·C·Bᵀ‖ of the model at γ, if the settings use it.
        gathered: what differentiates by the parameters instead of autograd alone.
    """
    rows, gradients = [], []
    for objective in objectives:
        term = objective()
        value = term.objective
        gradients.append(flat_gradient(value, parameters) if gathered is None else gathered.gradient(value))
        rows.append(_row(term))
        del term, value
    terms = torch.stack(rows)
    loss, coefficients = _scalarized(terms[:, 0], gamma, settings)
    total = coefficients.to(gradients[0].dtype) @ torch.stack(gradients)
    if gathered is not None:
        total = gathered.finish(total)
    return _with_norm(StepGradient(loss, terms, total), parameters, settings, norm)


def _row(term: TaskTerms) -> Tensor:
    return torch.stack([term.objective.detach(), *term.watched])


def _with_norm(
    outcome: StepGradient, parameters: Sequence[Tensor], settings: LossSettings, norm: Callable[[], Tensor] | None
) -> StepGradient:
    """Return the outcome with the norm's share in loss and gradient."""
    if norm is None or not settings.tensor_norm:
        return outcome
    loss, terms, gradient = outcome
    size = norm()
    loss = loss + settings.tensor_norm * size.detach().to(loss)
    return StepGradient(loss, terms, gradient + settings.tensor_norm * flat_gradient(size, parameters))


def _scalarized(values: Tensor, gamma: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Return the loss of S_1 … S_K without the norm, and its derivatives [K]."""
    values, gamma = values.detach().requires_grad_(), gamma.detach().to(values)
    loss = scalarize(values, gamma, settings.scalarization, settings.mu)
    if settings.cosine:
        loss = loss - settings.cosine * cosine_alignment(values, gamma)
    (coefficients,) = torch.autograd.grad(loss, values)
    return loss.detach(), coefficients


_NOTHING = contextlib.nullcontext()


class GradientOfStep:
    """(batch, γ) -> :class:`StepGradient` of a model's learned parameters, in their order.

    Args:
        model: a Pareto model in eval mode. tasks: by name, in the model's order, where the objective needs images.
        learned: name -> parameter. settings: objective, scalarisation and regularisers.
        execution: how it is computed. on_warning: told why a graph could not be captured in ``"auto"``.

    What it returns may be overwritten by the next call.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task],
        learned: Mapping[str, nn.Parameter],
        settings: MethodSettings,
        execution: Execution | None = None,
        *,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        execution = execution or Execution()
        kind = OBJECTIVES[settings.loss.objective]
        self.model, self.settings, self.tasks_at_once = model, settings.loss, execution.tasks_at_once
        self.state = pareto_state(model)
        self.parameters = list(learned.values())
        self.device = self.parameters[0].device
        if execution.cuda_graphs == "on" and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: expected auto or off without a CUDA GPU, got 'on' for {self.device}")
        self.heads = [task.head for task in tasks.values()] if kind.needs == "images" else []
        self._check_heads()
        self.graphs: CudaGraphs = execution.cuda_graphs if self.device.type == "cuda" else "off"
        self.on_warning = on_warning or (lambda text: None)
        self.cache = self._cache(execution.cache)
        if self.cache is not None and self.state.now.cache is not None:
            # one more model in memory, not two
            self.state.now.cache.clear()
        self.objective = kind(model, tasks, settings)
        self.gathered = Gathered(model, learned) if kind.needs == "images" else None
        self.gamma = torch.zeros(len(self.state.task_names), dtype=torch.float32, device=self.device)
        # the images of each task, then what the objective wants beside them
        self._inputs: list[Tensor] = []
        self._shapes: list[Any] = []
        self._graph: Any = None
        self._outputs: StepGradient | None = None
        self._warm = False

    def _check_heads(self) -> None:
        for name, head in zip(self.state.task_names, self.heads, strict=False):
            for part, tensor in itertools.chain(head.named_parameters(), head.named_buffers()):
                if tensor.device != self.device:
                    raise ValueError(
                        f"tasks: expected the head of {name} on {self.device}, where the model is, got {part} on "
                        f"{tensor.device}"
                    )

    def _cache(self, wanted: bool | None) -> MergedWeights | None:
        strategy, budget = self.state.now.strategy, self.state.now.memory_budget
        # a kernel strategy was asked for to be used, and fused to save the memory that a cache takes
        plain = strategy in ("auto", "cached") or (strategy == "eager" and self.device.type == "cpu")
        if wanted is False or (wanted is None and not plain):
            return None
        if wanted is None and strategy == "auto" and budget is None and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            reserved = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            budget = (free + reserved) // 2
        return MergedWeights(budget, in_place=True)

    def __call__(self, batch: Sequence[Tensor], gamma: Tensor, targets: Sequence[Tensor] = ()) -> StepGradient:
        """Return the gradient at ``gamma`` [K] for images and targets of each task. They lie on the device."""
        self._place(batch, targets, gamma)
        if self.graphs == "off":
            return self._compute()
        if self._graph is None and self._warm:
            self._capture()
        if self._graph is None:
            if self._warm:
                # it failed just now
                return self._compute()
            self._warm = True
            return warm_up(self._compute, self.device)
        self._graph.replay()
        assert self._outputs is not None
        return self._outputs

    def _place(self, batch: Sequence[Tensor], targets: Sequence[Tensor], gamma: Tensor) -> None:
        """Put images, targets and γ where a captured graph looks for them. Other shapes want another graph."""
        given = [*batch, *targets]
        shapes = [(tensor.shape, tensor.dtype) for tensor in given]
        if self.tasks_at_once == "all" and len({(shape[1:], dtype) for shape, dtype in shapes[: len(batch)]}) > 1:
            got = ", ".join(str(list(images.shape[1:])) for images in batch)
            raise ValueError(f"tasks_at_once: expected images of one shape and type for 'all', got {got}")
        if shapes != self._shapes:
            self._inputs = [torch.empty_like(tensor) for tensor in given] if self.graphs != "off" else []
            self._shapes, self._graph, self._outputs, self._warm = shapes, None, None, False
        with torch.no_grad():
            self.gamma.copy_(gamma)
            if self.graphs == "off":
                self._inputs = given
            else:
                for place, tensor in zip(self._inputs, given, strict=True):
                    place.copy_(tensor, non_blocking=True)

    def _capture(self) -> None:
        try:
            self._graph, self._outputs = capture(self._compute, self.device)
        except BaseException as error:
            # what was merged in vain is marked as up to date
            if self.cache is not None:
                self.cache.clear()
            if self.graphs == "on" or not isinstance(error, Exception):
                raise
            self.graphs = "off"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.on_warning(f"cuda_graphs: going on without, because the model could not be captured: {reason}")

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """Set the model to this γ and this step's merged weights, inside the block."""
        state, before = self.state, (self.state.now.gamma, self.state.now.cache)
        state.now.gamma, state.now.cache = self.gamma, self.cache
        try:
            yield
        finally:
            state.now.gamma, state.now.cache = before

    def _compute(self) -> StepGradient:
        kind = self.device.type
        enabled = autocast_enabled(kind)
        # the model's forward is the caller's, and so is its autocast; nothing here may lose bits to it
        plain = torch.autocast(kind, enabled=False) if enabled else _NOTHING
        dtype = torch.get_autocast_dtype(kind) if enabled else None
        with self._lent(), plain:
            if self.gathered is None:
                return self._closed_form()
            if self.cache is not None:
                # what is captured must be what every replay does
                self.cache.refresh(force=self.graphs != "off" and torch.cuda.is_current_stream_capturing())
            self.gathered.refresh()
            # also in the backward, where checkpointed layers run their forward again
            with self.gathered.lent():
                if self.tasks_at_once == "all":
                    return self._all_at_once(self.gathered, dtype)
                runs = [self._micro_step(k, dtype) for k in range(len(self.heads))]
                return pareto_gradient(runs, self.parameters, self.gamma, self.settings, self._norm, self.gathered)

    def _norm(self) -> Tensor:
        return tensor_norm(self.model, self.gamma)

    def _targets(self, task: int) -> Tensor | None:
        place = len(self.heads) + task
        return self._inputs[place] if place < len(self._inputs) else None

    def _micro_step(self, task: int, autocast: torch.dtype | None) -> Callable[[], TaskTerms]:
        """Return what runs the forward of the batch in hand. ``autocast``: the caller's type, if they have it on."""

        def run() -> TaskTerms:
            with self._casting(autocast):
                logits = self.heads[task](self.model(self._inputs[task]))
            return self.objective.terms(task, logits, self._targets(task))

        return run

    def _casting(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        # nothing cast in an earlier step may be used in a captured one, so nothing is kept
        return _NOTHING if dtype is None else torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def _all_at_once(self, gathered: Gathered, autocast: torch.dtype | None) -> StepGradient:
        """Run one forward and one backward of all tasks' images. Every dW is formed once, for the loss itself."""
        batch = self._inputs[: len(self.heads)]
        sizes = [len(images) for images in batch]
        with self._casting(autocast):
            features = self.model(torch.cat(batch))
            if not isinstance(features, Tensor) or len(features) != sum(sizes):
                got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"tasks_at_once: expected a model of [{sum(sizes)}, *] features for 'all', got {got}")
            logits = [head(part) for head, part in zip(self.heads, features.split(sizes), strict=True)]
        terms = [self.objective.terms(k, part, self._targets(k)) for k, part in enumerate(logits)]
        values = torch.stack([term.objective for term in terms])
        loss, coefficients = _scalarized(values, self.gamma, self.settings)
        total = gathered.finish(gathered.gradient((values * coefficients).sum()))
        outcome = StepGradient(loss, torch.stack([_row(term) for term in terms]), total)
        return _with_norm(outcome, self.parameters, self.settings, self._norm)

    def _closed_form(self) -> StepGradient:
        """Differentiate an objective on the weights. Its values share everything, so one graph serves all tasks."""
        values = self.objective.values(self.gamma)
        loss, coefficients = _scalarized(values, self.gamma, self.settings)
        surrogate = (values * coefficients).sum()
        if self.settings.tensor_norm:
            size = self._norm()
            loss = loss + self.settings.tensor_norm * size.detach().to(loss)
            surrogate = surrogate + self.settings.tensor_norm * size.to(surrogate)
        return StepGradient(loss, values.detach()[:, None], flat_gradient(surrogate, self.parameters))
