"""dλ_k = ⟨dW, τ_k⟩, P = dW·B and Q = dWᵀ·A, from tiles of dW = dyᵀ·x that exist in registers only.

Each program forms one tile of dW over all rows and reduces it against τ_1..τ_K, B and A; what it finds goes to its own
place in float32 partials, which are then added in a fixed order: no atomics, the same bits every time. The partials of
P are D / BLOCK_D copies of [N, R], and fewer than N·D elements as long as the block is wider than R.

Q is computed as Qᵀ = Aᵀ·dW: Triton 3.4 to 3.7.0 miscompiles, on sm_90, a product whose left operand is the transpose of
a converted matrix product. The rank is walked in steps of 16, so registers do not grow with R.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels import dispatch
from pmkernels.kernels.rows import as_matrix, as_rows, row_offsets


@triton.jit
def round_to_tf32(value):
    """float32 rounded to TF32's 10 bits of mantissa: a tensor core would cut the other 13 off, with a bias."""
    bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # the addition would turn a NaN of all ones into a zero
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


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
    M,
    N,
    D,
    R,
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
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(D, BLOCK_D)
    block_n, block_d = pid // blocks_d, pid % blocks_d
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (d[None, :] < D)
    if FROM_ROWS:
        dw = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for m0 in tl.range(0, M, BLOCK_M, num_stages=STAGES):
            m = m0 + tl.arange(0, BLOCK_M)
            dy_rows = row_offsets(m, dy_inner, dy_stride_outer, dy_stride_inner)
            x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
            dy = tl.load(
                dy_ptr + dy_rows[None, :] + n[:, None] * dy_stride_n,
                mask=(m[None, :] < M) & (n[:, None] < N),
                other=0.0,
            )  # [BLOCK_N, BLOCK_M]
            x = tl.load(
                x_ptr + x_rows[:, None] + d[None, :] * x_stride_d, mask=(m[:, None] < M) & (d[None, :] < D), other=0.0
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
            b = tl.load(b_ptr + d[:, None] * R + r[None, :], mask=(d[:, None] < D) & (r[None, :] < R), other=0.0)
            if PRECISION == "tf32":
                b = round_to_tf32(b)
            p = tl.dot(dw, b, input_precision=PRECISION)  # [BLOCK_N, 16]
            places = (block_d * N + n)[:, None] * R + r[None, :]
            tl.store(p_ptr + places, p, mask=(n[:, None] < N) & (r[None, :] < R))
    if NEED_Q:
        for r0 in range(0, R, 16):
            r = r0 + tl.arange(0, 16)
            a = tl.load(a_ptr + n[None, :] * R + r[:, None], mask=(n[None, :] < N) & (r[:, None] < R), other=0.0)
            if PRECISION == "tf32":
                a = round_to_tf32(a)
            q = tl.dot(a, dw, input_precision=PRECISION)  # [16, BLOCK_D]
            places = (block_n * D + d)[None, :] * R + r[:, None]
            tl.store(q_ptr + places, q, mask=(d[None, :] < D) & (r[:, None] < R))


def _launch(
    op: str,
    shape: tuple[int, int],
    task_vectors: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    *,
    rows: tuple[Tensor, Tensor] | None = None,
    d_weight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n, d = shape
    sample = rows[1] if rows is not None else d_weight
    assert sample is not None
    low_rank = A if A is not None else B
    rank = 0 if low_rank is None else low_rank.shape[1]
    tasks = 0 if task_vectors is None else task_vectors.shape[0]
    # a dW of 16 bits that is there is exact, and so should be what is made of it; one formed in registers need not be
    # better than that dW would be
    precision = (dispatch.rank_precision if rows is None else dispatch.dot_precision)(sample.dtype)
    dy_rows, x_rows = (as_rows(rows[0]), as_rows(rows[1])) if rows is not None else (None, None)
    aligned = dispatch.is_aligned(*(rows or ()), d_weight, task_vectors)
    config = dispatch.config(op, sample, rows=0 if x_rows is None else x_rows.M, rank=rank, aligned=aligned)
    blocks_n, blocks_d = triton.cdiv(n, config.block_n), triton.cdiv(d, config.block_d)

    def partials(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=sample.device)

    d_lam = None if task_vectors is None else partials(blocks_n * blocks_d, tasks)
    p = None if B is None else partials(blocks_d, n, rank)
    q = None if A is None else partials(blocks_n, d, rank)
    if n * d > 0:
        weight_grad_kernel[(blocks_n * blocks_d,)](
            None if dy_rows is None else dy_rows.tensor,
            None if x_rows is None else x_rows.tensor,
            d_weight,
            task_vectors,
            None if A is None else A.contiguous(),
            None if B is None else B.contiguous(),
            d_lam,
            p,
            q,
            0 if x_rows is None else x_rows.M,
            n,
            d,
            rank,
            *((1, 0, 0, 0) if dy_rows is None else dy_rows.layout),
            *((1, 0, 0, 0) if x_rows is None else x_rows.layout),
            *((0, 0) if d_weight is None else d_weight.stride()),
            *((0, 0, 0) if task_vectors is None else task_vectors.stride()),
            K=tasks,
            FROM_ROWS=rows is not None,
            NEED_P=p is not None,
            NEED_Q=q is not None,
            COMPUTE=dispatch.compute_type(sample.dtype),
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            STAGES=config.num_stages,
            **config.options,
        )
    return (
        None if d_lam is None else d_lam.sum(dim=0),
        None if p is None else p.sum(dim=0),
        None if q is None else q.sum(dim=0),
    )


def weight_grad(
    dy: Tensor, x: Tensor, task_vectors: Tensor | None, *, A: Tensor | None, B: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dλ [K], P [N, R] = dW·B and Q [D, R] = dWᵀ·A in float32 for dW = dyᵀ·x, each where its other factor is given.

    dy [*, N], x [*, D]; task_vectors [K, N, D]; A [N, R] (for Q), B [D, R] (for P).
    """
    return _launch("weight_grad", (dy.shape[-1], x.shape[-1]), task_vectors, A, B, rows=(dy, x))


def weight_grad_of_merge(
    d_weight: Tensor, task_vectors: Tensor | None, *, A: Tensor | None, B: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same reductions of a dW that is there: of any number of dimensions without A and B, else [N, D]."""
    if A is not None or B is not None:
        shape = (d_weight.shape[0], d_weight.shape[1])
        return _launch("merge_grad", shape, task_vectors, A, B, d_weight=d_weight)
    if task_vectors is None:
        return None, None, None
    matrices = as_matrix(d_weight, task_vectors)
    if matrices is None:
        matrices = as_matrix(d_weight.contiguous(), task_vectors.contiguous())
        assert matrices is not None
    matrix, taus = matrices
    shape = (matrix.shape[0], matrix.shape[1])
    return _launch("flat" if shape[0] == 1 else "merge_grad", shape, taus, None, None, d_weight=matrix)
