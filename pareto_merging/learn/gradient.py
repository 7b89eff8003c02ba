"""The exact gradient of one optimiser step at the activation memory of one task.

The loss (equation 10 of Chen & Kwok, arXiv 2408.12105) depends on the learned parameters only through S_1 … S_K and the
closed-form norm. So for each task: forward,
backward, keep that task's small gradient, free its activations (a micro-step); then dL/dS_k from the K numbers S, and
Σ_k (dL/dS_k)·∇S_k.

Around that, what makes it fast: merged weights are kept for the K micro-steps (:mod:`pareto_merging.model.cache`), what
is small is merged and differentiated at once (:mod:`.gathered`), the images and γ lie at fixed places, and on a GPU the
whole of it is captured once and replayed, so that Python launches one graph instead of thousands of kernels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.data.tasks import Task
from pareto_merging.learn.adam import flat_gradient
from pareto_merging.learn.gathered import Gathered
from pareto_merging.learn.objectives import OBJECTIVES, TaskTerms
from pareto_merging.learn.scalarize import scalarize
from pareto_merging.learn.settings import LossSettings, MethodSettings
from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.parameters import LowRankTerm, merged_parameters
from pareto_merging.model.state import pareto_state
from pmkernels.autocast import autocast_enabled
from pmkernels.graphs import capture, warm_up

CudaGraphs: TypeAlias = Literal["auto", "on", "off"]
TasksAtOnce: TypeAlias = Literal["one", "all"]


@dataclass(frozen=True)
class Execution:
    """How a step is computed, which changes nothing but the result's rounding: see :func:`learn_pareto_set`."""

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
    """The loss [] of one preference. S_k and what is watched of each task [K, 1 + watched]; the gradient [P]."""

    loss: Tensor
    terms: Tensor
    gradient: Tensor


def cosine_alignment(objectives: Tensor, gamma: Tensor) -> Tensor:
    """Return cos(S, 1/γ) of objectives [K] and gamma [K], which is subtracted from the loss.

    1/γ is written γ_min/γ, which has the same direction and does not overflow; an entry of γ below 1e-12 counts as
    1e-12.
    """
    gamma = gamma.clamp(min=1e-12)
    return torch.cosine_similarity(objectives, gamma.amin() / gamma, dim=-1)


def low_rank_square(A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    """Return ‖A·C·Bᵀ‖²_F = tr(AᵀA·C·BᵀB·Cᵀ). A [*, N, r], C [*, r, r], B [*, D, r] -> [*] by r×r products."""
    return ((A.mT @ A @ C) * (C @ (B.mT @ B))).sum(dim=(-2, -1))


def mean_low_rank_square(A: Tensor, G: Tensor, B: Tensor, gamma: Tensor) -> Tensor:
    """Return the mean of ‖A·(G ×₃ γ)·Bᵀ‖²_F over several γ [n, K]. Of layers A [L, N, r] -> [L].

    The square is a quadratic form in γ, of which only the mean of γγᵀ [K, K] counts.
    """
    moment = gamma.t() @ gamma / len(gamma)
    slices = G.permute(0, 3, 1, 2)
    squares = (A.mT @ A)[:, None] @ slices @ (B.mT @ B)[:, None]
    mixed = moment @ slices.flatten(2)
    return (squares.flatten(2) * mixed).sum(dim=(-2, -1))


def tensor_norm(model: nn.Module, gamma: Tensor) -> Tensor:
    """Return ‖A·(G ×₃ γ)·Bᵀ‖_F over all low-rank layers together, zero where there are none.

    Our reading: the Frobenius norm of the whole personalised part, √Σ_layers ‖·‖², not a sum of the layers' norms.
    Its gradient at G = 0 is 0. Layers of one shape are computed together, in a few batched products. With a preference
    per item, gamma [*, K], it is the root of the mean square.
    """
    shapes: dict[Any, list[LowRankTerm]] = {}
    for parameter in merged_parameters(model):
        if (term := parameter.low_rank(gamma if gamma.ndim == 1 else None)) is not None:
            key = (term.A.shape, term.G.shape, term.B.shape, term.A.dtype, term.A.device)
            shapes.setdefault(key, []).append(term)
    if not shapes:
        return torch.zeros((), device=gamma.device)
    wide = pmkernels.reference.accumulate_dtype(gamma, *(term.A for group in shapes.values() for term in group))
    total = torch.zeros((), dtype=wide, device=gamma.device)
    for group in shapes.values():
        A, G, B = (torch.stack(parts).to(wide) for parts in zip(*group, strict=True))
        if gamma.ndim == 1:
            squares = low_rank_square(A, G @ gamma.to(G), B)
        else:
            squares = mean_low_rank_square(A, G, B, gamma.to(G).flatten(0, -2))
        total = total + squares.sum().to(gamma.device)
    # the gradient of a root is not finite at 0, where this one is 0
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), total.detach().clamp(min=0))


def pareto_gradient(
    objectives: Sequence[Callable[[], TaskTerms]],
    parameters: Sequence[Tensor],
    gamma: Tensor,
    settings: LossSettings,
    norm: Callable[[], Tensor] | None = None,
    gathered: Gathered | None = None,
) -> StepGradient:
    """Return the exact gradient of the loss at the activation memory of one task. It is by ``parameters``, P numbers.

    Each of the K ``objectives`` runs one task's forward; ``norm`` is ‖A·C·Bᵀ‖ of the model at gamma [K], if the
    settings use it; ``gathered`` differentiates instead of autograd alone. Nothing here waits for the device. The
    gradient holds NaN where an objective does.
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


def _parts(gammas: Tensor, images: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield each preference of one task [n, K] with its part of the task's images."""
    start = 0
    for number, gamma in enumerate(gammas):
        stop = images * (number + 1) // len(gammas)
        if stop > start:
            yield gamma, slice(start, stop)
        start = stop


_NOTHING = contextlib.nullcontext()


class GradientOfStep:
    """(batch, γ) -> :class:`StepGradient` of a Pareto model in eval mode. It is by what is ``learned``, in its order.

    ``tasks`` are by name, in the model's order, where the objective needs images; ``on_warning`` is told why a graph
    could not be captured in ``"auto"``. What it returns may be overwritten by the next call.
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
        self.heads = [task.head for task in tasks.values()] if kind.needs != "weights" else []
        self.per_item, self.in_parts = settings.sampling.preference == "per-item", False
        for name, head in zip(self.state.task_names, self.heads, strict=False):
            for part, tensor in (*head.named_parameters(), *head.named_buffers()):
                if tensor.device != self.device:
                    expected = f"expected the head of {name} on {self.device}, where the model is"
                    raise ValueError(f"tasks: {expected}, got {part} on {tensor.device}")
        self.graphs: CudaGraphs = execution.cuda_graphs if self.device.type == "cuda" else "off"
        self.on_warning = on_warning or (lambda text: None)
        self.cache = self._cache(execution.cache)
        if self.cache is not None and self.state.now.cache is not None:
            # one more model in memory, not two
            self.state.now.cache.clear()
        self.objective = kind(model, tasks, settings)
        self.gathered = Gathered(model, learned, one_gamma=not self.per_item) if self.heads else None
        self.gamma = torch.zeros(len(self.state.task_names), dtype=torch.float32, device=self.device)
        self._norm = lambda: tensor_norm(model, self.gamma)
        # the images of each task, then what the objective wants beside them
        self._inputs: list[Tensor] = []
        self._shapes: list[Any] = []
        self._graph: Any = None
        self._outputs: StepGradient | None = None
        self._warm = False

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

    def take_parts(self) -> None:
        """Take one preference for each part of a task's images. Where a model cannot take one per item."""
        if self.tasks_at_once == "all":
            raise ValueError("tasks_at_once: expected one for a model that takes no preference per item, got all")
        # a merged weight is used once
        self.in_parts, self.cache = True, None

    def __call__(self, batch: Sequence[Tensor], gamma: Tensor, targets: Sequence[Tensor] = ()) -> StepGradient:
        """Return the gradient at ``gamma`` for images and targets of each task. They lie on the device.

        ``gamma``: [K] for all images; per item [K, n, K], n of each task: each is that of one image or, where n is
        less, of one of n parts of the task's images.
        """
        self._place(batch, targets, gamma)
        if self.graphs != "off" and self._graph is None:
            if not self._warm:
                self._warm = True
                return warm_up(self._compute, self.device)
            self._capture()
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        assert self._outputs is not None
        return self._outputs

    def _place(self, batch: Sequence[Tensor], targets: Sequence[Tensor], gamma: Tensor) -> None:
        """Put images, targets and γ where a captured graph looks for them. Other shapes want another graph."""
        given = [*batch, *targets]
        shapes = [(tensor.shape, tensor.dtype) for tensor in (*given, gamma)]
        if self.tasks_at_once == "all" and len({(shape[1:], dtype) for shape, dtype in shapes[: len(batch)]}) > 1:
            got = ", ".join(str(list(images.shape[1:])) for images in batch)
            raise ValueError(f"tasks_at_once: expected images of one shape and type for 'all', got {got}")
        if shapes != self._shapes:
            self._inputs = [torch.empty_like(tensor) for tensor in given] if self.graphs != "off" else []
            self.gamma = torch.zeros(gamma.shape, dtype=torch.float32, device=self.device)
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

    def _compute(self) -> StepGradient:
        kind = self.device.type
        enabled = autocast_enabled(kind)
        # the model's forward is the caller's, and so is its autocast; nothing here may lose bits to it
        plain = torch.autocast(kind, enabled=False) if enabled else _NOTHING
        dtype = torch.get_autocast_dtype(kind) if enabled else None
        gamma = self.gamma.flatten(0, -2) if self.per_item else self.gamma
        with self.state.now.changed(gamma=gamma, cache=self.cache), plain:
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
                if self.per_item:
                    return self._one_by_one(self.gathered, dtype)
                runs = [functools.partial(self._terms, k, dtype) for k in range(len(self.heads))]
                return pareto_gradient(runs, self.parameters, self.gamma, self.settings, self._norm, self.gathered)

    def _targets(self, task: int) -> Tensor | None:
        place = len(self.heads) + task
        return self._inputs[place] if place < len(self._inputs) else None

    def _terms(self, task: int, autocast: torch.dtype | None, part: slice = slice(None)) -> TaskTerms:
        """Run the forward of the batch in hand. ``autocast``: the caller's type, if they have it on."""
        with self._casting(autocast):
            outputs = self.objective.outputs(self.model(self._inputs[task][part]), self.heads[task])
        targets = self._targets(task)
        return self.objective.terms(task, outputs, None if targets is None else targets[part])

    def _one_by_one(self, gathered: Gathered, autocast: torch.dtype | None) -> StepGradient:
        """Differentiate the mean of S_1 … S_K, each image at its own preference. One task after another."""
        tasks, rows = len(self.heads), []
        total: Tensor | None = None
        for task, gammas in enumerate(self.gamma):
            row: Tensor | None = None
            images = len(self._inputs[task])
            for gamma, part in _parts(gammas, images) if self.in_parts else [(gammas, slice(0, images))]:
                share = (part.stop - part.start) / images
                # also in the backward, where checkpointed layers run their forward again
                with self.state.now.changed(gamma=gamma):
                    term = self._terms(task, autocast, part)
                    gradient = gathered.gradient(term.objective * (share / tasks))
                total = gradient if total is None else total.add_(gradient)
                row = share * _row(term) if row is None else row + share * _row(term)
            assert row is not None
            rows.append(row)
        assert total is not None
        terms = torch.stack(rows)
        outcome = StepGradient(terms[:, 0].mean(), terms, gathered.finish(total))
        return _with_norm(outcome, self.parameters, self.settings, self._norm)

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
            parts = zip(features.split(sizes), self.heads, strict=True)
            outputs = [self.objective.outputs(part, head) for part, head in parts]
        terms = [self.objective.terms(k, part, self._targets(k)) for k, part in enumerate(outputs)]
        values = torch.stack([term.objective for term in terms])
        if self.per_item:
            loss, coefficients = values.detach().mean(), torch.full_like(values, 1 / len(values))
        else:
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
