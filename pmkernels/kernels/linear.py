"""y = x·W(γ)ᵀ + b and dx = dy·W(γ), W never being in memory.

It is assembled tile by tile inside the matrix product.

One kernel for both: dx is the same product with Wᵀ, which is W with its strides and the factors of its low-rank term
exchanged. It computes yᵀ = W·xᵀ, so that the assembled tile is the left operand, which may stay in registers.

With one preference per row, W is the base W0 + Σ λ_k τ_k and the accumulator starts at the low-rank part t·Aᵀ
(dx: ds·Bᵀ), t and ds from :mod:`pmkernels.kernels.low_rank`. A constant term of such a base is part of that start,
[x·B_c | t]·[A_c | A]ᵀ.

Few rows make few tiles, and reading W0 and τ wants every multiprocessor: D is then split over several programs, whose
partial results are added in a fixed order by a second kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels import dispatch, launch
from pmkernels.kernels import low_rank as row_kernels
from pmkernels.kernels.assembly import weight_tile
from pmkernels.kernels.rows import as_rows, row_offsets
from pmkernels.low_rank import Terms


@triton.jit
def linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    task_vectors_ptr,
    lam_ptr,
    left_ptr,
    right_ptr,
    t_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    D,
    R,
    d_per_split,
    x_inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_d,
    weight_stride_n,
    weight_stride_d,
    task_stride_k,
    task_stride_n,
    task_stride_d,
    left_stride_n,
    left_stride_r,
    right_stride_d,
    right_stride_r,
    K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    PER_ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply one tile of rows with one of W, assembled on the way.

    Longer than 60 lines because every pointer, size and stride is an argument of its own.
    """
    # neighbouring programs share the rows of W, which are dear, and differ in the rows of x
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first, end, low_rank_rows = 0, D, M
    if SPLIT:
        split = tl.program_id(1)
        first = split * d_per_split
        end = tl.minimum(first + d_per_split, D)
        # the low-rank part belongs to one of the splits
        low_rank_rows = tl.where(split == 0, M, 0)
        y_ptr += split.to(tl.int64) * M * N
    x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if PER_ROW:
        # its loads are too few to be worth a pipeline
        for r0 in tl.range(0, R, 16, num_stages=1):
            r = r0 + tl.arange(0, 16)
            left = tl.load(
                left_ptr + n[:, None] * left_stride_n + r[None, :] * left_stride_r,
                mask=(n[:, None] < N) & (r[None, :] < R),
                other=0.0,
            )  # [BLOCK_N, 16]
            t = tl.load(
                t_ptr + m[None, :].to(tl.int64) * R + r[:, None],
                mask=(m[None, :] < low_rank_rows) & (r[:, None] < R),
                other=0.0,
            )  # [16, BLOCK_M]
            acc = tl.dot(left, t, acc=acc, input_precision=RANK_PRECISION)
    for d0 in tl.range(first, end, BLOCK_D, num_stages=1):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        x = tl.load(
            x_ptr + x_rows[None, :] + d[:, None] * x_stride_d, mask=(m[None, :] < M) & (d[:, None] < D), other=0.0
        )  # [BLOCK_D, BLOCK_M]
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
        acc = tl.dot(w.to(x.dtype).to(COMPUTE), x.to(COMPUTE), acc=acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + m[None, :].to(tl.int64) * N + n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m[None, :] < M) & (n[:, None] < N),
    )


@triton.jit
def sum_splits_kernel(partial_ptr, bias_ptr, y_ptr, size, N, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    partial_ptr += element
    for _ in range(splits):
        total += tl.load(partial_ptr, mask=element < size, other=0.0)  # [BLOCK]
        partial_ptr += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + element % N, mask=element < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, total.to(y_ptr.dtype.element_ty), mask=element < size)


def sum_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Add up the parts [splits, M, N] and bias into y, in that order."""
    add = dispatch.config("sum", y, rows=partial.shape[1], rank=0)
    constants, sizes = {"HAS_BIAS": bias is not None, "BLOCK": add.block_d}, (y.numel(), y.shape[-1], partial.shape[0])
    sum_splits_kernel[(triton.cdiv(y.numel(), add.block_d),)](partial, bias, y, *sizes, **constants, **add.options())
    return y


def linear_fwd(
    x: Tensor, terms: Terms, *, start: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return y [*, N] of x [*, D] and the terms of W [N, D]. ``start`` = (t [M, R], left [N, R]) adds t·leftᵀ."""
    weight, task_vectors, lam, low_rank = terms
    n, d = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    if start is not None and low_rank is not None:
        # the kernel takes one of the two
        s, _ = row_kernels.shrink(x, low_rank[1], None, None)
        start, low_rank = (torch.cat([s, start[0]], dim=1), torch.cat([low_rank[0], start[1]], dim=1)), None
    left, right = (None, None) if low_rank is None else low_rank
    t, left = (None, left) if start is None else start
    rank = 0 if left is None else left.shape[1]
    aligned = launch.is_aligned(x, weight, task_vectors)
    config = dispatch.config("linear", x, rows=rows.M, rank=rank, aligned=aligned)
    tiles = triton.cdiv(rows.M, config.block_m) * triton.cdiv(n, config.block_n)
    splits, d_per_split = launch.splits_of_d(config, dispatch.multiprocessors(x.device), rows.M, n, d, tiles)
    bias = None if bias is None else bias.contiguous()
    target = y if splits == 1 else torch.empty(splits, rows.M, n, dtype=torch.float32, device=x.device)
    linear_fwd_kernel[(tiles, splits)](
        *(rows.tensor, weight, task_vectors, lam, left, right, t, bias if splits == 1 else None, target),
        *(rows.M, n, d, rank, d_per_split),
        *rows.layout,
        *weight.stride(),
        *launch.strides(task_vectors, 3),
        *launch.strides(left, 2),
        *launch.strides(right, 2),
        K=0 if task_vectors is None else task_vectors.shape[0],
        LOW_RANK=low_rank is not None,
        PER_ROW=start is not None,
        SPLIT=splits > 1,
        HAS_BIAS=bias is not None and splits == 1,
        **launch.precisions(x.dtype),
        **config.options("BLOCK_M", "BLOCK_N", "BLOCK_D", "UNROLL", "STAGES"),
    )
    return y if splits == 1 else sum_splits(target, bias, y)


def linear_bwd_x(dy: Tensor, terms: Terms, *, start: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return dx [*, D] = dy·W of dy [*, N]. ``start`` = (ds [M, R], B [D, R])."""
    weight, task_vectors, lam, low_rank = terms
    transposed = None if task_vectors is None else task_vectors.transpose(1, 2)
    exchanged = None if low_rank is None else (low_rank[1], low_rank[0])
    return linear_fwd(dy, Terms(weight.t(), transposed, lam, exchanged), start=start)
