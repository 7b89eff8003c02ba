"""Reductions of dW = dyᵀ·x, whose tiles exist in registers only.

They are dλ_k = ⟨dW, τ_k⟩, P = dW·B and Q = dWᵀ·A.

Each program forms one tile of dW over all rows and reduces it against τ_1..τ_K, B and A; what it finds goes to its own
place in float32 partials, which are then added in a fixed order: no atomics, the same bits every time. The partials of
P are D / BLOCK_D copies of [N, R], and fewer than N·D elements as long as the block is wider than R.

Where N·D gives too few tiles for the GPU, M is split over several programs: all three results are linear in dW, so each
program reduces the part it has. The parts of one tile are neighbours in the launch order and read their τ together, one
of them from memory and the others from L2.

db = Σ_m dy is found by programs of their own at the front of the same launch, which read while the others multiply.

Q is computed as Qᵀ = Aᵀ·dW: Triton 3.4 to 3.7.0 miscompiles, on sm_90, a product whose left operand is the transpose of
a converted matrix product. The rank is walked in steps of 16, so registers do not grow with R, and A and B have a
multiple of 16 columns, if need be of zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from pmkernels import dispatch, launch
from pmkernels.kernels.rows import NO_ROWS, as_matrix, as_rows, row_offsets
from pmkernels.low_rank import WeightGradients

# of the rows, for the sums of their columns: one program would read too slowly, and each part is a partial sum
BIAS_PARTS = tl.constexpr(4)


@triton.jit
def round_to_tf32(value):
    """Round float32 to TF32's 10 bits of mantissa; a tensor core would cut."""
    bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # the addition would turn a NaN of all ones into a zero
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def column_sums(
    dy_ptr,
    out_ptr,
    pid,
    M,
    N,
    blocks_n,
    dy_inner,
    dy_stride_outer,
    dy_stride_inner,
    dy_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum one block of columns of dy over one of BIAS_PARTS parts of the rows."""
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = pid // blocks_n
    rows_per_part = tl.cdiv(tl.cdiv(M, BIAS_PARTS), BLOCK_M) * BLOCK_M
    first = (part * rows_per_part).to(tl.int32)
    end = tl.minimum(first + rows_per_part, M)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for m0 in tl.range(first, end, BLOCK_M, num_stages=1):
        m = m0 + tl.arange(0, BLOCK_M)
        rows = row_offsets(m, dy_inner, dy_stride_outer, dy_stride_inner)
        dy = tl.load(
            dy_ptr + rows[:, None] + n[None, :] * dy_stride_n, mask=(m[:, None] < end) & (n[None, :] < N), other=0.0
        )  # [BLOCK_M, BLOCK_N]
        total += dy.to(tl.float32)
    tl.store(out_ptr + part * N + n, tl.sum(total, axis=0), mask=n < N)


@triton.jit
def weight_grad_kernel(
    dy_ptr,
    x_ptr,
    d_weight_ptr,
    task_vectors_ptr,
    a_ptr,
    b_ptr,
    d_lam_ptr,
    p_ptr,
    q_ptr,
    d_bias_ptr,
    M,
    N,
    D,
    R,
    splits,
    rows_per_split,
    bias_programs,
    dy_inner,
    dy_stride_outer,
    dy_stride_inner,
    dy_stride_n,
    x_inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_d,
    d_weight_stride_n,
    d_weight_stride_d,
    task_stride_k,
    task_stride_n,
    task_stride_d,
    K: tl.constexpr,
    FROM_ROWS: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Form or load one tile of dW, and reduce it against τ, B, A.

    Longer than 60 lines because every pointer, size and stride is an argument of its own.
    """
    pid = tl.program_id(0).to(tl.int64)
    if NEED_BIAS:
        if pid < bias_programs:
            column_sums(
                dy_ptr,
                d_bias_ptr,
                pid,
                M,
                N,
                tl.cdiv(N, BLOCK_N),
                dy_inner,
                dy_stride_outer,
                dy_stride_inner,
                dy_stride_n,
                BLOCK_M,
                BLOCK_N,
                STAGES,
            )
            return
        pid -= bias_programs
    blocks_d = tl.cdiv(D, BLOCK_D)
    tile, split = pid // splits, pid % splits
    block_n, block_d = tile // blocks_d, tile % blocks_d
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (d[None, :] < D)
    if FROM_ROWS:
        dw = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        first = (split * rows_per_split).to(tl.int32)
        end = tl.minimum(first + rows_per_split, M)
        for m0 in tl.range(first, end, BLOCK_M, num_stages=STAGES):
            m = m0 + tl.arange(0, BLOCK_M)
            dy_rows = row_offsets(m, dy_inner, dy_stride_outer, dy_stride_inner)
            x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
            dy = tl.load(
                dy_ptr + dy_rows[None, :] + n[:, None] * dy_stride_n,
                mask=(m[None, :] < end) & (n[:, None] < N),
                other=0.0,
            )  # [BLOCK_N, BLOCK_M]
            x = tl.load(
                x_ptr + x_rows[:, None] + d[None, :] * x_stride_d, mask=(m[:, None] < end) & (d[None, :] < D), other=0.0
            )  # [BLOCK_M, BLOCK_D]
            dw = tl.dot(dy.to(COMPUTE), x.to(COMPUTE), acc=dw, input_precision=PRECISION)
    else:
        offsets = n[:, None] * d_weight_stride_n + d[None, :] * d_weight_stride_d
        dw = tl.load(d_weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    if K > 0:
        tau_ptr = task_vectors_ptr
        offsets = n[:, None] * task_stride_n + d[None, :] * task_stride_d
        for k in tl.range(0, K, num_stages=1):
            tau = tl.load(tau_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
            tl.store(d_lam_ptr + pid * K + k, tl.sum(dw * tau))
            tau_ptr += task_stride_k
    if PRECISION == "tf32":
        dw = round_to_tf32(dw)
    if NEED_P:
        for r0 in range(0, R, 16):
            r = r0 + tl.arange(0, 16)
            b = tl.load(b_ptr + d[:, None] * R + r[None, :], mask=d[:, None] < D, other=0.0)  # [BLOCK_D, 16]
            if PRECISION == "tf32":
                b = round_to_tf32(b)
            p = tl.dot(dw, b, input_precision=PRECISION)  # [BLOCK_N, 16]
            places = ((split * blocks_d + block_d) * N + n)[:, None] * R + r[None, :]
            tl.store(p_ptr + places, p, mask=n[:, None] < N)
    if NEED_Q:
        for r0 in range(0, R, 16):
            r = r0 + tl.arange(0, 16)
            a = tl.load(a_ptr + n[None, :] * R + r[:, None], mask=n[None, :] < N, other=0.0)  # [16, BLOCK_N]
            if PRECISION == "tf32":
                a = round_to_tf32(a)
            q = tl.dot(a, dw, input_precision=PRECISION)  # [16, BLOCK_D]
            places = ((split * tl.cdiv(N, BLOCK_N) + block_n) * D + d)[None, :] * R + r[:, None]
            tl.store(q_ptr + places, q, mask=d[None, :] < D)


@triton.jit
def sum_partials_kernel(
    lam_ptr,
    p_ptr,
    q_ptr,
    bias_ptr,
    d_lam_ptr,
    p_out_ptr,
    q_out_ptr,
    d_bias_ptr,
    tiles,
    p_parts,
    p_size,
    q_parts,
    q_size,
    bias_size,
    p_blocks,
    q_blocks,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        if K > 0:
            k = tl.arange(0, PADDED_K)
            total = tl.zeros((BLOCK // PADDED_K, PADDED_K), dtype=tl.float32)
            for first in range(0, tiles, BLOCK // PADDED_K):
                tile = first + tl.arange(0, BLOCK // PADDED_K)
                total += tl.load(
                    lam_ptr + tile[:, None].to(tl.int64) * K + k[None, :],
                    mask=(tile[:, None] < tiles) & (k[None, :] < K),
                    other=0.0,
                )  # [tiles, PADDED_K]
            tl.store(d_lam_ptr + k, tl.sum(total, axis=0), mask=k < K)
    elif pid < 1 + p_blocks:
        if NEED_P:
            sum_parts(p_ptr, p_out_ptr, pid - 1, p_parts, p_size, BLOCK)
    elif pid < 1 + p_blocks + q_blocks:
        if NEED_Q:
            sum_parts(q_ptr, q_out_ptr, pid - 1 - p_blocks, q_parts, q_size, BLOCK)
    else:
        if NEED_BIAS:
            sum_parts(bias_ptr, d_bias_ptr, pid - 1 - p_blocks - q_blocks, BIAS_PARTS, bias_size, BLOCK)


@triton.jit
def sum_parts(part_ptr, out_ptr, block, parts, size, BLOCK: tl.constexpr):
    """Add up out[j] = Σ_i part[i, j] of one block, in that order."""
    j = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part_ptr += j
    for _ in range(parts):
        total += tl.load(part_ptr, mask=j < size, other=0.0)  # [BLOCK]
        part_ptr += size
    tl.store(out_ptr + j, total, mask=j < size)


def _launch(
    op: str,
    task_vectors: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    *,
    rows: tuple[Tensor, Tensor] | None = None,
    d_weight: Tensor | None = None,
    need_bias: bool = False,
) -> WeightGradients:
    """Reduce the dW of ``rows`` = (dy, x), or ``d_weight``."""
    sample = rows[1] if rows is not None else d_weight
    assert sample is not None
    n, d = sample.shape if rows is None else (rows[0].shape[-1], sample.shape[-1])
    low_rank = A if A is not None else B
    wanted = 0 if low_rank is None else low_rank.shape[1]
    rank = -(-wanted // 16) * 16
    tasks = 0 if task_vectors is None else task_vectors.shape[0]
    # a dW of 16 bits that is there is exact, and so should be what is made of it; one formed in registers need not be
    # better than that dW would be
    precision = (launch.rank_precision if rows is None else launch.dot_precision)(sample.dtype)
    dy_rows, x_rows = (NO_ROWS, NO_ROWS) if rows is None else (as_rows(rows[0]), as_rows(rows[1]))
    aligned, count = launch.is_aligned(*(rows or ()), d_weight, task_vectors), x_rows.M
    config = dispatch.config(op, sample, rows=count, rank=rank, aligned=aligned)
    blocks_n, blocks_d = triton.cdiv(n, config.block_n), triton.cdiv(d, config.block_d)
    tiles = blocks_n * blocks_d
    splits, rows_per_split = 1, count
    if rows is not None:
        multiprocessors = dispatch.multiprocessors(sample.device)
        splits, rows_per_split = launch.splits_of_rows(config, multiprocessors, count, n, d, tiles, rank)
    need_bias = need_bias and n > 0
    bias_programs = blocks_n * BIAS_PARTS.value if need_bias else 0

    def partials(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=sample.device)

    d_lam = None if task_vectors is None else partials(tiles * splits, tasks)
    p = None if B is None else partials(splits * blocks_d, n, rank)
    q = None if A is None else partials(splits * blocks_n, d, rank)
    d_bias = partials(BIAS_PARTS.value, n) if need_bias else None
    programs = tiles * splits + bias_programs
    if programs > 0:
        padded = (None if factor is None else _padded(factor, rank) for factor in (A, B))
        weight_grad_kernel[(programs,)](
            *(dy_rows.tensor, x_rows.tensor, d_weight, task_vectors, *padded, d_lam, p, q, d_bias),
            *(count, n, d, rank, splits, rows_per_split, bias_programs),
            *dy_rows.layout,
            *x_rows.layout,
            *launch.strides(d_weight, 2),
            *launch.strides(task_vectors, 3),
            K=tasks,
            FROM_ROWS=rows is not None,
            NEED_P=p is not None,
            NEED_Q=q is not None,
            NEED_BIAS=need_bias,
            COMPUTE=launch.compute_type(sample.dtype),
            PRECISION=precision,
            **config.options("BLOCK_M", "BLOCK_N", "BLOCK_D", "STAGES"),
        )
    return _summed(d_lam, p, q, d_bias, wanted)


def _summed(
    d_lam: Tensor | None, p: Tensor | None, q: Tensor | None, d_bias: Tensor | None, rank: int
) -> WeightGradients:
    """Add up the partial sums [parts, *], all in one launch. ``rank``: columns of P and Q, without the padding."""
    partials = (d_lam, p, q, d_bias)
    first = next((partial for partial in partials if partial is not None), None)
    if first is None:
        return WeightGradients()
    outs = [None if t is None else torch.empty(t.shape[1:], dtype=t.dtype, device=t.device) for t in partials]
    config = dispatch.config("sum", first, rows=0, rank=0)
    sizes = [0 if out is None else out.numel() for out in outs]
    parts = [0 if partial is None else partial.shape[0] for partial in partials]
    p_blocks, q_blocks, bias_blocks = (triton.cdiv(size, config.block_d) for size in sizes[1:])
    if any(sizes):
        sum_partials_kernel[(1 + p_blocks + q_blocks + bias_blocks,)](
            *partials,
            *outs,
            parts[0],
            *(parts[1], sizes[1]),
            *(parts[2], sizes[2]),
            *(sizes[3], p_blocks, q_blocks),
            K=sizes[0],
            PADDED_K=triton.next_power_of_2(max(sizes[0], 1)),
            NEED_P=p is not None,
            NEED_Q=q is not None,
            NEED_BIAS=d_bias is not None,
            BLOCK=config.block_d,
            **config.options(),
        )
    d_lam, P, Q, d_bias = outs
    return WeightGradients(d_lam, None if P is None else P[:, :rank], None if Q is None else Q[:, :rank], d_bias)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return a factor [*, R] contiguous, with ``rank`` columns, the missing ones being 0."""
    return F.pad(factor, (0, rank - factor.shape[1])) if factor.shape[1] < rank else factor.contiguous()


def weight_grad(
    dy: Tensor, x: Tensor, task_vectors: Tensor | None, *, A: Tensor | None, B: Tensor | None, need_bias: bool = False
) -> WeightGradients:
    """Return dλ, P and Q of dW = dyᵀ·x, each where its factor is given. And db, where it is wanted."""
    return _launch("weight_grad", task_vectors, A, B, rows=(dy, x), need_bias=need_bias)


def weight_grad_of_merge(
    d_weight: Tensor, task_vectors: Tensor | None, *, A: Tensor | None, B: Tensor | None
) -> WeightGradients:
    """Return the reductions of a dW that is there, of any shape if without A."""
    if A is not None or B is not None:
        return _launch("merge_grad", task_vectors, A, B, d_weight=d_weight)
    if task_vectors is None:
        return WeightGradients()
    matrices = as_matrix(d_weight, task_vectors)
    if matrices is None:
        matrices = as_matrix(d_weight.contiguous(), task_vectors.contiguous())
        assert matrices is not None
    matrix, taus = matrices
    return _launch("flat" if matrix.shape[0] == 1 else "merge_grad", taus, None, None, d_weight=matrix)
