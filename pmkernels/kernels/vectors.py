"""Many small parameters merged in one launch: of L pieces of one long vector, l becomes w0 + Σ_k λ_lk τ_k.

A network has hundreds of biases and norms, each with a λ of its own. One launch for each, forward and backward, costs
more than their few bytes do; here a program takes a piece. The backward, dλ_lk = Σ_s dw_s τ_ks over the piece, is a
program each too, so the sum has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels import dispatch


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
