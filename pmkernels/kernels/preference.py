"""A folded layer with a preference per row, for inference. y = x·Wᵀ + t·Aᵀ + b with t_m = C(γ_m)·Bᵀx_m.

W [N, D] and A [N, RANK] lie side by side in one matrix ``wide`` [N, D + RANK]. There are two ways to compute y, and in
both the low-rank part is in the float32 sum before y is rounded:

- few rows: one kernel. t is linear in x, so a tile of y needs only the tiles of x it reads anyway: beside x·Wᵀ it
  adds up s = x·B, and the product t·Aᵀ last. That holds for any part of D too, which is split over several programs
  where there are few tiles; each adds the low-rank part of its own columns.
- many rows: one kernel writes [x | t] and the library multiplies it by ``wide``: a product RANK columns longer.

x is the left operand of both products: s has RANK columns and 64 rows, so on sm_90 it is a wgmma as well. With Bᵀ on
the left it was an mma.sync of 16 rows, beside which ptxas serialises every wgmma of the loop (its advisory C7515).

γ is [groups, K] and row m belongs to group m // rows_per_group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from pmkernels import dispatch, launch
from pmkernels.kernels.linear import sum_splits
from pmkernels.kernels.rows import as_rows, row_offsets


@triton.jit
def mixed(
    s,
    core_ptr,
    gamma_ptr,
    groups,
    valid,
    R,
    core_stride_out,
    core_stride_in,
    core_stride_k,
    K: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return t = Σ_k γ_k s·G[:, :, k]ᵀ, a row for each row of x."""
    r = tl.arange(0, RANK)
    t = tl.zeros(s.shape, dtype=tl.float32)
    # a product in flight would read registers that the next round writes
    for k in tl.range(0, K, num_stages=1):
        core = tl.load(
            core_ptr + r[:, None] * core_stride_in + r[None, :] * core_stride_out + k * core_stride_k,
            mask=(r[:, None] < R) & (r[None, :] < R),
            other=0.0,
        )  # [RANK in, RANK out]
        gamma = tl.load(gamma_ptr + groups * K + k, mask=valid, other=0.0)  # [BLOCK_M]
        t = tl.dot(s * gamma[:, None], core, acc=t, input_precision=PRECISION)
    return t


@triton.jit
def preference_linear_kernel(
    x_ptr,
    wide_ptr,
    right_ptr,
    core_ptr,
    gamma_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    D,
    R,
    rows_per_group,
    d_per_split,
    x_inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_d,
    wide_stride_n,
    right_stride_d,
    right_stride_r,
    core_stride_out,
    core_stride_in,
    core_stride_k,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of y, with the low-rank part of the columns it reads.

    Longer than 60 lines because every pointer, size and stride is an argument of its own.
    """
    # neighbouring programs share the rows of W, which are dear, and differ in the rows of x
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = tl.arange(0, RANK)
    first, end = 0, D
    if SPLIT:
        split = tl.program_id(1)
        first = split * d_per_split
        end = tl.minimum(first + d_per_split, D)
        y_ptr += split.to(tl.int64) * M * N
    x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for d0 in tl.range(first, end, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        x = tl.load(
            x_ptr + x_rows[:, None] + d[None, :] * x_stride_d, mask=(m[:, None] < M) & (d[None, :] < D), other=0.0
        ).to(COMPUTE)  # [BLOCK_M, BLOCK_D]
        w = tl.load(
            wide_ptr + n[None, :] * wide_stride_n + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0
        ).to(COMPUTE)  # [BLOCK_D, BLOCK_N]
        right = tl.load(
            right_ptr + d[:, None] * right_stride_d + r[None, :] * right_stride_r,
            mask=(d[:, None] < D) & (r[None, :] < R),
            other=0.0,
        ).to(COMPUTE)  # [BLOCK_D, RANK]
        acc = tl.dot(x, w, acc=acc, input_precision=PRECISION)
        s = tl.dot(x, right, acc=s, input_precision=PRECISION)
    groups = (m // rows_per_group).to(tl.int64)
    t = mixed(
        s,
        core_ptr,
        gamma_ptr,
        groups,
        m < M,
        R,
        core_stride_out,
        core_stride_in,
        core_stride_k,
        K,
        RANK,
        RANK_PRECISION,
    )  # [BLOCK_M, RANK]
    left = tl.load(wide_ptr + n[None, :] * wide_stride_n + D + r[:, None], mask=n[None, :] < N, other=0.0)
    acc = tl.dot(t, left.to(tl.float32), acc=acc, input_precision=RANK_PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None].to(tl.int64) * N + n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def preference_linear(x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [*, N] of x [*, D] in one kernel; gamma is contiguous."""
    (d, rank), n = B.shape, wide.shape[0]
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    config = dispatch.config("preference", x, rows=rows.M, rank=rank, aligned=launch.is_aligned(x, wide[:, :d], B))
    tiles = triton.cdiv(rows.M, config.block_m) * triton.cdiv(n, config.block_n)
    splits, d_per_split = launch.splits_of_d(config, dispatch.multiprocessors(x.device), rows.M, n, d, tiles)
    bias = None if bias is None else bias.contiguous()
    target = y if splits == 1 else torch.empty(splits, rows.M, n, dtype=torch.float32, device=x.device)
    preference_linear_kernel[(tiles, splits)](
        *(rows.tensor, wide, B, G, gamma, bias if splits == 1 else None, target),
        *(rows.M, n, d, rank, rows.M // gamma.shape[0], d_per_split),
        *rows.layout,
        wide.stride(0),
        *B.stride(),
        *G.stride(),
        K=G.shape[2],
        SPLIT=splits > 1,
        HAS_BIAS=bias is not None and splits == 1,
        RANK=launch.padded_rank(rank),
        **launch.precisions(x.dtype),
        **config.options("BLOCK_M", "BLOCK_N", "BLOCK_D", "STAGES"),
    )
    return y if splits == 1 else sum_splits(target, bias, y)


@triton.jit
def widen_kernel(
    x_ptr,
    right_ptr,
    core_ptr,
    gamma_ptr,
    out_ptr,
    M,
    D,
    R,
    rows_per_group,
    x_inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_d,
    right_stride_d,
    right_stride_r,
    core_stride_out,
    core_stride_in,
    core_stride_k,
    out_stride_m,
    K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Copy some rows of x and write t beside them.

    Longer than 60 lines because every pointer, size and stride is an argument of its own.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
    out_ptr += m[:, None].to(tl.int64) * out_stride_m
    s = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (m[:, None] < M) & (d[None, :] < D)
        x = tl.load(x_ptr + x_rows[:, None] + d[None, :] * x_stride_d, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
        tl.store(out_ptr + d[None, :], x, mask=inside)
        right = tl.load(
            right_ptr + d[:, None] * right_stride_d + r[None, :] * right_stride_r,
            mask=(d[:, None] < D) & (r[None, :] < R),
            other=0.0,
        )  # [BLOCK_D, RANK]
        s = tl.dot(x.to(COMPUTE), right.to(COMPUTE), acc=s, input_precision=PRECISION)
    groups = (m // rows_per_group).to(tl.int64)
    t = mixed(
        s,
        core_ptr,
        gamma_ptr,
        groups,
        m < M,
        R,
        core_stride_out,
        core_stride_in,
        core_stride_k,
        K,
        RANK,
        RANK_PRECISION,
    )  # [BLOCK_M, RANK], zero from column R on
    tl.store(out_ptr + D + r[None, :], t.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)


def widen(x: Tensor, G: Tensor, B: Tensor, gamma: Tensor) -> Tensor:
    """Return [x | t], reading x [*, D] once; gamma [groups, K] is contiguous."""
    d, rank = B.shape
    padded = launch.padded_rank(rank)
    out = torch.empty(*x.shape[:-1], d + padded, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    if rows.M == 0:
        return out
    config = dispatch.config("widen", x, rows=rows.M, rank=rank, aligned=launch.is_aligned(x, B))
    widen_kernel[(triton.cdiv(rows.M, config.block_m),)](
        *(rows.tensor, B, G, gamma, out),
        *(rows.M, d, rank, rows.M // gamma.shape[0]),
        *rows.layout,
        *B.stride(),
        *G.stride(),
        d + padded,
        K=G.shape[2],
        RANK=padded,
        **launch.precisions(x.dtype),
        **config.options("BLOCK_M", "BLOCK_D", "STAGES"),
    )
    return out


def preference_linear_of_wide(
    x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None
) -> Tensor:
    """Return what :func:`preference_linear` does by the library's product of ``wide`` with [x | t]."""
    return F.linear(widen(x, G, B, gamma), wide, bias)
