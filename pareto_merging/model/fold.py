"""A Pareto model made plain for one preference, or folded for all."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from pareto_merging.model.convert import convert, make_plain, restore
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.parameters import LOW_RANK, PARTS, MergedParameter, merged_parameters, part_name
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import Preference, check_preference

# what joins the base
FOLDED = tuple(part for part in PARTS if part not in LOW_RANK)


def merge(model: nn.Module, gamma: Preference) -> nn.Module:
    """Make the plain module of the original class for one preference. It is ``[K]`` or by task name.

    The module has the pretrained model's ``state_dict`` keys and nothing of ours; its parameters share no memory with
    ``model`` and require gradients, as those of a new module do. Raises ValueError for no Pareto model, or no
    preference.
    """
    model = getattr(model, "_orig_mod", model)
    state = pareto_state(model)
    checked = check_preference(gamma, state.task_names, per_item=False).detach()
    plain = _copy_with(model, lambda stored: stored.module.pareto_merged(stored.name, checked), keep_low_rank=False)
    make_plain(plain)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def expert(model: nn.Module, task: int) -> nn.Module:
    """Make the plain module of one fine-tuned model again: W0 + τ_k, as τ_k was rounded.

    Raises ValueError for no Pareto model, or a folded one.
    """
    if pareto_state(model).folded:
        raise ValueError("model: expected a Pareto model with task vectors, got a folded one")

    def finetuned(stored: MergedParameter) -> Tensor:
        tau = stored.task_vectors
        return stored.weight if tau is None else stored.weight + tau[task]

    plain = _copy_with(model, finetuned, keep_low_rank=False)
    make_plain(plain)
    return plain


def fold(model: nn.Module) -> nn.Module:
    """Fold λ and the constant term into the base of a new model. It keeps the preference-dependent terms.

    The base is W0 + Σ λ_k τ_k + A_c·B_cᵀ; there are no task vectors.

    It takes preferences as the Pareto model does and gives the same results at about the memory of one plain model:
    what a server loads. Folding a folded model copies it. Raises ValueError if ``model`` is no Pareto model.
    """
    model = getattr(model, "_orig_mod", model)
    pareto_state(model)
    folded = _copy_with(model, lambda stored: stored.module.pareto_base(stored.name), keep_low_rank=True)
    state = pareto_state(folded)
    state.folded = True
    for _, module in list(pareto_modules(folded)):
        for name, part in itertools.product(module.pareto_names, FOLDED):
            module._parameters.pop(part_name(name, part), None)
        if kept := [name for name in module.pareto_names if module.pareto_parameter(name).A is not None]:
            # only the class of an unknown module depends on which of its parameters are merged
            module.__class__ = cast(Any, module.pareto_original)
            convert(module, kept, state, has_parts=True)
        else:
            restore(module)
    object.__setattr__(folded, "pareto", state)
    return folded


def _copy_with(model: nn.Module, value: Callable[[MergedParameter], Tensor], keep_low_rank: bool) -> nn.Module:
    """Copy a model deeply; merged parameters hold ``value(parameter)``, and task vectors are not copied."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for stored in merged_parameters(model):
            merged, weight = value(stored).detach(), stored.weight
            merged = merged.clone() if merged.data_ptr() == weight.data_ptr() else merged
            memo[id(weight)] = nn.Parameter(merged, requires_grad=False)
        for _, module in pareto_modules(model):
            for name, part in itertools.product(module.pareto_names, PARTS):
                parameter = module._parameters.get(part_name(name, part))
                if parameter is not None and (part in FOLDED or not keep_low_rank):
                    memo[id(parameter)] = None
            # the current preference may carry a graph, which cannot be copied
            memo[id(module.pareto.now.gamma)] = module.pareto.now.gamma.detach().clone()
    # deepcopy keeps alive, and later frees, what the memo maps from; what we put there must survive as well
    return deepcopy(model, memo)
