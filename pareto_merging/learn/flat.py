"""Many small tensors as one long vector: gradients, and the parameters that Adam steps."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of them."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def flattened(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Return gradients as one tensor [P], zero for None. Its dtype is the widest of the parameters'."""
    pairs = list(zip(gradients, parameters, strict=True))
    absent = max((parameter.numel() for gradient, parameter in pairs if gradient is None), default=0)
    zeros = torch.zeros(absent, dtype=widest(parameters), device=parameters[0].device)
    return torch.cat(
        [zeros[: p.numel()] if gradient is None else gradient.reshape(-1).to(zeros) for gradient, p in pairs]
    )


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return d value / d parameters as one tensor [P]. Its dtype is their widest; what has no part in it is zero."""
    if not value.requires_grad:
        size = sum(parameter.numel() for parameter in parameters)
        return torch.zeros(size, dtype=widest(parameters), device=parameters[0].device)
    return flattened(torch.autograd.grad(value, list(parameters), allow_unused=True), parameters)


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a long vector in the shapes of the tensors ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
