"""The low-rank term row by row, where dW would be wasted work.

That is with one preference per row, and for a frozen λ.

    s = x·B    t_m = Σ_k γ_mk G[:,:,k]·s_m        (shrink: s and t)      y  += t·Aᵀ   (in linear_fwd)
    u = dy·A   ds_m = Σ_k γ_mk G[:,:,k]ᵀ·u_m      (shrink: u and ds)     dx += ds·Bᵀ  (in linear_bwd_x)
    dA = dyᵀ·t   dB = xᵀ·ds                        (factor_grad)
    dG[i,j,k] = Σ_m γ_mk u_mi s_mj   dγ_mk = u_mᵀ·G[:,:,k]·s_m           (core_grad, preference_grad)

γ is [groups, K] and row m belongs to group m // rows_per_group: it is never expanded to rows, and no [M, R, R] is made.
s, t, u and ds are [M, R] in float32. One γ for all rows is one group with one task: G = C(γ), γ = 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmkernels import dispatch, launch
from pmkernels.kernels.rows import as_rows, row_offsets
from pmkernels.low_rank import Needs, Parts, RowProducts, gradients_of_core, groups_of, ungroup


@triton.jit
def shrink_kernel(
    x_ptr,
    factor_ptr,
    core_ptr,
    gamma_ptr,
    s_ptr,
    t_ptr,
    M,
    D,
    R,
    rows_per_group,
    x_inner,
    x_stride_outer,
    x_stride_inner,
    x_stride_d,
    core_stride_out,
    core_stride_in,
    core_stride_k,
    K: tl.constexpr,
    MIX: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    x_rows = row_offsets(m, x_inner, x_stride_outer, x_stride_inner)
    s = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        x = tl.load(
            x_ptr + x_rows[:, None] + d[None, :] * x_stride_d, mask=(m[:, None] < M) & (d[None, :] < D), other=0.0
        )  # [BLOCK_M, BLOCK_D]
        factor = tl.load(
            factor_ptr + d[:, None] * R + r[None, :], mask=(d[:, None] < D) & (r[None, :] < R), other=0.0
        )  # [BLOCK_D, RANK]
        s = tl.dot(x.to(tl.float32), factor, acc=s, input_precision=PRECISION)
    places = m[:, None].to(tl.int64) * R + r[None, :]
    valid = (m[:, None] < M) & (r[None, :] < R)
    tl.store(s_ptr + places, s, mask=valid)
    if MIX:
        t = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
        groups = (m // rows_per_group).to(tl.int64)
        # a product in flight would read registers that the next round writes
        for k in tl.range(0, K, num_stages=1):
            core = tl.load(
                core_ptr + r[:, None] * core_stride_in + r[None, :] * core_stride_out + k * core_stride_k,
                mask=(r[:, None] < R) & (r[None, :] < R),
                other=0.0,
            )  # [RANK in, RANK out]
            gamma = tl.load(gamma_ptr + groups * K + k, mask=m < M, other=0.0)  # [BLOCK_M]
            t = tl.dot(s * gamma[:, None], core, acc=t, input_precision=PRECISION)
        tl.store(t_ptr + places, t, mask=valid)


def shrink(
    x: Tensor, factor: Tensor, G: Tensor | None, gamma: Tensor | None, *, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return s = x·factor and t_m = Σ_k γ_mk G_k·s_m; ``transposed``: of G_kᵀ.

    ``G`` [R, R, K] with ``gamma`` [groups, K], contiguous; or both None, and there is no t.
    """
    rows = as_rows(x)
    d, rank = factor.shape
    s = torch.empty(rows.M, rank, dtype=torch.float32, device=x.device)
    t = None if G is None else torch.empty_like(s)
    if rows.M == 0:
        return s, t
    if G is not None and transposed:
        G = G.transpose(0, 1)
    config = dispatch.config("shrink", x, rows=rows.M, rank=rank)
    shrink_kernel[(triton.cdiv(rows.M, config.block_m),)](
        *(rows.tensor, factor.contiguous(), G, gamma, s, t),
        *(rows.M, d, rank, 1 if gamma is None else rows.M // gamma.shape[0]),
        *rows.layout,
        *launch.strides(G, 3),
        K=0 if G is None else G.shape[2],
        MIX=t is not None,
        RANK=launch.padded_rank(rank),
        PRECISION=launch.rank_precision(x.dtype),
        **config.options("BLOCK_M", "BLOCK_D", "STAGES"),
    )
    return s, t


@triton.jit
def factor_grad_kernel(
    dy_ptr,
    t_ptr,
    out_ptr,
    M,
    N,
    R,
    rows_per_split,
    dy_inner,
    dy_stride_outer,
    dy_stride_inner,
    dy_stride_n,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    first = tl.program_id(1) * rows_per_split
    end = tl.minimum(first + rows_per_split, M)
    acc = tl.zeros((BLOCK_N, RANK), dtype=tl.float32)
    for m0 in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        m = m0 + tl.arange(0, BLOCK_M)
        dy_rows = row_offsets(m, dy_inner, dy_stride_outer, dy_stride_inner)
        dy = tl.load(
            dy_ptr + dy_rows[None, :] + n[:, None] * dy_stride_n, mask=(m[None, :] < end) & (n[:, None] < N), other=0.0
        )  # [BLOCK_N, BLOCK_M]
        t = tl.load(
            t_ptr + m[:, None].to(tl.int64) * R + r[None, :], mask=(m[:, None] < end) & (r[None, :] < R), other=0.0
        )  # [BLOCK_M, RANK]
        acc = tl.dot(dy.to(tl.float32), t, acc=acc, input_precision=PRECISION)
    places = (split * N + n)[:, None] * R + r[None, :]
    tl.store(out_ptr + places, acc, mask=(n[:, None] < N) & (r[None, :] < R))


def factor_grad(dy: Tensor, t: Tensor, limit: int) -> Tensor:
    """Return dA = dyᵀ·t [N, R] in float32. dB is the same with x and ds.

    The partial sums stay below ``limit`` elements, as far as the result itself does.
    """
    rows = as_rows(dy)
    n, rank = dy.shape[-1], t.shape[1]
    config = dispatch.config("factor_grad", dy, rows=rows.M, rank=rank)
    most = (limit - 1) // max(n * rank, 1)
    splits, rows_per_split = launch.splits(rows.M, config.block_m, triton.cdiv(n, config.block_n), most)
    out = torch.empty(splits, n, rank, dtype=torch.float32, device=dy.device)
    if n > 0:
        factor_grad_kernel[(triton.cdiv(n, config.block_n), splits)](
            *(rows.tensor, t, out),
            *(rows.M, n, rank, rows_per_split),
            *rows.layout,
            RANK=launch.padded_rank(rank),
            PRECISION=launch.rank_precision(dy.dtype),
            **config.options("BLOCK_M", "BLOCK_N", "STAGES"),
        )
    return out.sum(dim=0)


@triton.jit
def core_grad_kernel(
    u_ptr,
    s_ptr,
    gamma_ptr,
    out_ptr,
    M,
    R,
    rows_per_split,
    rows_per_group,
    K: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    split, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, RANK)
    first = tl.program_id(0) * rows_per_split
    end = tl.minimum(first + rows_per_split, M)
    acc = tl.zeros((RANK, RANK), dtype=tl.float32)
    for m0 in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        m = m0 + tl.arange(0, BLOCK_M)
        rows = m.to(tl.int64)
        gamma = tl.load(gamma_ptr + (m // rows_per_group).to(tl.int64) * K + k, mask=m < end, other=0.0)  # [BLOCK_M]
        u = tl.load(
            u_ptr + rows[None, :] * R + i[:, None], mask=(m[None, :] < end) & (i[:, None] < R), other=0.0
        )  # [RANK, BLOCK_M]
        s = tl.load(
            s_ptr + rows[:, None] * R + i[None, :], mask=(m[:, None] < end) & (i[None, :] < R), other=0.0
        )  # [BLOCK_M, RANK]
        acc = tl.dot(u * gamma[None, :], s, acc=acc, input_precision=PRECISION)
    places = (split * R + i[:, None]) * R + i[None, :]
    tl.store(out_ptr + places * K + k, acc, mask=(i[:, None] < R) & (i[None, :] < R))


def core_grad(u: Tensor, s: Tensor, gamma: Tensor, dtype: torch.dtype, limit: int) -> Tensor:
    """Return dG [R, R, K] = Σ_m γ_mk u_m s_mᵀ in float32. ``dtype`` is the model's, ``limit`` factor_grad's."""
    (rows, rank), (groups, tasks) = u.shape, gamma.shape
    if tasks == 0:
        return torch.zeros(rank, rank, 0, dtype=torch.float32, device=u.device)
    config = dispatch.config("core_grad", u, rows=rows, rank=rank)
    most = (limit - 1) // (rank * rank * tasks)
    splits, rows_per_split = launch.splits(rows, config.block_m, tasks, most)
    out = torch.empty(splits, rank, rank, tasks, dtype=torch.float32, device=u.device)
    core_grad_kernel[(splits, tasks)](
        *(u, s, gamma, out),
        *(rows, rank, rows_per_split, max(rows // max(groups, 1), 1)),
        K=tasks,
        RANK=launch.padded_rank(rank),
        PRECISION=launch.rank_precision(dtype),
        **config.options("BLOCK_M", "STAGES"),
    )
    return out.sum(dim=0)


@triton.jit
def preference_grad_kernel(
    u_ptr,
    s_ptr,
    core_ptr,
    out_ptr,
    M,
    R,
    core_stride_i,
    core_stride_j,
    core_stride_k,
    K: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = m.to(tl.int64)
    r = tl.arange(0, RANK)
    valid = (m[:, None] < M) & (r[None, :] < R)
    u = tl.load(u_ptr + rows[:, None] * R + r[None, :], mask=valid, other=0.0)  # [BLOCK_M, RANK]
    s = tl.load(s_ptr + rows[:, None] * R + r[None, :], mask=valid, other=0.0)  # [BLOCK_M, RANK]
    for k in range(K):
        core = tl.load(
            core_ptr + r[None, :] * core_stride_i + r[:, None] * core_stride_j + k * core_stride_k,
            mask=(r[:, None] < R) & (r[None, :] < R),
            other=0.0,
        )  # [RANK j, RANK i]
        mixed = tl.dot(s, core, input_precision=PRECISION)  # [BLOCK_M, RANK i]
        tl.store(out_ptr + rows * K + k, tl.sum(u * mixed, axis=1), mask=m < M)


def preference_grad(u: Tensor, s: Tensor, G: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dγ row by row, [M, K] = u_mᵀ·G_k·s_m, in float32. ``dtype`` is the model's."""
    rows, rank = u.shape
    tasks = G.shape[2]
    out = torch.empty(rows, tasks, dtype=torch.float32, device=u.device)
    if rows > 0:
        config = dispatch.config("preference_grad", u, rows=rows, rank=rank)
        preference_grad_kernel[(triton.cdiv(rows, config.block_m),)](
            *(u, s, G, out),
            *(rows, rank, *G.stride()),
            K=tasks,
            RANK=launch.padded_rank(rank),
            PRECISION=launch.rank_precision(dtype),
            **config.options("BLOCK_M"),
        )
    return out


class KernelRowProducts(RowProducts):
    """The products with rows by these kernels. s, t, u and ds are [M, R] in float32."""

    def __init__(self, parts: Parts, like: Tensor) -> None:
        self.parts, self.lead, self.dtype = parts, like.shape[:-1], like.dtype
        # partial sums stay below the size of a weight
        self.limit = parts.weight.numel()
        self.G, self.gamma, core = parts.G, parts.gamma, parts.core()
        if parts.gamma is not None and parts.per_row:
            self.gamma = groups_of(parts.gamma, self.lead).contiguous()
        elif core is not None:
            self.G, self.gamma = core.unsqueeze(-1), torch.ones(1, 1, dtype=core.dtype, device=core.device)

    from_tiles = staticmethod(launch.from_tiles)

    def shrink(self, rows: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Return s and t of x [*, D]; ``transposed``: u and ds of dy [*, N]."""
        factor = self.parts.A if transposed else self.parts.B
        assert factor is not None
        s, t = shrink(rows, factor, self.G, self.gamma, transposed=transposed)
        return s, s if t is None else t

    def factor_gradient(self, rows: Tensor, t: Tensor) -> Tensor:
        """Return dA = dyᵀ·t of dy and t, or dB of x and ds."""
        return factor_grad(rows, t, self.limit)

    def core_gradients(self, u: Tensor, s: Tensor, needs: Needs) -> dict[str, Tensor]:
        """Return dG and dγ by name, as far as they are needed."""
        G, gamma = self.G, self.gamma
        assert G is not None and gamma is not None and self.parts.gamma is not None
        gradients = {}
        if not self.parts.per_row:
            dC = core_grad(u, s, gamma, self.dtype, self.limit)[..., 0]
            return gradients_of_core(dC, self.parts, needs)
        if needs.G:
            gradients["G"] = core_grad(u, s, gamma, self.dtype, self.limit)
        if needs.gamma:
            by_row = preference_grad(u, s, G, self.dtype)
            groups, tasks = gamma.shape
            by_group = by_row.view(groups, by_row.shape[0] // max(groups, 1), tasks).sum(dim=1)
            gradients["gamma"] = ungroup(by_group, self.lead, self.parts.gamma)
        return gradients
