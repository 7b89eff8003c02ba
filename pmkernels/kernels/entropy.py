"""Shannon entropy of softmax(z) with one read of the logits each way.

With m = max z, e_c = exp(z_c − m), Z = Σ e_c and S = Σ e_c·(z_c − m):

    H = log Z − S / Z        dH/dz_c = −p_c (log p_c + H)        log p_c = (z_c − m) − log Z

Z and S are kept while the maximum moves: when m grows by δ, S becomes e^−δ·(S − δ·Z) and Z becomes e^−δ·Z. The backward
needs m and log Z apart: their sum would lose log 2 beside a logit of 1e4. A logit of −inf adds nothing (0·log 0 = 0).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels.configs import Config
from pmkernels.kernels.rows import as_rows, row_offsets


@triton.jit
def entropy_fwd_kernel(
    logits_ptr,
    entropy_ptr,
    largest_ptr,
    normaliser_ptr,
    M,
    C,
    logits_inner,
    logits_stride_outer,
    logits_stride_inner,
    logits_stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row_offsets(m, logits_inner, logits_stride_outer, logits_stride_inner)
    largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        z = tl.load(
            logits_ptr + rows[:, None] + c[None, :] * logits_stride_c,
            mask=(m[:, None] < M) & (c[None, :] < C),
            other=-float("inf"),
        ).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        # tl.max passes over NaN, which must come out again
        newest = tl.maximum(largest, tl.max(z, axis=1))
        # as long as every logit is −inf there is nothing to shift
        shift = tl.where(newest == -float("inf"), 0.0, newest)
        moved = tl.where(largest == -float("inf"), 0.0, shift - largest)
        shrink = tl.where(largest == -float("inf"), 0.0, tl.exp(-moved))
        below = z - shift[:, None]
        e = tl.exp(below)
        # behind a mask of float32's least number, moved * total is infinite and shrink 0
        weighted = tl.where(shrink == 0.0, 0.0, shrink * (weighted - moved * total))
        weighted += tl.sum(tl.where(below == -float("inf"), 0.0, e * below), axis=1)
        total = shrink * total + tl.sum(e, axis=1)
        largest = newest
    normaliser = tl.log(total)
    entropy = normaliser - weighted / total
    # rounding can make it negative by an ulp; the comparison keeps NaN
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    tl.store(entropy_ptr + m, entropy, mask=m < M)
    tl.store(largest_ptr + m, largest, mask=m < M)
    tl.store(normaliser_ptr + m, normaliser, mask=m < M)


@triton.jit
def entropy_bwd_kernel(
    grad_ptr,
    logits_ptr,
    entropy_ptr,
    largest_ptr,
    normaliser_ptr,
    d_logits_ptr,
    M,
    C,
    logits_inner,
    logits_stride_outer,
    logits_stride_inner,
    logits_stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row_offsets(m, logits_inner, logits_stride_outer, logits_stride_inner)
    grad = tl.load(grad_ptr + m, mask=m < M, other=0.0)
    entropy = tl.load(entropy_ptr + m, mask=m < M, other=0.0)
    largest = tl.load(largest_ptr + m, mask=m < M, other=0.0)
    normaliser = tl.load(normaliser_ptr + m, mask=m < M, other=0.0)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = (m[:, None] < M) & (c[None, :] < C)
        z = tl.load(logits_ptr + rows[:, None] + c[None, :] * logits_stride_c, mask=inside, other=0.0).to(tl.float32)
        log_p = z - largest[:, None] - normaliser[:, None]  # [BLOCK_M, BLOCK_C]
        d_entropy = tl.where(log_p == -float("inf"), 0.0, -tl.exp(log_p) * (log_p + entropy[:, None]))
        tl.store(
            d_logits_ptr + m[:, None].to(tl.int64) * C + c[None, :],
            (d_entropy * grad[:, None]).to(d_logits_ptr.dtype.element_ty),
            mask=inside,
        )


def _launch(rows: int, classes: int) -> tuple[tuple[int], dict[str, Any]]:
    """Return a grid and its constants. 2048 logits at a time: many rows of few classes."""
    block_c = min(max(triton.next_power_of_2(classes), 16), 2048)
    config = Config(block_m=2048 // block_c, num_warps=4)
    return (triton.cdiv(rows, config.block_m),), {"BLOCK_C": block_c, **config.options("BLOCK_M")}


def entropy_fwd(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return H, max z and log Z of logits [*, C], each [*] in float32."""
    rows, classes = as_rows(logits), logits.shape[-1]
    entropy = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    largest, normaliser = torch.empty_like(entropy), torch.empty_like(entropy)
    if rows.M > 0:
        grid, constants = _launch(rows.M, classes)
        pointers = rows.tensor, entropy, largest, normaliser
        entropy_fwd_kernel[grid](*pointers, rows.M, classes, *rows.layout, **constants)
    return entropy, largest, normaliser


def entropy_bwd(grad: Tensor, logits: Tensor, entropy: Tensor, largest: Tensor, normaliser: Tensor) -> Tensor:
    """Return dz [*, C] of dH [*], in the dtype of the logits."""
    rows, classes = as_rows(logits), logits.shape[-1]
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows.M > 0:
        grid, constants = _launch(rows.M, classes)
        pointers = grad.contiguous(), rows.tensor, entropy, largest, normaliser, d_logits
        entropy_bwd_kernel[grid](*pointers, rows.M, classes, *rows.layout, **constants)
    return d_logits
