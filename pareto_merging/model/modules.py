"""The layers of a Pareto model: ParetoLinear, ParetoAttention, and any other module with merged parameters.

Each is the original module with a different class. A merged parameter ``name`` keeps W0 where the parameter was (so
``state_dict`` has it under its own name) and stands beside its task vectors τ, its λ and, where it has one, its
low-rank term; *reading* ``module.name`` gives the merged tensor at the current preference. So code that reaches into a
layer (``block.mlp.c_fc.weight``) sees the merged model, and forwards we do not know work as they are.

The parts of ``weight`` are called ``task_vectors``, ``lam``, ``A``, ``G``, ``B``; those of any other parameter carry
its name in front: ``bias_lam``, ``in_proj_weight_G``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.state import ParetoState, pareto_states
from pmkernels.checks import autocast_enabled

if TYPE_CHECKING:
    ModuleBase = nn.Module
else:
    ModuleBase = object

PARTS = ("task_vectors", "lam", "A", "G", "B")
LEARNED = ("lam", "A", "G", "B")
_ATTENTION_NAMES = {
    "in_proj_weight",
    "in_proj_bias",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "bias_k",
    "bias_v",
}


def preference_core(core: str, gamma: Tensor) -> Tensor:
    """G [r, r, K] of the two structures without a learned core, r = K: G ×₃ γ is γγᵀ, or γ·e₁ᵀ (γ in the first column).

    With A [N, K] and B [D, K] the low-rank term A·(G ×₃ γ)·Bᵀ is then (Aγ) ∘ (Bγ) for ``"outer-product"`` and
    (Aγ) ∘ b for ``"outer-vector"``, b the first column of B; ∘ is the outer product of two vectors.

    Raises:
        ValueError: another core, or a preference per item.
    """
    if gamma.ndim != 1:
        raise ValueError(f"preference: expected one for the whole batch with core={core!r}, got {len(gamma)}")
    if core == "outer-product":
        square = gamma[:, None] * gamma[None, :]
    elif core == "outer-vector":
        square = torch.nn.functional.pad(gamma[:, None], (0, len(gamma) - 1))
    else:
        raise ValueError(f"core: expected outer-product or outer-vector where there is no G, got {core!r}")
    # the entries of γ sum to 1, so the same slice for every task gives that slice back; divided by their sum, exactly
    return (square / gamma.sum())[:, :, None].expand(-1, -1, len(gamma))


def part_name(name: str, part: str) -> str:
    """The attribute that holds ``part`` of parameter ``name``: ``("bias", "lam")`` -> ``"bias_lam"``."""
    return part if name == "weight" else f"{name}_{part}"


class ParetoModule(ModuleBase):
    """A module some of whose parameters are merged: what they are made of, and the merged value of each.

    Attributes set by :func:`convert`: ``pareto_names`` (the parameters that are merged), ``pareto_original``,
    ``pareto_groups`` (parameter -> the name of the λ vector it uses) and ``pareto`` (the state all layers share).
    """

    pareto_names: tuple[str, ...] = ()
    pareto_original: type[nn.Module]
    pareto_groups: dict[str, str]
    # where the items of a batch lie in the input: 1 in sequence-first transformers
    pareto_batch_dim: int = 0
    # until convert gives it the model's
    pareto: ParetoState = ParetoState((), torch.empty(0))

    def pareto_parts(self, name: str) -> dict[str, Tensor | None]:
        """Task vectors, λ, A, G and B of parameter ``name`` as they are stored; None for what it does not have."""
        return {part: self._parameters.get(part_name(name, part)) for part in PARTS}

    def pareto_parts_at(self, name: str, gamma: Tensor | None = None) -> dict[str, Tensor | None]:
        """The same as they are used at ``gamma`` [K], by default the current preference.

        λ within the range it is clamped to, and the G of a structure that learns none (:func:`preference_core`).
        """
        parts, state = self.pareto_parts(name), self.pareto
        lam, A = parts["lam"], parts["A"]
        if lam is not None and state.lambda_range is not None:
            parts["lam"] = lam.clamp(*state.lambda_range)
        if A is not None and parts["G"] is None:
            parts["G"] = preference_core(state.core, (state.gamma if gamma is None else gamma).to(A))
        return parts

    def pareto_learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The learned parameters of this module itself, by attribute name."""
        for name in self.pareto_names:
            for part in LEARNED:
                parameter = self._parameters.get(part_name(name, part))
                if parameter is not None:
                    yield part_name(name, part), parameter

    def pareto_gamma_on(self, device: torch.device) -> Tensor:
        """The current preference, on ``device``."""
        return self.pareto.gamma.to(device)

    def pareto_gamma_for(self, x: Tensor, batch_dim: int = 0) -> Tensor:
        """The preference as pareto_linear wants it for x: [K], or [batch, 1, …, K] with the items at ``batch_dim``."""
        gamma = self.pareto_gamma_on(x.device)
        if gamma.ndim == 1:
            return gamma
        if x.ndim < 2 or x.shape[batch_dim] != gamma.shape[0]:
            raise ValueError(
                f"preference: expected one for each item of the input, got {gamma.shape[0]} preferences for an input "
                f"of shape {list(x.shape)}, items along dimension {batch_dim}"
            )
        shape = [1] * (x.ndim - 1) + [gamma.shape[-1]]
        shape[batch_dim] = gamma.shape[0]
        return gamma.view(shape)

    def pareto_merged(self, name: str, gamma: Tensor | None = None) -> Tensor:
        """Parameter ``name`` merged at ``gamma`` [K], by default the current preference."""
        weight = self._parameters[name]
        assert weight is not None
        state, current = self.pareto, gamma is None
        if current and state.vectors is not None and id(weight) in state.vectors:
            return state.vectors[id(weight)]
        parts = self.pareto_parts_at(name, gamma)
        if parts["A"] is None:
            if parts["lam"] is None:
                return weight
            gamma = None
        else:
            gamma = self.pareto_gamma_on(weight.device) if gamma is None else gamma.to(weight.device)
            if gamma.ndim != 1:
                raise ValueError(
                    f"preference: {self.pareto_original.__name__}.{name} is one merged tensor, so expected one "
                    f"preference for the whole batch, got {gamma.shape[0]} (a preference per item works in nn.Linear "
                    "and nn.MultiheadAttention layers)"
                )
        kept = self._pareto_kept(name, gamma, weight.dtype) if current else None
        if current and gamma is not None and state.factors is not None and id(weight) in state.factors:
            parts |= {"A": state.factors[id(weight)], "G": None}
            gamma = None
        strategy = state.kernel_strategy
        return pmkernels.merge_weight(weight, gamma=gamma, cached=kept, strategy=strategy, **parts)

    def _pareto_kept(self, name: str, gamma: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Parameter ``name`` merged at ``gamma`` (None: λ alone) as the model's cache keeps it, in ``dtype``."""
        state, weight = self.pareto, self._parameters[name]
        if state.cache is None or weight is None or getattr(self, "_is_replica", False):
            return None
        stored = self.pareto_parts(name)
        if gamma is None:
            stored |= {"A": None, "G": None, "B": None}

        def merge(out: Tensor | None) -> Tensor:
            # asked for again later, when the preference may be another
            now = None if gamma is None else self.pareto_gamma_on(weight.device)
            parts = self.pareto_parts_at(name, now)
            if now is None:
                parts |= {"A": None, "G": None, "B": None}
            narrow = out if weight.dtype == dtype else None
            merged = pmkernels.merge_weight(weight, gamma=now, out=narrow, strategy=state.kernel_strategy, **parts)
            return merged if merged.dtype == dtype else merged.to(dtype) if out is None else out.copy_(merged)

        return state.cache.get(
            (id(self), name, dtype, gamma is None),
            (id(weight), dtype, gamma is None),
            {"weight": weight, **stored, "gamma": None if gamma is None else state.gamma},
            (state.lambda_range, state.core),
            weight,
            dtype,
            merge,
        )

    def pareto_project(self, x: Tensor, name: str, bias: Tensor | None, rows: slice, batch_dim: int = 0) -> Tensor:
        """x through the rows ``rows`` of the merged matrix ``name``: [*, in] -> [*, len(rows)]."""
        weight: Tensor | None = self._parameters[name]
        assert weight is not None
        parts = self.pareto_parts_at(name)
        if parts["lam"] is None and parts["A"] is None:
            return F.linear(x, weight[rows], None if bias is None else bias[rows])
        gamma = None if parts["A"] is None else self.pareto_gamma_for(x, batch_dim)
        state = self.pareto
        autocast = x.dtype != torch.float64 and autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        shared = gamma if gamma is not None and gamma.ndim == 1 else None
        # a folded weight with a preference per item is used as it is
        kept = None if shared is None and parts["lam"] is None else self._pareto_kept(name, shared, dtype)
        if rows != slice(None):
            weight = weight[rows]
            for part, axis in (("task_vectors", 1), ("A", 0)):
                value = parts[part]
                if value is not None:
                    parts[part] = value[:, rows] if axis else value[rows]
            bias = None if bias is None else bias[rows]
            kept = None if kept is None else kept[rows]
        if state.factors is not None and id(self._parameters[name]) in state.factors:
            # the low-rank term is A·C(γ) times Bᵀ
            factor = state.factors[id(self._parameters[name])]
            parts |= {"A": factor if rows == slice(None) else factor[rows], "G": None}
            gamma = None
        return pmkernels.pareto_linear(
            x,
            weight,
            bias=bias,
            gamma=gamma,
            cached=kept,
            strategy=state.kernel_strategy,
            **parts,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a Parameter before a property is asked, and W0 would silently be another
        if name in self.pareto_names and not self.__dict__.get("_pareto_loading"):
            raise AttributeError(
                f"{name}: expected a merged parameter to be left alone (set_lambda and set_preference change it, "
                f"load_state_dict sets what it is made of), got an assignment of {type(value).__name__}"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # load_state_dict(assign=True) assigns W0 itself
        self.__dict__["_pareto_loading"] = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.__dict__["_pareto_loading"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # λ, A, G and B stay float32 in a 16-bit model: 0.3 + 5e-4 vanishes in bfloat16
        learned = {id(t) for _, p in self.pareto_learned() for t in (p, p.grad) if t is not None}

        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in learned and result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)
            return result

        super()._apply(keep_float32, recurse)
        if (state := self.__dict__.get("pareto")) is not None:
            state.gamma = state.gamma.to(fn(state.gamma).device)
            if state.cache is not None:
                state.cache.clear()
        return self


def _merged_property(name: str) -> property:
    def get(self: ParetoModule) -> Tensor | None:
        if self._parameters.get(name) is None:
            if name in self._parameters:
                return None
            if name in self.__dict__:
                # nn.MultiheadAttention keeps an absent bias_k as a plain attribute
                return self.__dict__[name]
            # raised while the original class's constructor asks whether the name is free
            raise AttributeError(name)
        return self.pareto_merged(name)

    def set_if_absent(self: ParetoModule, value: Any) -> None:
        if name not in self.pareto_names:
            self.__dict__[name] = value
            return
        raise AttributeError(f"{name}: a merged parameter cannot be assigned; set_lambda and set_preference change it")

    return property(get, set_if_absent)


class ParetoLinear(ParetoModule, nn.Linear):
    """nn.Linear whose weight is W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ and whose bias is b0 + Σ_k λ_k τ_k.

    Input ``[*, in]``, output ``[*, out]``. A preference per item wants the items along the first dimension of x.
    """

    weight = _merged_property("weight")
    bias = _merged_property("bias")

    @classmethod
    def from_linears(
        cls,
        pretrained: nn.Linear,
        finetuned: Sequence[nn.Linear] | Mapping[str, nn.Linear],
        rank: int = 16,
        init_lambda: float = 0.3,
    ) -> ParetoLinear:
        """One layer from its pretrained form and K fine-tuned copies (or task name -> copy); ``rank`` 0: λ only."""
        from pareto_merging.model.parametrize import parametrize

        model = parametrize(
            pretrained, finetuned, rank=rank, low_rank="all" if rank else "none", init_lambda=init_lambda
        )
        if not isinstance(model, cls):
            raise ValueError("finetuned: expected at least one copy that differs from pretrained, got none")
        return model

    def forward(self, input: Tensor) -> Tensor:
        return self.pareto_project(input, "weight", self.bias, slice(None), self.pareto_batch_dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self, 'weight')}"


class ParetoAttention(ParetoModule, nn.MultiheadAttention):
    """nn.MultiheadAttention with merged projections: the same masks, layouts and results as the original at W(γ).

    The in-projection of self-attention is one product of [3E, E]; attention itself is scaled_dot_product_attention
    unless the weights are asked for.
    """

    in_proj_weight = _merged_property("in_proj_weight")
    in_proj_bias = _merged_property("in_proj_bias")
    q_proj_weight = _merged_property("q_proj_weight")
    k_proj_weight = _merged_property("k_proj_weight")
    v_proj_weight = _merged_property("v_proj_weight")
    bias_k = _merged_property("bias_k")
    bias_v = _merged_property("bias_v")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self._parameters.get("bias_k") is not None or self.add_zero_attn or query.is_nested:
            # rare forms: PyTorch's own forward on the merged tensors
            return nn.MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "attn_mask: expected a mask where is_causal is set (it is a hint about the mask), got None"
            )
        batched = query.ndim == 3
        if not batched and self.pareto.gamma.ndim == 2:
            raise ValueError(f"preference: expected one for an input without a batch, got {len(self.pareto.gamma)}")
        batch_dim = 0 if self.batch_first or not batched else 1
        q, k, v = (self._heads(t, batched) for t in self._project(query, key, value, batch_dim))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        # [batch, heads, L, head_dim] -> the layout that came in
        joined = attended.transpose(1, 2).flatten(2)
        joined = joined if self.batch_first else joined.transpose(0, 1)
        joined = joined if batched else joined.flatten(0, 1)
        out = self.out_proj
        if isinstance(out, ParetoLinear):
            return out.pareto_project(joined, "weight", out.bias, slice(None), batch_dim), weights
        return F.linear(joined, out.weight, out.bias), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int) -> tuple[Tensor, ...]:
        """q, k and v: one product where they share their input."""
        bias, size = self.in_proj_bias, self.embed_dim
        project = functools.partial(self.pareto_project, bias=bias, batch_dim=batch_dim)
        if not self._qkv_same_embed_dim:
            slices = [None if bias is None else bias[i * size : (i + 1) * size] for i in range(3)]
            inputs = ((query, "q_proj_weight"), (key, "k_proj_weight"), (value, "v_proj_weight"))
            return tuple(
                self.pareto_project(x, name, b, slice(None), batch_dim)
                for (x, name), b in zip(inputs, slices, strict=True)
            )
        if query is key and key is value:
            return project(query, "in_proj_weight", rows=slice(None)).chunk(3, dim=-1)
        q = project(query, "in_proj_weight", rows=slice(0, size))
        if key is value:
            return (q, *project(key, "in_proj_weight", rows=slice(size, 3 * size)).chunk(2, dim=-1))
        k = project(key, "in_proj_weight", rows=slice(size, 2 * size))
        return q, k, project(value, "in_proj_weight", rows=slice(2 * size, 3 * size))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """[batch, L, E], [L, batch, E] or [L, E] -> [batch, heads, L, head_dim]."""
        x = x if batched else x.unsqueeze(0 if self.batch_first else 1)
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one float mask [1 or batch, 1 or heads, 1 or L, S] that is added to the scores, or None."""
        batch, length, source = q.shape[0], q.shape[2], k.shape[2]
        mask = None
        if attn_mask is not None:
            expected = ((length, source), (batch * self.num_heads, length, source))
            if tuple(attn_mask.shape) not in expected:
                raise ValueError(
                    f"attn_mask: expected shape {expected[0]} or {expected[1]}, got {tuple(attn_mask.shape)}"
                )
            mask = _float_mask("attn_mask", attn_mask, q.dtype)
            mask = mask if mask.ndim == 2 else mask.view(batch, self.num_heads, length, source)
        if padding is not None:
            padding = padding if padding.ndim == 2 else padding.unsqueeze(0)
            if tuple(padding.shape) != (batch, source):
                raise ValueError(f"key_padding_mask: expected shape {(batch, source)}, got {tuple(padding.shape)}")
            padding = _float_mask("key_padding_mask", padding, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _float_mask(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a boolean or floating-point mask, got {mask.dtype}")
    return mask.to(dtype)


def _describe(module: ParetoModule, name: str) -> str:
    parts = module.pareto_parts(name)
    tasks, A = parts["task_vectors"], parts["A"]
    folded = "folded" if tasks is None else f"tasks={tasks.shape[0]}"
    return folded if A is None else f"{folded}, rank={A.shape[1]}"


@functools.cache
def _pareto_class(original: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """``original`` with the parameters ``names`` readable as merged tensors: the λ-only wrapper of any module."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (original, names), self.__getstate__()

    body: dict[str, Any] = {name: _merged_property(name) for name in names}
    if issubclass(original, nn.RNNBase):
        # RNNBase keeps its own list of the parameters; it must be the merged ones
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    body |= {"__reduce_ex__": reduce, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Pareto{original.__name__}", (ParetoModule, original), body)


def _blank(original: Any, names: tuple[str, ...]) -> nn.Module:
    cls: Any = _pareto_class(original, names)
    blank: nn.Module = cls.__new__(cls)
    return blank


def convert(module: nn.Module, names: Sequence[str], state: ParetoState, has_parts: bool = False) -> ParetoModule:
    """Turn ``module`` into the Pareto form of its class, in place; the caller then registers the parts of ``names``,
    unless it ``has_parts`` already.

    Raises:
        ValueError: the module already has an attribute that a part would be called.
    """
    original: Any = type(module)
    # a layer with parameters of its own making, or none where its weight should be (weight_norm), is an unknown module
    is_linear = original is nn.Linear or original is nn.modules.linear.NonDynamicallyQuantizableLinear
    fixed: Any = None
    if is_linear and set(names) <= {"weight", "bias"} and "weight" in module._parameters:
        fixed = ParetoLinear
    elif original is nn.MultiheadAttention and set(names) <= _ATTENTION_NAMES:
        fixed = ParetoAttention
    for name in names:
        for part in PARTS:
            attribute = part_name(name, part)
            if not has_parts and hasattr(module, attribute):
                raise ValueError(f"{original.__name__}: expected no attribute {attribute}, which {name}'s parts need")
    module.__class__ = _pareto_class(original, tuple(names)) if fixed is None else fixed
    assert isinstance(module, ParetoModule)
    module.pareto_names = tuple(names)
    module.pareto_original = original
    module.pareto_groups = {}
    module.pareto = state
    module.__dict__.pop("_flat_weights", None)
    return module


def restore(module: ParetoModule) -> nn.Module:
    """Undo :func:`convert` in place: the original class, none of our attributes, no parts."""
    for name in module.pareto_names:
        for part in PARTS:
            module._parameters.pop(part_name(name, part), None)
    original: Any = module.pareto_original
    for attribute in ("pareto_names", "pareto_original", "pareto_groups", "pareto_batch_dim", "pareto"):
        module.__dict__.pop(attribute, None)
    module.__class__ = original
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in module._flat_weights_names]
    return module


def pareto_modules(model: nn.Module) -> Iterator[tuple[str, ParetoModule]]:
    """Every module of ``model`` with merged parameters, by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, ParetoModule):
            yield name, module


STRATEGIES = (*pmkernels.STRATEGIES, "cached")


def set_strategy(model: nn.Module, strategy: str, *, memory_budget: int | None = None) -> None:
    """How the layers of a Pareto model are computed from now on. A setting of the running model, as the preference is.

    Args:
        model: a Pareto model, or a module that contains some.
        strategy: one of :func:`pmkernels.pareto_linear`'s, or ``"cached"``. ``"auto"`` chooses by shape and device, and
            :func:`learn_pareto_set` keeps the merged weights of a step for all its tasks where ``memory_budget`` has
            room. ``"cached"`` keeps merged weights between all calls, for as long as λ, γ and what else they are made
            of stand still: the price of one more model (another in each other dtype that autocast asks for, and where
            shared preferences and those per item alternate), for the speed of a plain one. ``"fused"`` allocates
            nothing of a weight's size in any linear layer, forward or backward: for a GPU without memory to spare.
        memory_budget: bytes that kept weights may take, for ``"auto"`` and ``"cached"``. None is no limit for
            ``"cached"``; for ``"auto"``, on a GPU, half of what is free when learning begins.

    Raises:
        ValueError: an unknown strategy, a model without Pareto layers, or a budget that is negative, that another
            strategy has no use for, that is more memory than there is, or too small for ``"cached"``. Whether the
            device can follow is asked when the model runs.
        TypeError: a budget that is not a number of bytes.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    states = pareto_states(model)
    if not states:
        raise ValueError(f"model: expected a Pareto model, got {type(model).__name__} without Pareto layers")
    if memory_budget is not None:
        _check_budget(model, strategy, memory_budget)
    # one budget for all of them
    cache = MergedWeights(memory_budget) if strategy == "cached" else None
    for state in states:
        state.strategy, state.memory_budget, state.cache = strategy, memory_budget, cache


def _check_budget(model: nn.Module, strategy: str, budget: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"memory_budget: expected a number of bytes or None, got {budget!r}")
    if strategy not in ("auto", "cached"):
        raise ValueError(f"memory_budget: expected None for strategy {strategy!r}, which keeps nothing, got {budget}")
    if budget < 0:
        raise ValueError(f"memory_budget: expected at least 0 bytes, got {budget}")
    needed, device = merged_bytes(model), next(model.parameters()).device
    if strategy == "cached" and budget < needed:
        raise ValueError(
            f"memory_budget: expected at least {needed} bytes (one more model) for strategy "
            f"'cached', got {budget}; 'auto' keeps as much as fits"
        )
    there = memory_of(device)
    if there is not None and budget > there:
        raise ValueError(f"memory_budget: expected at most the {in_gib(there)} of {device}, got {in_gib(budget)}")


def merged_bytes(model: nn.Module) -> int:
    """The bytes of all merged tensors of a Pareto model together: what strategy ``cached`` keeps."""
    merged = {
        id(weight): weight
        for _, module in pareto_modules(model)
        for name in module.pareto_names
        if (weight := module._parameters[name]) is not None
    }
    return sum(weight.numel() * weight.element_size() for weight in merged.values())


def memory_of(device: torch.device) -> int | None:
    """All the memory of a device in bytes; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def in_gib(size: int) -> str:
    """Bytes for a message: ``1.5 GiB``, and what is less than a thousandth of one in bytes."""
    return f"{size / 2**30:,.3f} GiB" if size >= 2**20 else f"{size} bytes"
