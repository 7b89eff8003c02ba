"""The definition of every operation in eager PyTorch; in float64 it is the test oracle.

Symbols and shapes: N out, D in, R rank, K tasks, M rows.

    W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·C(γ)·Bᵀ,   C(γ) = G ×₃ γ = Σ_k γ_k G[:, :, k]

(Chen & Kwok, "Pareto Merging", arXiv 2408.12105, equations 5 and 6; the constant term A_c·B_cᵀ is ours).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the type of sums over tasks and rank: float32, or float64 if anything is."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in ``dtype``. One that is has no operator called: small layers would notice."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def preference_core(G: Tensor, gamma: Tensor) -> Tensor:
    """Return C(γ) = Σ_k γ_k G[:, :, k] [*, R, R] of gamma [*, K]."""
    dtype = accumulate_dtype(G, gamma)
    if gamma.ndim == 1:
        return converted(G, dtype) @ converted(gamma, dtype)
    return torch.einsum("ijk,...k->...ij", G.to(dtype), gamma.to(dtype))


def merge_weight(
    weight: Tensor,
    *,
    task_vectors: Tensor | None = None,
    lam: Tensor | None = None,
    A: Tensor | None = None,
    G: Tensor | None = None,
    B: Tensor | None = None,
    gamma: Tensor | None = None,
    A_c: Tensor | None = None,
    B_c: Tensor | None = None,
) -> Tensor:
    """Return W(γ) in the dtype of ``weight``, summed in float32 (float64) and rounded once."""
    dtype = accumulate_dtype(weight, lam, A, A_c)
    merged = weight.to(dtype)
    if task_vectors is not None and lam is not None:
        merged = merged + torch.einsum("k,k...->...", lam.to(dtype), task_vectors.to(dtype))
    if A_c is not None and B_c is not None:
        merged = merged + A_c.to(dtype) @ B_c.to(dtype).T
    if A is not None and B is not None:
        left = A.to(dtype)
        if G is not None and gamma is not None:
            left = left @ preference_core(G, gamma).to(dtype)
        merged = merged + left @ B.to(dtype).T
    return merged.to(weight.dtype)


def merge_vectors(weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
    """Return w0 + Σ_k λ_lk τ_k [S] for each piece l of offsets."""
    dtype = accumulate_dtype(weight, lam)
    spread = torch.repeat_interleave(lam.to(dtype), offsets.diff(), dim=0)
    return (weight.to(dtype) + (spread.t() * task_vectors.to(dtype)).sum(dim=0)).to(weight.dtype)


def project_task_vectors(task_vectors: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return T_k = Aᵀ·τ_k·B [K, R, R] of [K, N, D], [N, R], [D, R]."""
    return A.t() @ task_vectors.to(A.dtype) @ B


def pareto_linear(
    x: Tensor, weight: Tensor, *, gamma: Tensor | None = None, bias: Tensor | None = None, **parts: Any
) -> Tensor:
    """Return y = x·W(γ)ᵀ + b [*, N] of x [*, D]. gamma is [K] for all rows, or [*, K] that broadcasts to x's.

    ``parts``: as in :func:`merge_weight`.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if gamma is None or gamma.ndim == 1:
        return F.linear(x, merge_weight(weight, gamma=gamma, **parts).to(x.dtype), bias)
    A, G, B = (parts.pop(name) for name in ("A", "G", "B"))
    base = merge_weight(weight, **parts).to(x.dtype)
    core = preference_core(G, gamma)
    t = torch.einsum("...ij,...j->...i", core, (x @ B.to(x.dtype)).to(core.dtype))
    return F.linear(x, base, bias) + t.to(x.dtype) @ A.to(x.dtype).T


def softmax_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits), float32 for 16-bit logits; 0·log 0 = 0."""
    log_p = torch.log_softmax(logits.to(accumulate_dtype(logits)), dim=-1)
    # p is exactly 0 where log p is −inf; the product and its gradient must not become NaN there
    safe = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return -(log_p.exp() * safe).sum(dim=-1)
