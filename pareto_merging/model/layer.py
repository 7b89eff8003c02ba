"""The layers of a Pareto model: ParetoLinear, ParetoAttention, and any other module with merged parameters.

Each is the original module with a different class. A merged parameter ``name`` keeps W0 where the parameter was (so
``state_dict`` has it under its own name) and stands beside its task vectors τ, its λ and, where it has one, its
low-rank term; *reading* ``module.name`` gives the merged tensor at the current preference. So code that reaches into a
layer (``block.mlp.c_fc.weight``) sees the merged model, and forwards we do not know work as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from pareto_merging.model.parameters import LEARNED, LOW_RANK, MergedParameter, merged_parameter, part_name
from pareto_merging.model.state import Computation, ParetoState
from pmkernels.autocast import autocast_enabled

if TYPE_CHECKING:
    ModuleBase = nn.Module
else:
    ModuleBase = object


class ParetoModule(ModuleBase):
    """A module some of whose parameters are merged.

    Attributes set by :func:`convert`: ``pareto_names`` (the parameters that are merged), ``pareto_original``,
    ``pareto_groups`` (parameter -> the name of the λ vector it uses) and ``pareto`` (the state all layers share).
    """

    pareto_names: tuple[str, ...] = ()
    pareto_original: type[nn.Module]
    pareto_groups: dict[str, str]
    # where the items of a batch lie in the input: 1 in sequence-first transformers
    pareto_batch_dim: int = 0
    # until convert gives it the model's
    pareto: ParetoState = ParetoState((), Computation(torch.empty(0)))

    def pareto_parameter(self, name: str) -> MergedParameter:
        """Return parameter ``name`` and what is added to it, as they are stored."""
        return merged_parameter(self, name)

    def pareto_learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the learned parameters of this module itself, by attribute name."""
        for name in (part_name(name, part) for name in self.pareto_names for part in LEARNED):
            if (parameter := self._parameters.get(name)) is not None:
                yield name, parameter

    def pareto_gamma_on(self, device: torch.device) -> Tensor:
        """Return the current preference, on ``device``."""
        return self.pareto.now.gamma.to(device)

    def pareto_gamma_for(self, x: Tensor, batch_dim: int = 0) -> Tensor:
        """Return the preference for x as pareto_linear wants it. [K], or [batch, 1, …, K], items at batch_dim."""
        gamma = self.pareto_gamma_on(x.device)
        if gamma.ndim == 1:
            return gamma
        if x.ndim < 2 or x.shape[batch_dim] != gamma.shape[0]:
            got = f"{gamma.shape[0]} preferences for an input of shape {list(x.shape)}"
            where = f"items along dimension {batch_dim}"
            raise ValueError(f"preference: expected one for each item of the input, got {got}, {where}")
        shape = [1] * (x.ndim - 1) + [gamma.shape[-1]]
        shape[batch_dim] = gamma.shape[0]
        return gamma.view(shape)

    def pareto_merged(self, name: str, gamma: Tensor | None = None) -> Tensor:
        """Merge parameter ``name`` at ``gamma`` [K], by default the current preference."""
        now, current, stored = self.pareto.now, gamma is None, self.pareto_parameter(name)
        weight = stored.weight
        if current and now.vectors is not None and id(weight) in now.vectors:
            return now.vectors[id(weight)]
        parts = stored.used_parts(gamma)
        if stored.A is None:
            if stored.lam is None and stored.A_c is None:
                return weight
            gamma = None
        else:
            gamma = self.pareto_gamma_on(weight.device) if gamma is None else gamma.to(weight.device)
            if gamma.ndim != 1:
                whole = f"{self.pareto_original.__name__}.{name} is one merged tensor"
                got = f"{gamma.shape[0]} (a preference per item works in nn.Linear and nn.MultiheadAttention layers)"
                raise ValueError(f"preference: {whole}, so expected one preference for the whole batch, got {got}")
        kept = self._pareto_kept(stored, gamma, weight.dtype) if current else None
        if current and now.factors is not None and id(weight) in now.factors:
            gamma, parts["A"], parts["G"] = None, now.factors[id(weight)], None
        return _merge_weight(weight, gamma=gamma, cached=kept, strategy=now.kernel_strategy, **parts)

    def pareto_base(self, name: str) -> Tensor:
        """Merge what does not depend on the preference: W0 + Σλτ + A_c·B_cᵀ of parameter ``name``."""
        stored = self.pareto_parameter(name)
        parts = stored.parts() | {"lam": stored.used_lam} | dict.fromkeys(LOW_RANK)
        return _merge_weight(stored.weight, strategy=self.pareto.now.kernel_strategy, **parts)

    def _pareto_kept(self, stored: MergedParameter, gamma: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return a parameter merged at ``gamma`` as the model's cache keeps it. None: λ alone."""
        state, weight, name = self.pareto, stored.weight, stored.name
        if state.now.cache is None or getattr(self, "_is_replica", False):
            return None
        left_out = dict.fromkeys(LOW_RANK if gamma is None else ())

        def merge(out: Tensor | None) -> Tensor:
            # asked for again later, when the preference may be another
            preference = None if gamma is None else self.pareto_gamma_on(weight.device)
            parts = self.pareto_parameter(name).used_parts(preference) | left_out
            narrow, strategy = out if weight.dtype == dtype else None, state.now.kernel_strategy
            merged = _merge_weight(weight, gamma=preference, out=narrow, strategy=strategy, **parts)
            return merged if merged.dtype == dtype else merged.to(dtype) if out is None else out.copy_(merged)

        made_of = (weight, *(stored.parts() | left_out).values(), None if gamma is None else state.now.gamma)
        user, key = (id(self), name, dtype, gamma is None), (id(weight), dtype, gamma is None)
        settings, size = (state.now.lambda_range, state.core), weight.numel() * dtype.itemsize
        return state.now.cache.get(user, key, made_of, settings, size, merge)

    def pareto_project(self, x: Tensor, name: str, bias: Tensor | None, rows: slice, batch_dim: int = 0) -> Tensor:
        """Project x [*, in] through the rows ``rows`` of the merged matrix ``name``."""
        now, stored = self.pareto.now, self.pareto_parameter(name)
        weight = stored.weight
        if stored.lam is None and stored.A is None and stored.A_c is None:
            return F.linear(x, weight[rows], None if bias is None else bias[rows])
        parts = stored.used_parts()
        gamma = None if stored.A is None else self.pareto_gamma_for(x, batch_dim)
        autocast = x.dtype != torch.float64 and autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        shared = gamma if gamma is not None and gamma.ndim == 1 else None
        # a folded weight with a preference per item is used as it is
        as_stored = shared is None and stored.lam is None and stored.A_c is None
        kept = None if as_stored else self._pareto_kept(stored, shared, dtype)
        if now.factors is not None and id(weight) in now.factors:
            gamma, parts["A"], parts["G"] = None, now.factors[id(weight)], None
        if rows != slice(None):
            weight, task_vectors = weight[rows], parts["task_vectors"]
            parts["task_vectors"] = None if task_vectors is None else task_vectors[:, rows]
            cut = (None if t is None else t[rows] for t in (parts["A_c"], parts["A"], bias, kept))
            parts["A_c"], parts["A"], bias, kept = cut
        strategy = now.kernel_strategy
        return pmkernels.pareto_linear(x, weight, bias=bias, gamma=gamma, cached=kept, strategy=strategy, **parts)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a Parameter before a property is asked, and W0 would silently be another
        if name in self.pareto_names and not self.__dict__.get("_pareto_loading"):
            ways = "set_lambda and set_preference change it, load_state_dict sets what it is made of"
            got = f"an assignment of {type(value).__name__}"
            raise AttributeError(f"{name}: expected a merged parameter to be left alone ({ways}), got {got}")
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # load_state_dict(assign=True) assigns W0 itself
        self.__dict__["_pareto_loading"] = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.__dict__["_pareto_loading"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # what is learned stays float32 in a 16-bit model: 0.3 + 5e-4 vanishes in bfloat16
        learned = {id(t) for _, p in self.pareto_learned() for t in (p, p.grad) if t is not None}

        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in learned and result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)
            return result

        super()._apply(keep_float32, recurse)
        if (state := self.__dict__.get("pareto")) is not None:
            state.now.gamma = state.now.gamma.to(fn(state.now.gamma).device)
            if state.now.cache is not None:
                state.now.cache.clear()
        return self


def _merge_weight(
    weight: Tensor,
    *,
    task_vectors: Tensor | None,
    out: Tensor | None = None,
    cached: Tensor | None = None,
    **parts: Any,
) -> Tensor:
    """Merge as :func:`pmkernels.merge_weight`, also a convolution's weight with a low-rank term, as a matrix."""
    shape = weight.shape
    if len(shape) > 2 and parts.get("A_c") is not None:
        weight, out, cached = (None if t is None else t.flatten(1) for t in (weight, out, cached))  # type: ignore[assignment]
        task_vectors = None if task_vectors is None else task_vectors.flatten(2)
    merged = pmkernels.merge_weight(weight, task_vectors=task_vectors, out=out, cached=cached, **parts)
    return merged.view(shape)


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


def pareto_modules(model: nn.Module) -> Iterator[tuple[str, ParetoModule]]:
    """Yield the modules of ``model`` with merged parameters, by name, each once."""
    for name, module in model.named_modules():
        if isinstance(module, ParetoModule):
            yield name, module
