"""What the loss has beside the objectives: a cosine and a norm.

The cosine of S with 1/γ, and the norm of the low-rank part. Equation 10 of Chen & Kwok, arXiv 2408.12105.
"""

from typing import Any

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.model.parameters import LowRankTerm, merged_parameters


def cosine_alignment(objectives: Tensor, gamma: Tensor) -> Tensor:
    """Return cos(S, 1/γ) of objectives [K] and gamma [K], which is subtracted from the loss.

    1/γ is written γ_min/γ, which has the same direction and does not overflow; an entry of γ below 1e-12 counts as
    1e-12.
    """
    gamma = gamma.clamp(min=1e-12)
    return torch.cosine_similarity(objectives, gamma.amin() / gamma, dim=-1)


class _ZeroSafeSqrt(torch.autograd.Function):
    """√max(x, 0) with a gradient of 0 at and below 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.clamp(min=0).sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return torch.where(root > 0, grad / (2 * root), 0.0)


def low_rank_square(A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    """Return ‖A·C·Bᵀ‖²_F by products of r×r matrices.

    It is tr(AᵀA·C·BᵀB·Cᵀ): A [*, N, r], C [*, r, r], B [*, D, r] -> [*].
    """
    return ((A.mT @ A @ C) * (C @ (B.mT @ B))).sum(dim=(-2, -1))


def tensor_norm(model: nn.Module, gamma: Tensor) -> Tensor:
    """Return ‖A·(G ×₃ γ)·Bᵀ‖_F over all low-rank layers together, zero where there are none.

    Our reading: the Frobenius norm of the whole personalised part, √Σ_layers ‖·‖², not a sum of the layers' norms.
    Its gradient at G = 0 is 0. Layers of one shape are computed together, in a few batched products.
    """
    shapes: dict[Any, list[LowRankTerm]] = {}
    for parameter in merged_parameters(model):
        if (term := parameter.low_rank(gamma)) is not None:
            key = (term.A.shape, term.G.shape, term.B.shape, term.A.dtype, term.A.device)
            shapes.setdefault(key, []).append(term)
    if not shapes:
        return torch.zeros((), device=gamma.device)
    wide = pmkernels.reference.accumulate_dtype(gamma, *(term.A for group in shapes.values() for term in group))
    total = torch.zeros((), dtype=wide, device=gamma.device)
    for group in shapes.values():
        A, G, B = (torch.stack(parts).to(wide) for parts in zip(*group, strict=True))
        total = total + low_rank_square(A, G @ gamma.to(G), B).sum().to(gamma.device)
    norm: Tensor = _ZeroSafeSqrt.apply(total)
    return norm
