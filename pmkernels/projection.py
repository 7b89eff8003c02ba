"""project_task_vectors: T_k = Aᵀτ_kB, all that a data-free objective needs of τ."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import strategies
from pmkernels.autocast import no_autocast, without_autocast
from pmkernels.checks import check_frozen, check_tensor
from pmkernels.launch import HAS_TRITON
from pmkernels.operators import differentiable, operator
from pmkernels.strategies import EAGER

if HAS_TRITON:
    from pmkernels.kernels import low_rank as kernels


def project_task_vectors(task_vectors: Tensor, A: Tensor, B: Tensor, *, strategy: str = "auto") -> Tensor:
    """Compute T_k = Aᵀ·τ_k·B of every task. ⟨A·C·Bᵀ, τ_k⟩ = ⟨C, T_k⟩ for any C.

    Args:
        task_vectors: τ ``[K, out, in]``, frozen. A, B: ``[out, r]``, ``[in, r]``, float32 (or float64).
        strategy: ``"auto"``, ``"eager"`` or ``"fused"`` (as is ``"streamed"``), as in :func:`merge_weight`.

    Returns:
        ``[K, r, r]`` in the dtype of A. Differentiable once in A and B; no copy of a task vector is kept, and on a GPU
        each is read once forward and once backward.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, naming the argument.
    """
    check_tensor("task_vectors", task_vectors)
    device = task_vectors.device
    for name, value in (("A", A), ("B", B)):
        check_tensor(name, value, device, learned=True)
    if task_vectors.ndim != 3:
        raise ValueError(f"task_vectors: expected shape [K, out, in], got {list(task_vectors.shape)}")
    check_frozen(task_vectors=task_vectors)
    _, n, d = task_vectors.shape
    if A.ndim != 2 or A.shape[0] != n or A.shape[1] < 1:
        raise ValueError(f"A: expected shape [{n}, R], got {list(A.shape)}")
    if B.shape != (d, A.shape[1]) or B.dtype != A.dtype:
        raise ValueError(f"B: expected shape [{d}, {A.shape[1]}] in {A.dtype}, got {list(B.shape)} in {B.dtype}")
    chosen = strategies.resolve(strategy, {"task_vectors": task_vectors, "A": A, "B": B}, device, own="kernels")
    with no_autocast(device.type):
        inputs = task_vectors, A, B
        projected: Tensor = _Eager.apply(*inputs) if chosen == EAGER else projection_operator(*inputs)[0]
        return projected


class _Eager(torch.autograd.Function):
    """The eager form: one task vector at a time, none copied or kept."""

    @staticmethod
    def forward(ctx: Any, task_vectors: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(task_vectors, A, B)
        T = A.new_empty(task_vectors.shape[0], A.shape[1], B.shape[1])
        for k, tau in enumerate(task_vectors):
            T[k] = A.t() @ (tau.to(A.dtype) @ B)
        return T

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        task_vectors, A, B = ctx.saved_tensors
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for tau, dT in zip(task_vectors, grad, strict=True):
            tau = tau.to(A.dtype)
            dA.addmm_(tau @ B, dT.t())
            dB.addmm_(tau.t() @ A, dT)
        return None, dA, dB


def _shrink(matrices: Tensor, factor: Tensor) -> Tensor:
    """Return τ_k·factor of all tasks by one launch, which reads every task vector once."""
    products, _ = kernels.shrink(matrices, factor, None, None)
    return products.view(*matrices.shape[:-1], factor.shape[1])


def _fake_projected(task_vectors: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    tasks, n, _ = task_vectors.shape
    return A.new_empty(tasks, A.shape[1], B.shape[1]), A.new_empty(tasks, n, B.shape[1])


@operator("project_task_vectors", "(Tensor task_vectors, Tensor A, Tensor B) -> (Tensor, Tensor)", fake=_fake_projected)
def projection_operator(task_vectors: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return T [K, R, R], and τ_k·B of all tasks for the backward."""
    right = _shrink(task_vectors, B)
    return A.t() @ right, right


@operator(
    "project_task_vectors_backward",
    "(Tensor grad, Tensor task_vectors, Tensor A, Tensor right) -> (Tensor, Tensor)",
    fake=lambda grad, taus, A, right: (A.new_empty(A.shape), A.new_empty(taus.shape[2], right.shape[2])),
)
def projection_backward_operator(grad: Tensor, task_vectors: Tensor, A: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return dA = Σ_k τ_kB·dT_kᵀ and dB = Σ_k τ_kᵀA·dT_k."""
    left = _shrink(task_vectors.transpose(1, 2), A)
    dA, dB = torch.einsum("knj,kij->ni", right, grad), torch.einsum("kdi,kij->dj", left, grad)
    return dA.contiguous(), dB.contiguous()


@differentiable(projection_operator, keep=lambda _, inputs, output: (*inputs[:2], output[1]))
def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return None, *projection_backward_operator(grad, *ctx.saved_tensors)
