"""merge_vectors and its gradient: many small parameters merged at once."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import strategies
from pmkernels.autocast import no_autocast, without_autocast
from pmkernels.checks import check_frozen, check_tensor
from pmkernels.launch import HAS_TRITON
from pmkernels.operators import contiguous_like, differentiable, operator
from pmkernels.reference import accumulate_dtype
from pmkernels.strategies import EAGER

if HAS_TRITON:
    from pmkernels.kernels import merge as kernels


def merge_vectors(
    weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor, *, strategy: str = "auto"
) -> Tensor:
    """Merge w0 + Σ_k λ_lk τ_k for each of L pieces of one long vector.

    All biases and norms of a network are merged in one launch.

    Args:
        weight: w0 ``[S]``, the pieces one after the other, frozen. task_vectors: ``[K, S]``, frozen.
        lam: ``[L, K]``, float32: a λ vector for each piece.
        offsets: ``[L + 1]``, int64, on the same device: piece l is ``[offsets[l], offsets[l + 1])``; from 0 to S,
            not decreasing. Its values are not looked at here.
        strategy: ``"auto"``, ``"eager"`` or ``"fused"`` (as is ``"streamed"``), as in :func:`merge_weight`.

    Returns:
        ``[S]`` like ``weight``, summed in float32 and rounded once. Differentiable once in lam.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, naming the argument.
    """
    check_tensor("weight", weight)
    check_tensor("task_vectors", task_vectors, weight.device)
    check_tensor("lam", lam, weight.device, learned=True)
    if weight.ndim != 1:
        raise ValueError(f"weight: expected shape [S], got {list(weight.shape)}")
    if task_vectors.ndim != 2 or task_vectors.shape[1] != weight.shape[0]:
        raise ValueError(f"task_vectors: expected shape [K, {weight.shape[0]}], got {list(task_vectors.shape)}")
    if lam.ndim != 2 or lam.shape[1] != task_vectors.shape[0]:
        raise ValueError(f"lam: expected shape [L, {task_vectors.shape[0]}], got {list(lam.shape)}")
    _check_offsets(offsets, weight.device, lam.shape[0])
    check_frozen(weight=weight, task_vectors=task_vectors)
    tensors = {"weight": weight, "task_vectors": task_vectors, "lam": lam}
    chosen = strategies.resolve(strategy, tensors, weight.device, own="kernels")
    with no_autocast(weight.device.type):
        compute = _Eager.apply if chosen == EAGER else vectors_operator
        merged: Tensor = compute(weight, task_vectors, lam, offsets)
        return merged


def merge_vectors_gradient(grad: Tensor, task_vectors: Tensor, offsets: Tensor, *, strategy: str = "auto") -> Tensor:
    """Compute dλ_lk = Σ_s g_s τ_ks over each piece, as autograd of :func:`merge_vectors` does.

    Args:
        grad: g ``[S]``, the gradient of the merged vector. task_vectors, offsets, strategy: as there.

    Returns:
        ``[L, K]`` in float32 (float64 if anything is).

    Raises:
        TypeError, ValueError: as :func:`merge_vectors`.
    """
    check_tensor("task_vectors", task_vectors)
    device = task_vectors.device
    check_tensor("grad", grad, device)
    if task_vectors.ndim != 2 or grad.shape != task_vectors.shape[1:]:
        raise ValueError(f"task_vectors: expected shape [K, {grad.numel()}], got {list(task_vectors.shape)}")
    _check_offsets(offsets, device)
    with no_autocast(device.type):
        chosen = strategies.resolve(strategy, {"grad": grad, "task_vectors": task_vectors}, device, own="kernels")
        compute = _project if chosen == EAGER else vectors_backward_operator
        gradient: Tensor = compute(grad, task_vectors, offsets)
        return gradient


def _check_offsets(offsets: Tensor, device: torch.device, pieces: int | None = None) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.layout != torch.strided:
        got = f"{offsets.dtype}, {offsets.layout}" if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets: expected a dense int64 tensor, got {got}")
    wrong = offsets.ndim != 1 or not offsets.numel() if pieces is None else offsets.shape != (pieces + 1,)
    if wrong or offsets.device != device:
        expected = f"[{'L + 1' if pieces is None else pieces + 1}] on {device}"
        raise ValueError(f"offsets: expected {expected}, got {list(offsets.shape)} on {offsets.device}")


class _Eager(torch.autograd.Function):
    """The eager form: one task vector at a time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(task_vectors, offsets)
        ctx.lam_dtype = lam.dtype
        dtype = accumulate_dtype(weight, lam)
        lengths = offsets.diff()
        merged = weight.to(dtype)
        for k in range(task_vectors.shape[0]):
            # one task vector at a time: never K of them in float32
            spread = torch.repeat_interleave(lam[:, k].to(dtype), lengths, output_size=weight.numel())
            merged = torch.addcmul(merged, spread, task_vectors[k].to(dtype))
        if not task_vectors.shape[0]:
            return weight.clone()
        # PyTorch 2.11 compiles a result that is a conversion to its own dtype into one without a gradient
        return merged if dtype == weight.dtype else merged.to(weight.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task_vectors, offsets = ctx.saved_tensors
        like = grad if ctx.lam_dtype != torch.float64 else grad.double()
        return None, None, _project(like, task_vectors, offsets).to(ctx.lam_dtype), None


def _project(grad: Tensor, task_vectors: Tensor, offsets: Tensor) -> Tensor:
    pieces, tasks = offsets.numel() - 1, task_vectors.shape[0]
    if not pieces or not tasks:
        return grad.new_zeros(pieces, tasks, dtype=accumulate_dtype(grad, task_vectors))
    # one task vector at a time, and in double: segment_reduce adds up a long piece one number after the other
    lengths, wide = offsets.diff(), grad.double()
    # its own check of the lengths would wait for a GPU, which a CUDA graph cannot
    add = functools.partial(torch.segment_reduce, reduce="sum", lengths=lengths, initial=0.0, unsafe=grad.is_cuda)
    sums = [add(tau.double() * wide) for tau in task_vectors]
    return torch.stack(sums, dim=1).to(accumulate_dtype(grad, task_vectors))


@operator(
    "merge_vectors", "(Tensor weight, Tensor task_vectors, Tensor lam, Tensor offsets) -> Tensor", fake=contiguous_like
)
def vectors_operator(weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
    """Merge w0 + Σ_k λ_lk τ_k piece by piece."""
    weight, lam, offsets = weight.contiguous(), lam.contiguous(), offsets.contiguous()
    return kernels.merge_vectors_fwd(weight, _rows_contiguous(task_vectors), lam, offsets)


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


@operator(
    "merge_vectors_backward",
    "(Tensor grad, Tensor task_vectors, Tensor offsets) -> Tensor",
    fake=lambda grad, taus, offsets: grad.new_empty((offsets.shape[0] - 1, taus.shape[0]), dtype=torch.float32),
)
def vectors_backward_operator(grad: Tensor, task_vectors: Tensor, offsets: Tensor) -> Tensor:
    """Return dλ [L, K] of the merged [S]."""
    return kernels.merge_vectors_bwd(grad, _rows_contiguous(task_vectors), offsets.contiguous())


@differentiable(vectors_operator, keep=lambda _, inputs, merged: (inputs[1], inputs[3]))
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, vectors_backward_operator(grad, *ctx.saved_tensors), None
