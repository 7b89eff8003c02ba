"""K matrices written with shared factors: M_k ≈ A·G_k·Bᵀ, near in the metric of their inputs.

A Tucker decomposition (Tucker 1966) along the first two of three dimensions, found by higher-order orthogonal iteration
(De Lathauwer, De Moor & Vandewalle, SIAM J. Matrix Anal. Appl. 2000, algorithm 4.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SWEEPS = 20
# columns of A and B as long as those that parametrize draws: √2, whatever the size
COLUMN = 2.0**0.5


class Factors(NamedTuple):
    """A [N, r], G [r, s, K], B [D, s]: M_k ≈ A·G[:, :, k]·Bᵀ."""

    A: Tensor
    G: Tensor
    B: Tensor


def balanced(maps: Tensor, metrics: Tensor) -> Tensor:
    """Return K matrices [K, N, D] of sum 0, nearest to ``maps``. C_k [K, D, D] are the metrics.

    min Σ_k ‖(M_k − D_k)·C_k^{1/2}‖² with Σ_k D_k = 0 has D_k = M_k − Λ·C_k⁻¹, Λ = (Σ_k M_k)·(Σ_k C_k⁻¹)⁻¹: what M_k
    have in common goes where each task's inputs are small.
    """
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(metrics))
    return maps - torch.linalg.solve(inverses.sum(dim=0), maps.sum(dim=0), left=False) @ inverses


def tucker(maps: Sequence[Tensor], metrics: Sequence[Tensor], rank: int) -> Factors | None:
    """Return shared factors of K maps M_k [N, D], near in metrics C_k [D, D].

    A and B minimise Σ_k ‖(M_k − A·G_k·Bᵀ)·C^{1/2}‖² with C = mean_k C_k and the M_k :func:`balanced`, up to the
    iteration's local optimum; then all G_k minimise Σ_k ‖(M_k − A·G_k·Bᵀ)·C_k^{1/2}‖² with Σ_k G_k = 0. With
    C_k = XᵀX that is the distance of outputs. r and s are ``rank``, or N and D where those are smaller. The columns of
    A and of B are orthogonal and of length √2. In float64.

    None where all are zero. Raises ValueError where a C_k is not positive definite.
    """
    tensor, metric = torch.stack([m.double() for m in maps]), torch.stack([c.double() for c in metrics])
    if not bool(tensor.any()):
        return None
    if bool(torch.linalg.cholesky_ex(metric).info.any()):
        raise ValueError("metrics: expected positive definite ones, got one that is not")
    tensor = balanced(tensor, metric)
    # C = L·Lᵀ: ‖M·C^{1/2}‖ = ‖M·L‖
    lower = torch.linalg.cholesky(metric.mean(dim=0))
    A, B = _iterate(tensor @ lower, rank)
    A = COLUMN * A
    B = COLUMN * torch.linalg.qr(torch.linalg.solve_triangular(lower.t(), B, upper=True)).Q
    right = metric @ B
    inner = B.t() @ right
    core = balanced(torch.linalg.solve(inner, A.t() @ tensor @ right / COLUMN**2, left=False), inner)
    return Factors(A, core.permute(1, 2, 0).contiguous(), B)


def _iterate(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal A [N, r] and B [D, s] of a tensor [K, N, D]."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tensor.shape[2], min(rank, tensor.shape[2]), dtype=tensor.dtype, generator=generator)
    B = torch.linalg.qr(start.to(tensor.device)).Q
    # some steps towards the leading right singular space, which the sweeps then need not find
    for _ in range(3):
        B = torch.linalg.qr((tensor.transpose(1, 2) @ (tensor @ B)).sum(dim=0)).Q
    for _ in range(SWEEPS):
        A = _leading((tensor @ B).transpose(0, 1).flatten(1), rank)
        B = _leading((tensor.transpose(1, 2) @ A).transpose(0, 1).flatten(1), rank)
    return _leading((tensor @ B).transpose(0, 1).flatten(1), rank), B


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns [N, r], r ≤ N, that span a matrix's leading left singular vectors."""
    rank = min(rank, matrix.shape[0])
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
    vectors = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:]
    # where the matrix has no more, nothing is lost by any columns at all
    return torch.linalg.qr(matrix @ vectors).Q
