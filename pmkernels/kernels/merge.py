"""Merged parameters written out: one read of each tensor, one write.

W(γ) has any number of dimensions. A network has hundreds of biases and norms, each with a λ of its own: one launch for
each, forward and backward, costs more than their few bytes do. As L pieces of one long vector they are merged in one
launch, in which a program takes a piece; l becomes w0 + Σ_k λ_lk τ_k. The backward, dλ_lk = Σ_s dw_s τ_ks over the
piece, is a program each too, so the sum has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels import dispatch, launch
from pmkernels.kernels.assembly import weight_tile
from pmkernels.kernels.rows import as_matrix
from pmkernels.low_rank import Terms


@triton.jit
def merge_weight_kernel(
    weight_ptr,
    task_vectors_ptr,
    lam_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    N,
    D,
    R,
    weight_stride_n,
    weight_stride_d,
    task_stride_k,
    task_stride_n,
    task_stride_d,
    left_stride_n,
    left_stride_r,
    right_stride_d,
    right_stride_r,
    out_stride_n,
    out_stride_d,
    K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write one tile of W(γ).

    Longer than 60 lines because every pointer, size and stride is an argument of its own.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(D, BLOCK_D)
    n = pid // blocks_d * BLOCK_N + tl.arange(0, BLOCK_N)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    w = weight_tile(
        weight_ptr,
        task_vectors_ptr,
        lam_ptr,
        left_ptr,
        right_ptr,
        n,
        d,
        N,
        D,
        R,
        weight_stride_n,
        weight_stride_d,
        task_stride_k,
        task_stride_n,
        task_stride_d,
        left_stride_n,
        left_stride_r,
        right_stride_d,
        right_stride_r,
        K,
        LOW_RANK,
        UNROLL,
        STAGES,
    )  # [BLOCK_N, BLOCK_D]
    tl.store(
        out_ptr + n[:, None] * out_stride_n + d[None, :] * out_stride_d,
        w.to(out_ptr.dtype.element_ty),
        mask=(n[:, None] < N) & (d[None, :] < D),
    )


def merge_weight(terms: Terms, out: Tensor) -> Tensor:
    """Write W(γ) into ``out``, of weight's shape and any strides."""
    weight, task_vectors, lam, low_rank = terms
    if out.numel() == 0:
        return out
    tensors = (weight, out) if task_vectors is None else (weight, out, task_vectors)
    matrices = tensors if low_rank is not None else as_matrix(*tensors)
    if matrices is None:
        # dimensions that cannot be merged in place: contiguous copies, one write more
        weight, target, *rest = (t.contiguous() for t in tensors)
        merge_weight(Terms(weight, rest[0] if rest else None, lam), target)
        return out if target is out else out.copy_(target)
    matrix, target = matrices[:2]
    taus = matrices[2] if len(matrices) > 2 else None
    n, d = matrix.shape
    left, right = (None, None) if low_rank is None else low_rank
    rank = 0 if left is None else left.shape[1]
    config = dispatch.config(
        "flat" if n == 1 else "merge", weight, rows=0, rank=rank, aligned=launch.is_aligned(matrix, taus)
    )
    merge_weight_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(d, config.block_d),)](
        *(matrix, taus, lam, left, right, target),
        *(n, d, rank),
        *matrix.stride(),
        *launch.strides(taus, 3),
        *launch.strides(left, 2),
        *launch.strides(right, 2),
        *target.stride(),
        K=0 if taus is None else taus.shape[0],
        LOW_RANK=low_rank is not None,
        **config.options("BLOCK_N", "BLOCK_D", "UNROLL", "STAGES"),
    )
    return out


@triton.jit
def merge_vectors_fwd_kernel(
    weight_ptr, task_vectors_ptr, lam_ptr, offsets_ptr, out_ptr, task_stride_k, K: tl.constexpr, BLOCK: tl.constexpr
):
    piece = tl.program_id(0)
    end = tl.load(offsets_ptr + piece + 1)
    for first in range(tl.load(offsets_ptr + piece), end, BLOCK):
        s = first + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + s, mask=s < end, other=0.0).to(tl.float32)  # [BLOCK]
        tau_ptr = task_vectors_ptr + s
        for k in range(K):
            lam = tl.load(lam_ptr + piece * K + k)
            w += lam * tl.load(tau_ptr, mask=s < end, other=0.0).to(tl.float32)
            tau_ptr += task_stride_k
        tl.store(out_ptr + s, w.to(out_ptr.dtype.element_ty), mask=s < end)


@triton.jit
def merge_vectors_bwd_kernel(
    grad_ptr, task_vectors_ptr, offsets_ptr, d_lam_ptr, task_stride_k, grad_stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    piece = tl.program_id(0)
    start = tl.load(offsets_ptr + piece)
    end = tl.load(offsets_ptr + piece + 1)
    tau_ptr = task_vectors_ptr
    for k in range(K):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(start, end, BLOCK):
            s = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + s * grad_stride, mask=s < end, other=0.0).to(tl.float32)  # [BLOCK]
            total += grad * tl.load(tau_ptr + s, mask=s < end, other=0.0).to(tl.float32)
        tl.store(d_lam_ptr + piece * K + k, tl.sum(total))
        tau_ptr += task_stride_k


def merge_vectors_fwd(weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
    """Return merged [S] by lam [L, K] and offsets [L + 1]; rows are contiguous."""
    out = torch.empty_like(weight)
    if lam.shape[0] and weight.numel():
        config = dispatch.config("vectors", weight, rows=0, rank=0)
        pointers, constants = (weight, task_vectors, lam, offsets, out), {"K": lam.shape[1], "BLOCK": config.block_d}
        merge_vectors_fwd_kernel[(lam.shape[0],)](*pointers, task_vectors.stride(0), **constants, **config.options())
    return out


def merge_vectors_bwd(grad: Tensor, task_vectors: Tensor, offsets: Tensor) -> Tensor:
    """Return dλ [L, K] in float32 of grad [S] and task_vectors [K, S]."""
    pieces, tasks = offsets.numel() - 1, task_vectors.shape[0]
    d_lam = torch.empty(pieces, tasks, dtype=torch.float32, device=grad.device)
    if pieces:
        config = dispatch.config("vectors", grad, rows=0, rank=0)
        pointers, strides = (grad, task_vectors, offsets, d_lam), (task_vectors.stride(0), grad.stride(0))
        merge_vectors_bwd_kernel[(pieces,)](*pointers, *strides, K=tasks, BLOCK=config.block_d, **config.options())
    return d_lam
