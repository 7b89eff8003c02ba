"""Merging tensor by tensor, in small pieces: what methods that need only the weights share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pareto_merging.methods.interface import Copies
from pareto_merging.model.copies import check_copies
from pareto_merging.model.pieces import piece_size, widest
from pareto_merging.model.stored import PretrainedWeights, copy_of

# (name, place of the piece within the tensor, W0 [n], τ [K, n]) -> the merged piece [n]; pieces come in order
Combine = Callable[[str, int, Tensor, Tensor], Tensor]


@torch.no_grad()
def merge_tensors(pretrained: nn.Module, finetuned: Copies, combine: Combine, gamma: Tensor | None = None) -> nn.Module:
    """Return a copy of ``pretrained`` whose parameters ``combine`` puts together piece by piece.

    Those that are floating point. A piece is at most CHUNK // K consecutive numbers of one tensor with its K task
    vectors, in float32 (float64 where the weights are), so that beside the models there is never as much as one more of
    their larger tensors; where the copies are lazy mappings, one tensor of each of them is read at a time. W0 and W_k
    are taken as they are stored (:mod:`pareto_merging.model.stored`), and the result is rounded to the dtype of
    ``pretrained`` once. Of floating-point buffers the result has the average of the copies', weighted with ``gamma``
    [K] where it is given: other combinations can make batch norm's variances negative. Tensors that are not floating
    point are the pretrained ones. Raises ValueError as :func:`parametrize`, and for numbers that are not finite.
    """

    def average(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
        return base + (taus.mean(dim=0) if gamma is None else gamma.to(taus) @ taus)

    merged, as_stored = copy_of(pretrained), PretrainedWeights(pretrained)
    copies, aliases = check_copies(merged, finetuned)
    size = piece_size(len(copies))
    for names, tensor in aliases:
        if not tensor.is_floating_point():
            continue
        values = [weights[next(name for name in names if name in weights)].detach() for weights in copies.values()]
        stored = as_stored(names, tensor).reshape(-1)
        wide = widest(t.dtype for t in (tensor, stored, *values))
        merge_piece = combine if isinstance(tensor, nn.Parameter) else average
        flat, values = tensor.detach().reshape(-1), [value.reshape(-1) for value in values]
        result = flat if flat.data_ptr() == tensor.data_ptr() else torch.empty_like(flat)
        for start in range(0, flat.numel(), size):
            base = stored[start : start + size].to(flat.device, wide)
            taus = torch.empty((len(values), len(base)), dtype=wide, device=base.device)
            for tau, value in zip(taus, values, strict=True):
                tau.copy_(value[start : start + size]).sub_(base)
            piece = merge_piece(names[0], start, base, taus).to(result.dtype)
            if not bool(torch.isfinite(piece).all()):
                task = next((t for t, tau in zip(copies, taus, strict=True) if not bool(torch.isfinite(tau).all())), "")
                where = f"{names[0]} of {task} minus pretrained" if task else f"the merged {names[0]}"
                raise ValueError(f"finetuned: expected finite numbers in {where}, got NaN or inf")
            result[start : start + size] = piece
        if result is not flat:
            tensor.copy_(result.view(tensor.shape))
    return merged
