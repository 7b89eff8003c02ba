"""Merging tensor by tensor, in small pieces: what methods that need only the weights share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pareto_merging.parametrize import Weights, check_copies
from pareto_merging.preprocessing import CHUNK

# (name, place of the piece within the tensor, W0 [n], τ [K, n]) -> the merged piece [n]
Combine = Callable[[str, int, Tensor, Tensor], Tensor]


@torch.no_grad()
def merge_tensors(
    pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights], combine: Combine
) -> nn.Module:
    """A copy of ``pretrained`` in which every floating-point tensor is put together by ``combine``, piece by piece.

    A piece is at most CHUNK // K consecutive numbers of one tensor with its K task vectors, in float32 (float64 where
    the weights are), so that beside the models there is never as much as one more of their larger tensors. Buffers are
    merged like parameters; tensors that are not floating point are the pretrained ones. Raises ValueError as
    :func:`parametrize`, and for numbers that are not finite.
    """
    merged = copy.deepcopy(pretrained)
    copies, aliases = check_copies(merged, finetuned)
    size = max(1, CHUNK // len(copies))
    for names, tensor in aliases:
        if not tensor.is_floating_point():
            continue
        values = [weights[next(name for name in names if name in weights)].detach() for weights in copies.values()]
        wide = torch.float32
        for value in (tensor, *values):
            wide = torch.promote_types(wide, value.dtype)
        flat, values = tensor.detach().reshape(-1), [value.reshape(-1) for value in values]
        result = flat if flat.data_ptr() == tensor.data_ptr() else torch.empty_like(flat)
        for start in range(0, flat.numel(), size):
            base = flat[start : start + size].to(wide)
            taus = torch.empty((len(values), len(base)), dtype=wide, device=base.device)
            for tau, value in zip(taus, values, strict=True):
                tau.copy_(value[start : start + size]).sub_(base)
            piece = combine(names[0], start, base, taus)
            if not bool(torch.isfinite(piece).all()):
                task = next((t for t, tau in zip(copies, taus, strict=True) if not bool(torch.isfinite(tau).all())), "")
                where = f"{names[0]} of {task} minus pretrained" if task else f"the merged {names[0]}"
                raise ValueError(f"finetuned: expected finite numbers in {where}, got NaN or inf")
            result[start : start + size] = piece.to(result.dtype)
        if result is not flat:
            tensor.copy_(result.view(tensor.shape))
    return merged
