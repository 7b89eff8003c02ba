"""The gradient of one optimiser step: exact, at the activation memory of one task, and where it can be a CUDA graph.

The loss depends on the learned parameters only through S_1 … S_K and the closed-form norm. So for each task: forward,
backward, keep that task's small gradient, free its activations (a micro-step); then dL/dS_k from the K numbers S, and
Σ_k (dL/dS_k)·∇S_k.

Around that, what makes it fast: merged weights are kept for the K micro-steps (:mod:`.cache`), all biases
and norms are merged in one launch and their λ differentiated in one, the images and γ lie at fixed places, and on a GPU
the whole of it is captured once and replayed, so that Python launches one graph instead of thousands of kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.learn.objectives import (
    EntropyTerms,
    WeightDistance,
    cosine_alignment,
    entropy_terms,
    scalarize,
    tensor_norm,
)
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.state import pareto_state
from pmkernels.checks import autocast_enabled
from pmkernels.graphs import capture, warm_up

CudaGraphs: TypeAlias = Literal["auto", "on", "off"]
TasksAtOnce: TypeAlias = Literal["one", "all"]
Objective: TypeAlias = Callable[[], EntropyTerms]


class StepGradient(NamedTuple):
    """``loss`` []; of each task S_k, entropy and mean-prediction entropy [K, 3]; the gradient [P]; on the device."""

    loss: Tensor
    terms: Tensor
    gradient: Tensor


def pareto_gradient(
    objectives: Sequence[Objective],
    parameters: Sequence[Tensor],
    gamma: Tensor,
    settings: MethodSettings,
    norm: Callable[[], Tensor] | None = None,
    differentiate: Callable[[Tensor], Tensor] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> StepGradient:
    """The exact gradient of the loss at the activation memory of one task (design: the loss needs only S_1 … S_K).

    Args:
        objectives: K functions that each run one task's forward. parameters: what to differentiate, P numbers in all.
        gamma: [K]. norm: ‖A·C·Bᵀ‖ of the model at γ, if the settings use it.
        differentiate: the gradient of a value as one flat tensor, by default :func:`flat_gradient` with respect to the
            parameters; ``finish`` makes the parameters' gradient [P] of a combination of those, if they are of others.

    Returns:
        Loss, terms and gradient; nothing here waits for the device. The gradient holds NaN where an objective does.
    """
    if differentiate is None:

        def differentiate(value: Tensor) -> Tensor:
            return flat_gradient(value, parameters)

    terms, gradients = [], []
    for objective in objectives:
        term = objective()
        gradients.append(differentiate(term.objective))
        terms.append(torch.stack([term.objective.detach(), term.entropy, term.mean_prediction_entropy]))
        del term
    seen = torch.stack(terms)
    loss, coefficients = _scalarized(seen[:, 0], gamma, settings)
    total = coefficients.to(gradients[0].dtype) @ torch.stack(gradients)
    if finish is not None:
        total = finish(total)
    if norm is not None and settings.tensor_norm:
        size = norm()
        loss = loss + settings.tensor_norm * size.detach().to(loss)
        total = total + settings.tensor_norm * flat_gradient(size, parameters)
    return StepGradient(loss, seen, total)


def _scalarized(values: Tensor, gamma: Tensor, settings: MethodSettings) -> tuple[Tensor, Tensor]:
    values, gamma = values.detach().requires_grad_(), gamma.detach().to(values)
    loss = scalarize(values, gamma, settings.scalarization, settings.mu)
    if settings.cosine:
        loss = loss - settings.cosine * cosine_alignment(values, gamma)
    (coefficients,) = torch.autograd.grad(loss, values)
    return loss.detach(), coefficients


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all of them."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """d value / d parameters as one tensor [P] in the widest of their dtypes, zero where there is no dependence."""
    if not value.requires_grad:
        size = sum(parameter.numel() for parameter in parameters)
        return torch.zeros(size, dtype=widest(parameters), device=parameters[0].device)
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return _flattened(gradients, parameters)


def _flattened(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = list(zip(gradients, parameters, strict=True))
    absent = max((parameter.numel() for gradient, parameter in pairs if gradient is None), default=0)
    zeros = torch.zeros(absent, dtype=widest(parameters), device=parameters[0].device)
    return torch.cat(
        [zeros[: p.numel()] if gradient is None else gradient.reshape(-1).to(zeros) for gradient, p in pairs]
    )


class MergedVectors:
    """Every bias, norm and other vector of a model with a λ of its own, merged at once and differentiated at once.

    ``refresh`` merges them into one leaf tensor z; while :meth:`lent`, the model's layers read views of it, so that
    autograd finds dS/dz; :meth:`add_d_lambda` makes dλ of that.
    """

    def __init__(self, model: nn.Module, learned: Sequence[Tensor]) -> None:
        self.state = pareto_state(model)
        places: dict[int, int] = {}
        count = 0
        for parameter in learned:
            places[id(parameter)] = count
            count += parameter.numel()
        weights: list[Tensor] = []
        taus: list[Tensor] = []
        lams: list[Tensor] = []
        seen: set[int] = set()
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                weight, parts = module._parameters[name], module.pareto_parts(name)
                lam, tau = parts["lam"], parts["task_vectors"]
                if weight is None or weight.ndim != 1 or lam is None or tau is None or parts["A"] is not None:
                    continue
                alike = not weights or (weight.dtype, weight.device) == (weights[0].dtype, weights[0].device)
                if not alike or tau.dtype != weight.dtype or id(weight) in seen or not weight.numel():
                    continue
                seen.add(id(weight))
                weights.append(weight)
                taus.append(tau)
                lams.append(lam)
        self.sizes = [weight.numel() for weight in weights]
        self.keys = [id(weight) for weight in weights]
        self.leaf: Tensor | None = None
        if not weights:
            return
        device = weights[0].device
        # kept together a second time, and alive, so that the keys stay theirs: a thousandth of the model
        self._originals = weights
        self.weight = torch.cat([weight.detach() for weight in weights])
        self.task_vectors = torch.cat([tau.detach() for tau in taus], dim=1)
        self.offsets = torch.tensor([0, *self.sizes], device=device).cumsum(0)
        distinct = list({id(lam): lam for lam in lams}.values())
        index = {id(lam): i for i, lam in enumerate(distinct)}
        self.distinct = distinct
        # which λ each vector uses; tasks share a λ in coarser granularities
        self.owner = torch.tensor([index[id(lam)] for lam in lams], device=device)
        self.shared = len(distinct) < len(lams)
        self.learned = [i for i, lam in enumerate(distinct) if id(lam) in places]
        tasks = self.task_vectors.shape[0]
        starts = torch.tensor([places[id(distinct[i])] for i in self.learned], dtype=torch.int64, device=device)
        self.positions = (starts[:, None] + torch.arange(tasks, device=device)).reshape(-1)
        # λ by vector, summed over the vectors that share it and picked where it is learned
        self.picked = torch.tensor(self.learned, dtype=torch.int64, device=device)
        self.members = torch.nn.functional.one_hot(self.owner, len(distinct)).t()[self.picked]
        self.leaf = torch.empty_like(self.weight).requires_grad_(bool(self.learned))

    def _lambdas(self) -> Tensor:
        table = torch.stack([lam.detach() for lam in self.distinct])
        return table if self.state.now.lambda_range is None else table.clamp(*self.state.now.lambda_range)

    def refresh(self) -> None:
        """Merge with λ as it is now."""
        if self.leaf is not None:
            with torch.no_grad():
                table = self._lambdas()[self.owner] if self.shared else self._lambdas()
                strategy = self.state.now.kernel_strategy
                merged = pmkernels.merge_vectors(self.weight, self.task_vectors, table, self.offsets, strategy=strategy)
                self.leaf.copy_(merged)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the model's layers use the merged vectors."""
        if self.leaf is not None:
            self.state.now.vectors = dict(zip(self.keys, self.leaf.split(self.sizes), strict=True))
        try:
            yield
        finally:
            self.state.now.vectors = None

    def add_d_lambda(self, d_leaf: Tensor, gradient: Tensor) -> None:
        """Add to the flat ``gradient`` [P] what ``d_leaf`` [S] says of the λ, in place."""
        strategy = self.state.now.kernel_strategy
        d_table = pmkernels.merge_vectors_gradient(d_leaf, self.task_vectors, self.offsets, strategy=strategy)
        d_lambda = self.members.to(d_table) @ d_table if self.shared else d_table.index_select(0, self.picked)
        if self.state.now.lambda_range is not None:
            low, high = self.state.now.lambda_range
            table = torch.stack([self.distinct[i].detach() for i in self.learned])
            d_lambda = d_lambda * ((table >= low) & (table <= high))
        # no place occurs twice
        gradient[self.positions] = gradient[self.positions] + d_lambda.reshape(-1).to(gradient)


class MergedFactors:
    """L = A·C(γ) of every layer with a low-rank term, put together at once and differentiated once a step.

    A layer needs L and B alone, and dS/dL = dW·B comes from the pass that forms dW. From Σ_k c_k dS_k/dL then follow
    dA = dL·Cᵀ and dG[:,:,k] = γ_k AᵀdL of all layers of one shape in a few batched products, once for all tasks.
    """

    def __init__(self, model: nn.Module, learned: Mapping[str, nn.Parameter]) -> None:
        self.state = pareto_state(model)
        wanted = {id(parameter) for parameter in learned.values()}
        groups: dict[Any, list[tuple[ParetoModule, str]]] = {}
        seen: set[int] = set()
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                A = module.pareto_parts(name)["A"]
                if A is not None and id(A) in wanted and id(A) not in seen:
                    seen.add(id(A))
                    groups.setdefault((A.shape, A.dtype, A.device), []).append((module, name))
        self.groups = list(groups.values())
        # by the identity of A: the leaf that stands for it
        self.leaves: dict[int, Tensor] = {}
        self._stacked: list[Tensor] = []
        self._keys: dict[int, Tensor] = {}
        for group in self.groups:
            stacked = torch.stack([_part(module, name, "A").detach() for module, name in group])
            self._stacked.append(stacked)
            for (module, name), leaf in zip(group, stacked, strict=True):
                self.leaves[id(_part(module, name, "A"))] = leaf.detach().requires_grad_()
                self._keys[id(module._parameters[name])] = self.leaves[id(_part(module, name, "A"))]

    def _cores(self, group: Sequence[tuple[ParetoModule, str]]) -> tuple[Tensor, Tensor]:
        """A [L, N, r] and C(γ) [L, r, r] of the layers of one shape, at the model's preference."""
        parts = [module.pareto_parts_at(name) for module, name in group]
        G = torch.stack([_given(p, "G") for p in parts])
        A = torch.stack([_given(p, "A") for p in parts])
        return A, G @ self.state.now.gamma.to(G)

    @torch.no_grad()
    def refresh(self) -> None:
        """L with A, G and γ as they are now."""
        for group, stacked in zip(self.groups, self._stacked, strict=True):
            A, core = self._cores(group)
            torch.bmm(A, core, out=stacked)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the model's layers use L and B."""
        self.state.now.factors = self._keys
        try:
            yield
        finally:
            self.state.now.factors = None

    @torch.no_grad()
    def gradients(self, d_leaves: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """dA and dG by the identity of A and G, from dL by the identity of A."""
        found: dict[int, Tensor] = {}
        for group in self.groups:
            A, core = self._cores(group)
            dL = torch.stack([d_leaves[id(_part(module, name, "A"))] for module, name in group]).to(core)
            dA, dC = dL @ core.mT, A.mT @ dL
            dG = dC[..., None] * self.state.now.gamma.to(dC)
            for (module, name), of_A, of_G in zip(group, dA, dG, strict=True):
                found[id(_part(module, name, "A"))] = of_A
                G = module.pareto_parts(name)["G"]
                if G is not None:
                    found[id(G)] = of_G
        return found


def _part(module: ParetoModule, name: str, part: str) -> Tensor:
    return _given(module.pareto_parts(name), part)


def _given(parts: Mapping[str, Tensor | None], part: str) -> Tensor:
    value = parts[part]
    assert value is not None
    return value


_NOTHING = contextlib.nullcontext()


class GradientOfStep:
    """(batch, γ) -> :class:`StepGradient` of a model's learned parameters, in their order.

    Args:
        model: a Pareto model in eval mode. heads: one for each task; None for the data-free objective.
        learned: name -> parameter. settings: objective, scalarisation and regularisers.
        cache: keep merged weights for the K tasks; None: by the model's strategy and memory budget, on the CPU always
            and on a GPU where half of what is free suffices.
        cuda_graphs: ``"on"``; ``"off"``; ``"auto"``: on a GPU, unless the model cannot be captured.
        tasks_at_once: ``"one"``, at the activation memory of one task; ``"all"``: see :func:`learn_pareto_set`.
        on_warning: told why a graph could not be captured in ``"auto"``.

    What it returns may be overwritten by the next call.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[nn.Module] | None,
        learned: Mapping[str, nn.Parameter],
        settings: MethodSettings,
        *,
        cache: bool | None = None,
        cuda_graphs: CudaGraphs = "auto",
        tasks_at_once: TasksAtOnce = "one",
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        if tasks_at_once not in ("one", "all"):
            raise ValueError(f"tasks_at_once: expected one or all, got {tasks_at_once!r}")
        self.tasks_at_once = tasks_at_once
        if cache is not None and not isinstance(cache, bool):
            raise TypeError(f"cache: expected True, False or None, got {cache!r}")
        if cuda_graphs not in ("auto", "on", "off"):
            raise ValueError(f"cuda_graphs: expected auto, on or off, got {cuda_graphs!r}")
        self.model, self.heads, self.settings = model, heads, settings
        self.state = pareto_state(model)
        self.parameters = list(learned.values())
        self.device = self.parameters[0].device
        if cuda_graphs == "on" and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs: expected auto or off without a CUDA GPU, got 'on' for {self.device}")
        for k, head in enumerate(heads or ()):
            for name, tensor in itertools.chain(head.named_parameters(), head.named_buffers()):
                if tensor.device != self.device:
                    raise ValueError(
                        f"tasks: expected the head of {self.state.task_names[k]} on {self.device}, where the model "
                        f"is, got {name} on {tensor.device}"
                    )
        self.graphs: CudaGraphs = cuda_graphs if self.device.type == "cuda" else "off"
        self.on_warning = on_warning or (lambda text: None)
        self.cache = self._cache(cache)
        if self.cache is not None and self.state.now.cache is not None:
            # one more model in memory, not two
            self.state.now.cache.clear()
        self.distance = WeightDistance(model, settings.normalize_distance) if heads is None else None
        self.factors = None if heads is None else MergedFactors(model, learned)
        # what a task's gradient is taken of: L = A·C in the place of A, nothing in that of G
        self._wanted: list[Tensor] = [*self.parameters]
        if self.factors is not None:
            cores = {
                id(_part(m, n, "G")) for g in self.factors.groups for m, n in g if m.pareto_parts(n)["G"] is not None
            }
            self._wanted = [
                self.factors.leaves.get(id(parameter), parameter)
                for parameter in self.parameters
                if id(parameter) not in cores
            ]
        self.vectors = None if heads is None else MergedVectors(model, self._wanted)
        self.gamma = torch.zeros(len(self.state.task_names), dtype=torch.float32, device=self.device)
        self._batch: list[Tensor] = []
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

    def __call__(self, batch: Sequence[Tensor], gamma: Tensor) -> StepGradient:
        """``batch``: the images of each task, on the device; ``gamma`` [K]."""
        self._place(batch, gamma)
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

    def _place(self, batch: Sequence[Tensor], gamma: Tensor) -> None:
        """Images and γ where a captured graph looks for them; other shapes want another graph."""
        shapes = [(images.shape, images.dtype) for images in batch]
        if self.tasks_at_once == "all" and len({(shape[1:], dtype) for shape, dtype in shapes}) > 1:
            got = ", ".join(str(list(shape[1:])) for shape, _ in shapes)
            raise ValueError(f"tasks_at_once: expected images of one shape and type for 'all', got {got}")
        if shapes != self._shapes:
            self._batch = [torch.empty_like(images) for images in batch] if self.graphs != "off" else []
            self._shapes, self._graph, self._outputs, self._warm = shapes, None, None, False
        with torch.no_grad():
            self.gamma.copy_(gamma)
            if self.graphs == "off":
                self._batch = list(batch)
            else:
                for place, images in zip(self._batch, batch, strict=True):
                    place.copy_(images, non_blocking=True)

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
        """The model at this γ, with this step's merged weights and vectors; afterwards as it was."""
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
            if self.heads is None:
                return self._data_free()
            assert self.vectors is not None and self.factors is not None
            self.factors.refresh()
            if self.cache is not None:
                # what is captured must be what every replay does
                self.cache.refresh(force=self.graphs != "off" and torch.cuda.is_current_stream_capturing())
            self.vectors.refresh()
            if self.tasks_at_once == "all":
                with self.vectors.lent(), self.factors.lent():
                    return self._all_at_once(dtype)
            norm = (lambda: tensor_norm(self.model, self.gamma)) if self.settings.tensor_norm else None
            # also in the backward, where checkpointed layers run their forward again
            with self.vectors.lent(), self.factors.lent():
                return pareto_gradient(
                    [self._objective(k, dtype) for k in range(len(self.heads))],
                    self.parameters,
                    self.gamma,
                    self.settings,
                    norm,
                    self._differentiate,
                    self._finish,
                )

    def _objective(self, k: int, autocast: torch.dtype | None) -> Objective:
        """S_k of the batch in hand; ``autocast``: the caller's type, if they have it on."""
        assert self.heads is not None
        images, head = self._batch[k], self.heads[k]

        def run() -> EntropyTerms:
            with self._casting(autocast):
                logits = head(self.model(images))
            return entropy_terms(logits, self.settings.information_maximisation)

        return run

    def _casting(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        # nothing cast in an earlier step may be used in a captured one, so nothing is kept
        return _NOTHING if dtype is None else torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def _all_at_once(self, autocast: torch.dtype | None) -> StepGradient:
        """One forward and one backward of all tasks' images: every dW is formed once, for the loss itself."""
        assert self.heads is not None
        sizes = [len(images) for images in self._batch]
        with self._casting(autocast):
            features = self.model(torch.cat(self._batch))
            if not isinstance(features, Tensor) or len(features) != sum(sizes):
                got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"tasks_at_once: expected a model of [{sum(sizes)}, *] features for 'all', got {got}")
            logits = [head(part) for head, part in zip(self.heads, features.split(sizes), strict=True)]
        terms = [entropy_terms(one, self.settings.information_maximisation) for one in logits]
        values = torch.stack([term.objective for term in terms])
        loss, coefficients = _scalarized(values, self.gamma, self.settings)
        total = self._finish(self._differentiate((values * coefficients).sum()))
        if self.settings.tensor_norm:
            size = tensor_norm(self.model, self.gamma)
            loss = loss + self.settings.tensor_norm * size.detach().to(loss)
            total = total + self.settings.tensor_norm * flat_gradient(size, self.parameters)
        watched = [[term.entropy, term.mean_prediction_entropy] for term in terms]
        seen = torch.cat([values.detach()[:, None], torch.stack([torch.stack(pair) for pair in watched])], dim=1)
        return StepGradient(loss, seen, total)

    def _differentiate(self, value: Tensor) -> Tensor:
        assert self.vectors is not None
        leaf = self.vectors.leaf
        if leaf is None or not leaf.requires_grad or not value.requires_grad:
            return flat_gradient(value, self._wanted)
        *gradients, d_leaf = torch.autograd.grad(value, [*self._wanted, leaf], allow_unused=True)
        flat = _flattened(gradients, self._wanted)
        if d_leaf is not None:
            self.vectors.add_d_lambda(d_leaf, flat)
        return flat

    def _finish(self, flat: Tensor) -> Tensor:
        """The parameters' gradient of that of :attr:`_wanted`."""
        assert self.factors is not None
        if not self.factors.leaves:
            return flat
        parts = flat.split([wanted.numel() for wanted in self._wanted])
        by_leaf = {id(wanted): part.view(wanted.shape) for wanted, part in zip(self._wanted, parts, strict=True)}
        found = self.factors.gradients({key: by_leaf[id(leaf)] for key, leaf in self.factors.leaves.items()})
        found = by_leaf | found
        return torch.cat([found[id(parameter)].reshape(-1).to(flat) for parameter in self.parameters])

    def _data_free(self) -> StepGradient:
        """Closed forms share everything, so one graph serves all tasks."""
        assert self.distance is not None
        values = self.distance(self.gamma)
        loss, coefficients = _scalarized(values, self.gamma, self.settings)
        surrogate = (values * coefficients).sum()
        if self.settings.tensor_norm:
            size = tensor_norm(self.model, self.gamma)
            loss = loss + self.settings.tensor_norm * size.detach().to(loss)
            surrogate = surrogate + self.settings.tensor_norm * size.to(surrogate)
        gradient = flat_gradient(surrogate, self.parameters)
        return StepGradient(loss, values.detach()[:, None].expand(-1, 3), gradient)
