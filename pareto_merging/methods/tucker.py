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
    """A [N, r], G [r, r, K], B [D, r]: M_k ≈ A·G[:, :, k]·Bᵀ."""

    A: Tensor
    G: Tensor
    B: Tensor


def tucker(maps: Sequence[Tensor], metrics: Sequence[Tensor], rank: int) -> Factors | None:
    """Return shared factors of K maps M_k [N, D], near in the metrics C_k [D, D]; None where all are zero.

    A and B minimise Σ_k ‖(M_k − A·G_k·Bᵀ)·C^{1/2}‖² with C = mean_k C_k, up to the iteration's local optimum; then
    each G_k minimises ‖(M_k − A·G_k·Bᵀ)·C_k^{1/2}‖². With C_k = XᵀX that is the distance of outputs. r is ``rank``, or
    the smaller of N and D. The columns of A and of B are orthogonal and of length √2. In float64.

    Raises ValueError where C is not positive definite.
    """
    tensor, metric = torch.stack([m.double() for m in maps]), torch.stack([c.double() for c in metrics])
    if not bool(tensor.any()):
        return None
    rank = min(rank, *tensor.shape[1:])
    # C = L·Lᵀ: ‖M·C^{1/2}‖ = ‖M·L‖
    lower, info = torch.linalg.cholesky_ex(metric.mean(dim=0))
    if int(info):
        raise ValueError("metrics: expected a positive definite mean, got one that is not")
    A, B = _iterate(tensor @ lower, rank)
    A = COLUMN * A
    B = COLUMN * torch.linalg.qr(torch.linalg.solve_triangular(lower.t(), B, upper=True)).Q
    right = metric @ B
    core = torch.linalg.solve(B.t() @ right, A.t() @ tensor @ right / COLUMN**2, left=False)
    return Factors(A, core.permute(1, 2, 0).contiguous(), B)


def _iterate(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal A [N, r] and B [D, r] of a tensor [K, N, D]."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tensor.shape[2], rank, dtype=tensor.dtype, generator=generator)
    B = torch.linalg.qr(start.to(tensor.device)).Q
    # some steps towards the leading right singular space, which the sweeps then need not find
    for _ in range(3):
        B = torch.linalg.qr((tensor.transpose(1, 2) @ (tensor @ B)).sum(dim=0)).Q
    for _ in range(SWEEPS):
        A = _leading((tensor @ B).transpose(0, 1).flatten(1), rank)
        B = _leading((tensor.transpose(1, 2) @ A).transpose(0, 1).flatten(1), rank)
    return _leading((tensor @ B).transpose(0, 1).flatten(1), rank), B


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns [N, r] that span the leading left singular vectors of a matrix [N, m]."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
    vectors = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:]
    return torch.linalg.qr(matrix @ vectors).Q
