"""From a Pareto model to a plain module for one preference, or to a folded one for all."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.model.convert import convert, make_plain, restore
from pareto_merging.model.layer import LEARNED, ParetoModule, pareto_modules, part_name
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import Preference, check_preference


def merge(model: nn.Module, gamma: Preference) -> nn.Module:
    """A new plain module of the original class: the Pareto (or folded) model at one preference.

    Args:
        gamma: ``[K]`` or by task name, on the simplex.

    Returns:
        A module with the pretrained model's ``state_dict`` keys and nothing of ours; its parameters share no memory
        with ``model`` and require gradients, as those of a new module do.

    Raises:
        ValueError: not a Pareto model, or not a preference.
    """
    model = getattr(model, "_orig_mod", model)
    state = pareto_state(model)
    checked = check_preference(gamma, state.task_names, per_item=False).detach()
    plain = _copy_with(model, lambda module, name: module.pareto_merged(name, checked), keep_low_rank=False)
    make_plain(plain)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def fold(model: nn.Module) -> nn.Module:
    """A new model with λ folded in: one base W0 + Σ λ_k τ_k and the low-rank terms, no task vectors.

    It takes preferences as the Pareto model does and gives the same results at about the memory of one plain model:
    what a server loads. Folding a folded model copies it. Raises ValueError if ``model`` is no Pareto model.
    """
    model = getattr(model, "_orig_mod", model)
    pareto_state(model)
    folded = _copy_with(model, _base, keep_low_rank=True)
    state = pareto_state(folded)
    state.folded = True
    for _, module in list(pareto_modules(folded)):
        kept = []
        for name in module.pareto_names:
            for part in ("task_vectors", "lam"):
                module._parameters.pop(part_name(name, part), None)
            if module._parameters.get(part_name(name, "A")) is not None:
                kept.append(name)
        module.pareto_groups = {}
        if kept:
            # only the class of an unknown module depends on which of its parameters are merged
            batch_dim, original = module.pareto_batch_dim, cast(Any, module.pareto_original)
            module.__class__ = original
            convert(module, kept, state, has_parts=True).pareto_batch_dim = batch_dim
        else:
            restore(module)
    object.__setattr__(folded, "pareto", state)
    return folded


def _base(module: ParetoModule, name: str) -> Tensor:

    weight, parts = module._parameters[name], module.pareto_parts(name)
    assert weight is not None
    lam = parts["lam"]
    if lam is not None and module.pareto.lambda_range is not None:
        lam = lam.clamp(*module.pareto.lambda_range)
    return pmkernels.merge_weight(weight, task_vectors=parts["task_vectors"], lam=lam)


def _copy_with(model: nn.Module, value: Callable[[ParetoModule, str], Tensor], keep_low_rank: bool) -> nn.Module:
    """A deep copy in which merged parameters hold ``value(module, name)`` and the task vectors are not copied."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                weight = module._parameters[name]
                assert weight is not None
                if id(weight) not in memo:
                    merged = value(module, name).detach()
                    merged = merged.clone() if merged.data_ptr() == weight.data_ptr() else merged
                    memo[id(weight)] = nn.Parameter(merged, requires_grad=False)
                parts = ("task_vectors", "lam") if keep_low_rank else ("task_vectors", *LEARNED)
                for part in parts:
                    parameter = module._parameters.get(part_name(name, part))
                    if parameter is not None:
                        memo[id(parameter)] = None
        # the current preference may carry a graph, which cannot be copied
        for _, module in pareto_modules(model):
            memo[id(module.pareto.gamma)] = module.pareto.gamma.detach().clone()
    # deepcopy keeps alive, and later frees, what the memo maps from; what we put there must survive as well
    return deepcopy(model, memo)
