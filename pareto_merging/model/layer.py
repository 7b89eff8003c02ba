"""The layers of a Pareto model: ParetoLinear, ParetoAttention, and any other module with merged parameters.

Each is the original module with a different class. A merged parameter ``name`` keeps W0 where the parameter was (so
``state_dict`` has it under its own name) and stands beside its task vectors τ, its λ and, where it has one, its
low-rank term; *reading* ``module.name`` gives the merged tensor at the current preference. So code that reaches into a
layer (``block.mlp.c_fc.weight``) sees the merged model, and forwards we do not know work as they are.

The parts of ``weight`` are called ``task_vectors``, ``lam``, ``A``, ``G``, ``B``; those of any other parameter carry
its name in front: ``bias_lam``, ``in_proj_weight_G``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from pareto_merging.model.cores import preference_core
from pareto_merging.model.state import ParetoState
from pmkernels.checks import autocast_enabled

if TYPE_CHECKING:
    ModuleBase = nn.Module
else:
    ModuleBase = object

PARTS = ("task_vectors", "lam", "A", "G", "B")
LEARNED = ("lam", "A", "G", "B")


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


def merged_property(name: str) -> property:
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


def describe(module: ParetoModule, name: str) -> str:
    parts = module.pareto_parts(name)
    tasks, A = parts["task_vectors"], parts["A"]
    folded = "folded" if tasks is None else f"tasks={tasks.shape[0]}"
    return folded if A is None else f"{folded}, rank={A.shape[1]}"


def pareto_modules(model: nn.Module) -> Iterator[tuple[str, ParetoModule]]:
    """Every module of ``model`` with merged parameters, by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, ParetoModule):
            yield name, module
