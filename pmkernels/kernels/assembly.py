"""A tile of W(γ), put together in registers. No other file knows this formula.

    W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·C(γ)·Bᵀ

The low-rank terms come as two factors, ``left`` = [A_c | A·C(γ)] [N, R] and ``right`` = [B_c | B] [D, R], so that one
function serves W and, with the roles of n and d exchanged, Wᵀ: left and right change places. They are added one rank-
one update at a time and not by a matrix product of tiles: that is exact float32 on every GPU, needs no padding of R and
a third fewer registers, and R multiply-adds per element hide behind the K + 1 elements of W0 and τ that have to be read
for it.
"""

import triton
import triton.language as tl


@triton.jit
def weight_tile(
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
    K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return W[n, d] in float32, not yet rounded; outside of W it is 0.

    n [BLOCK_N] and d [BLOCK_D] are int64.

    ``UNROLL`` task vectors are loaded before the first of them is used: with more than one, that many loads are in
    flight from one warp and there is no pipeline through shared memory.
    """
    inside = (n[:, None] < N) & (d[None, :] < D)
    offsets = n[:, None] * weight_stride_n + d[None, :] * weight_stride_d
    w = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    if K > 0:
        # the base moves by one stride a step: k * stride would overflow int32
        tau_ptr = task_vectors_ptr
        offsets = n[:, None] * task_stride_n + d[None, :] * task_stride_d
        if UNROLL == 1:
            for k in tl.range(0, K, num_stages=STAGES):
                tau = tl.load(tau_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
                w += tl.load(lam_ptr + k) * tau
                tau_ptr += task_stride_k
        else:
            for k in tl.range(0, K, num_stages=1, loop_unroll_factor=UNROLL):
                tau = tl.load(tau_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
                w += tl.load(lam_ptr + k) * tau
                tau_ptr += task_stride_k
    if LOW_RANK:
        for r in tl.range(0, R, loop_unroll_factor=4):
            left = tl.load(left_ptr + n * left_stride_n + r * left_stride_r, mask=n < N, other=0.0)  # [BLOCK_N]
            right = tl.load(right_ptr + d * right_stride_d + r * right_stride_r, mask=d < D, other=0.0)  # [BLOCK_D]
            w += left[:, None] * right[None, :]
    return w
