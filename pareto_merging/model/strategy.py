"""Settings of how a running model's layers are computed: strategy and memory."""

import contextlib
import os

import torch
from torch import nn

from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.state import pareto_states
from pmkernels import strategies


def strategy_names() -> tuple[str, ...]:
    """Return what a model's strategy may be called: those of pmkernels' table, and ``cached``."""
    return (*strategies.names(), "cached")


def set_strategy(model: nn.Module, strategy: str, *, memory_budget: int | None = None) -> None:
    """Set how the layers of a Pareto model are computed from now on. It is a setting, as the preference is.

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
    if strategy not in strategy_names():
        raise ValueError(f"strategy: expected one of {', '.join(strategy_names())}, got {strategy!r}")
    states = pareto_states(model)
    if not states:
        raise ValueError(f"model: expected a Pareto model, got {type(model).__name__} without Pareto layers")
    if memory_budget is not None:
        _check_budget(model, strategy, memory_budget)
    # one budget for all of them
    cache = MergedWeights(memory_budget) if strategy == "cached" else None
    for state in states:
        state.now.strategy, state.now.memory_budget, state.now.cache = strategy, memory_budget, cache


def _check_budget(model: nn.Module, strategy: str, budget: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"memory_budget: expected a number of bytes or None, got {budget!r}")
    if strategy not in ("auto", "cached"):
        raise ValueError(f"memory_budget: expected None for strategy {strategy!r}, which keeps nothing, got {budget}")
    if budget < 0:
        raise ValueError(f"memory_budget: expected at least 0 bytes, got {budget}")
    needed, device = merged_bytes(model), next(model.parameters()).device
    if strategy == "cached" and budget < needed:
        expected = f"at least {needed} bytes (one more model) for strategy 'cached'"
        raise ValueError(f"memory_budget: expected {expected}, got {budget}; 'auto' keeps as much as fits")
    memory = memory_of(device)
    if memory is not None and budget > memory:
        raise ValueError(f"memory_budget: expected at most the {in_gib(memory)} of {device}, got {in_gib(budget)}")


def merged_bytes(model: nn.Module) -> int:
    """Count the bytes of all merged tensors of a Pareto model. That is what strategy ``cached`` keeps."""
    return sum(parameter.weight.nbytes for parameter in merged_parameters(model))


def memory_of(device: torch.device) -> int | None:
    """Return all the memory of a device in bytes; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def in_gib(size: int) -> str:
    """Write bytes for a message: ``1.5 GiB``. Less than a thousandth of one is in bytes."""
    return f"{size / 2**30:,.3f} GiB" if size >= 2**20 else f"{size} bytes"
