"""Merging tensor by tensor: what methods that need only the weights share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pareto_merging.parametrize import Weights, check_copies

Combine = Callable[[Tensor, list[Tensor]], Tensor]


@torch.no_grad()
def merge_tensors(
    pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights], combine: Combine
) -> nn.Module:
    """A copy of ``pretrained`` in which every floating-point tensor W0 is ``combine(W0, [τ_1, …, τ_K])``.

    The task vectors are formed in float32 for one tensor at a time; buffers are merged like parameters, and tensors
    that are not floating point are the pretrained ones. Raises ValueError as :func:`parametrize`.
    """
    merged = copy.deepcopy(pretrained)
    copies, aliases = check_copies(merged, finetuned)
    for names, tensor in aliases:
        if not tensor.is_floating_point():
            continue
        wide = torch.promote_types(tensor.dtype, torch.float32)
        base = tensor.to(wide)
        values = [weights[next(name for name in names if name in weights)] for weights in copies.values()]
        tensor.copy_(combine(base, [value.to(tensor.device, wide) - base for value in values]))
    return merged
