"""The ``eager`` strategy: plain PyTorch on any device, with the backward written by hand.

With dW = dyᵀx, every parameter gradient is a reduction of dW (the notation of :mod:`pmkernels.reference`):

    dx = dy·W(γ)    dλ_k = ⟨dW, τ_k⟩    P = dW·B    Q = dWᵀ·A    dA = P·Cᵀ    dB = Q·C    dC = AᵀP    dG[:,:,k] = γ_k dC

so the backward holds at most one layer's dW at a time and keeps none, and what the forward saves is x and the
parameters themselves: W(γ) is put together again when the backward needs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pmkernels.checks import without_autocast
from pmkernels.reference import accumulate_dtype, preference_core

# A, C(γ) and B; C is None where the low-rank term is A·Bᵀ itself
LowRank: TypeAlias = tuple[Tensor, Tensor | None, Tensor]


def _assemble(
    weight: Tensor,
    task_vectors: Tensor | None,
    lam: Tensor | None,
    low_rank: LowRank | None,
    dtype: torch.dtype,
) -> Tensor:
    """W0 + Σ λ_k τ_k (+ A·C·Bᵀ for low_rank = (A, C, B)), summed in float32 (float64) and rounded once to ``dtype``."""
    accumulate = accumulate_dtype(weight, lam)
    if task_vectors is None or lam is None:
        merged = weight.to(accumulate)
    elif weight.dtype == accumulate and task_vectors.dtype == accumulate:
        # one pass over W0 and the task vectors
        flat = task_vectors.reshape(task_vectors.shape[0], weight.numel())
        merged = torch.empty(weight.shape, dtype=accumulate, device=weight.device)
        # into a tensor that is nobody's view: a merged parameter may be written into (nn.Embedding's max_norm)
        torch.addmv(weight.reshape(-1), flat.t(), lam.to(accumulate), out=merged.view(-1))
    else:
        # one task vector at a time: never K of them in float32
        merged = weight.to(accumulate)
        for k in range(task_vectors.shape[0]):
            merged = torch.addcmul(merged, task_vectors[k].to(accumulate), lam[k].to(accumulate))
    if low_rank is not None:
        A, C, B = low_rank
        left = A.to(accumulate) if C is None else A.to(accumulate) @ C.to(accumulate)
        merged = torch.addmm(merged, left, B.to(accumulate).t())
    # PyTorch 2.11 compiles a result that is a conversion to its own dtype into one without a gradient
    return merged if merged.dtype == dtype else merged.to(dtype)


def _project_on_task_vectors(d_weight: Tensor, task_vectors: Tensor, like: Tensor) -> Tensor:
    """dλ_k = ⟨dW, τ_k⟩ -> [K], in the dtype of ``like``."""
    accumulate = accumulate_dtype(d_weight, like)
    flat = d_weight.to(accumulate).reshape(-1)
    tasks = task_vectors.shape[0]
    if not tasks:
        return like.new_zeros(0)
    if task_vectors.dtype == accumulate:
        return torch.mv(task_vectors.reshape(tasks, flat.numel()), flat).to(like.dtype)
    return torch.stack([torch.dot(task_vectors[k].reshape(-1).to(accumulate), flat) for k in range(tasks)]).to(
        like.dtype
    )


def core_gradients(dC: Tensor, G: Tensor, gamma: Tensor, need_G: bool, need_gamma: bool) -> tuple[Any, Any]:
    """dG[:,:,k] = Σ_g γ_gk dC_g and dγ_gk = ⟨G[:,:,k], dC_g⟩ for dC [g, R, R], gamma [g, K]."""
    groups, rank, tasks = dC.shape[0], G.shape[0], G.shape[2]
    flat = dC.reshape(groups, rank * rank)
    dG = (flat.t() @ gamma.to(flat.dtype)).view(rank, rank, tasks).to(G.dtype) if need_G else None
    d_gamma = (flat @ G.reshape(rank * rank, tasks).to(flat.dtype)).to(gamma.dtype) if need_gamma else None
    return dG, d_gamma


class SharedLinear(torch.autograd.Function):
    """y = x·W(γ)ᵀ + b with one γ for all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        task_vectors: Tensor | None,
        lam: Tensor | None,
        A: Tensor | None,
        G: Tensor | None,
        B: Tensor | None,
        gamma: Tensor | None,
        bias: Tensor | None,
        cached: Tensor | None,
    ) -> Tensor:
        merged = cached
        if merged is None:
            merged = _assemble(weight, task_vectors, lam, _low_rank(A, G, B, gamma), x.dtype)
        needs_x = any(t is not None and t.requires_grad for t in (lam, A, G, B, gamma))
        ctx.save_for_backward(x if needs_x else None, weight, task_vectors, lam, A, G, B, gamma, cached)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, task_vectors, lam, A, G, B, gamma, cached = ctx.saved_tensors
        need_x, _, _, need_lam, need_A, need_G, need_B, need_gamma, need_bias, _ = ctx.needs_input_grad
        dx = d_lam = dA = dG = dB = d_gamma = d_bias = None
        low_rank = _low_rank(A, G, B, gamma)
        rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
        if need_x:
            merged = cached
            if merged is None:
                merged = _assemble(weight, task_vectors, lam, low_rank, ctx.x_dtype)
            dx = (rows @ merged).view(ctx.x_shape)
        if need_bias:
            d_bias = rows.sum(dim=0, dtype=accumulate_dtype(rows)).to(ctx.bias_dtype)
        need_low_rank = need_A or need_G or need_B or need_gamma
        if need_lam or need_low_rank:
            x = x.reshape(rows.shape[0], x.shape[-1])
        d_weight: Tensor | None = None
        if need_lam:
            d_weight = rows.t() @ x
            d_lam = _project_on_task_vectors(d_weight, task_vectors, lam)
        if low_rank is not None and need_low_rank:
            dA, dC, dB = _low_rank_gradients(rows, x, d_weight, low_rank, need_A, need_G or need_gamma, need_B)
            if dC is not None:
                dG, d_gamma = core_gradients(dC[None], G, gamma[None], need_G, need_gamma)
                d_gamma = None if d_gamma is None else d_gamma[0]
        return dx, None, None, d_lam, dA, dG, dB, d_gamma, d_bias, None


def _low_rank(A: Tensor | None, G: Tensor | None, B: Tensor | None, gamma: Tensor | None) -> LowRank | None:
    if A is None or B is None:
        return None
    return A, None if G is None or gamma is None else preference_core(G, gamma), B


def _low_rank_gradients(
    dy: Tensor | None,
    x: Tensor | None,
    d_weight: Tensor | None,
    low_rank: LowRank,
    need_A: bool,
    need_C: bool,
    need_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, dC, dB from dW where λ wanted it anyway, otherwise from the skinny products s = x·B and u = dy·A."""
    A, C, B = low_rank
    accumulate = accumulate_dtype(d_weight, dy, A)
    dA = dC = dB = None
    if d_weight is not None:
        d_weight = d_weight.to(accumulate)
        if need_A or need_C:
            P = d_weight @ B.to(accumulate)
            dA = _times(P, C, transposed=True).to(A.dtype) if need_A else None
            dC = A.to(accumulate).t() @ P if need_C else None
        if need_B:
            dB = _times(d_weight.t() @ A.to(accumulate), C).to(B.dtype)
        return dA, dC, dB
    assert x is not None and dy is not None
    compute = x.dtype
    if need_A or need_C:
        s = x @ B.to(compute)
        dA = (dy.t() @ _times(s.to(accumulate), C, transposed=True).to(compute)).to(A.dtype) if need_A else None
    if need_B or need_C:
        u = dy @ A.to(compute)
        dB = (x.t() @ _times(u.to(accumulate), C).to(compute)).to(B.dtype) if need_B else None
    if need_C:
        dC = u.to(accumulate).t() @ s.to(accumulate)
    return dA, dC, dB


def _times(matrix: Tensor, C: Tensor | None, transposed: bool = False) -> Tensor:
    """matrix·C, or matrix·Cᵀ; C None is the identity."""
    if C is None:
        return matrix
    return matrix @ (C.t() if transposed else C).to(matrix.dtype)


class RowsLinear(torch.autograd.Function):
    """y = x·W_baseᵀ + t·Aᵀ + b, t = C(γ)·(x·B) row by row: γ varies along the leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        task_vectors: Tensor | None,
        lam: Tensor | None,
        A: Tensor,
        G: Tensor,
        B: Tensor,
        gamma: Tensor,
        bias: Tensor | None,
        cached: Tensor | None,
    ) -> Tensor:
        x3, groups = group_rows(x, gamma)
        C = preference_core(G, groups)
        base = _assemble(weight, task_vectors, lam, None, x.dtype) if cached is None else cached
        t = (x3 @ B.to(x.dtype)).to(C.dtype) @ C.transpose(1, 2)
        y = F.linear(x3, base, None if bias is None else bias.to(x.dtype)) + t.to(x.dtype) @ A.to(x.dtype).t()
        needs_x = any(t is not None and t.requires_grad for t in (lam, A, G, B, gamma))
        ctx.save_for_backward(x if needs_x else None, weight, task_vectors, lam, A, G, B, gamma, cached)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, task_vectors, lam, A, G, B, gamma, cached = ctx.saved_tensors
        need_x, _, _, need_lam, need_A, need_G, need_B, need_gamma, need_bias, _ = ctx.needs_input_grad
        dx = d_lam = dA = dG = dB = d_gamma = d_bias = None
        dy3, groups = group_rows(dy, gamma)
        rows = dy3.flatten(0, 1)
        compute, C = ctx.x_dtype, preference_core(G, groups)
        if need_bias:
            d_bias = rows.sum(dim=0, dtype=accumulate_dtype(rows)).to(ctx.bias_dtype)
        need_core = need_G or need_gamma
        if need_x or need_B or need_core:
            u = (dy3 @ A.to(compute)).to(C.dtype)
        if need_x or need_B:
            ds = (u @ C).to(compute)
        if need_x:
            base = _assemble(weight, task_vectors, lam, None, compute) if cached is None else cached
            dx = (dy3 @ base + ds @ B.to(compute).t()).view(ctx.x_shape)
        if need_lam or need_A or need_B or need_core:
            x3, _ = group_rows(x, gamma)
            x_rows = x3.flatten(0, 1)
        if need_lam:
            d_lam = _project_on_task_vectors(rows.t() @ x_rows, task_vectors, lam)
        if need_B:
            dB = (x_rows.t() @ ds.flatten(0, 1)).to(B.dtype)
        if need_A or need_core:
            s = (x3 @ B.to(compute)).to(C.dtype)
        if need_A:
            t = (s @ C.transpose(1, 2)).to(compute)
            dA = (rows.t() @ t.flatten(0, 1)).to(A.dtype)
        if need_core:
            dC = u.transpose(1, 2) @ s
            dG, d_groups = core_gradients(dC, G, groups, need_G, need_gamma)
            if need_gamma:
                d_gamma = ungroup(d_groups, ctx.x_shape, gamma)
        return dx, None, None, d_lam, dA, dG, dB, d_gamma, d_bias, None


def varying_dims(gamma: Tensor) -> int:
    """How many leading dimensions γ varies over: the rest share one γ and form the rows of a group."""
    dims = gamma.ndim - 1
    while dims > 0 and gamma.shape[dims - 1] == 1:
        dims -= 1
    return dims


def groups_of(gamma: Tensor, lead: Sequence[int]) -> Tensor:
    """γ [K] or [*, K] against rows of leading dimensions ``lead`` -> [groups, K], not expanded to rows."""
    dims = varying_dims(gamma)
    expanded = gamma.reshape(*gamma.shape[:dims], gamma.shape[-1]).expand(*lead[:dims], -1)
    return expanded.reshape(math.prod(lead[:dims]), gamma.shape[-1])


def group_rows(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """x [*, D], gamma [*, K] -> x as [groups, rows, D] and gamma as [groups, K]; gamma is not expanded to rows."""
    groups = groups_of(gamma, x.shape[:-1])
    rows = math.prod(x.shape[varying_dims(gamma) : -1])
    return x.reshape(len(groups), rows, x.shape[-1]), groups


def ungroup(d_groups: Tensor, x_shape: torch.Size, gamma: Tensor) -> Tensor:
    """The gradient of the grouped γ [groups, K] summed back to the shape of ``gamma``."""
    dims = varying_dims(gamma)
    expanded = d_groups.reshape(*x_shape[:dims], *(1 for _ in gamma.shape[dims:-1]), gamma.shape[-1])
    return expanded.sum_to_size(gamma.shape)


class MergeWeight(torch.autograd.Function):
    """W(γ), with the reductions of its gradient: nothing of its own is saved but the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        task_vectors: Tensor | None,
        lam: Tensor | None,
        A: Tensor | None,
        G: Tensor | None,
        B: Tensor | None,
        gamma: Tensor | None,
        cached: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(task_vectors, lam, A, G, B, gamma)
        if cached is not None:
            return cached.detach()
        merged = _assemble(weight, task_vectors, lam, _low_rank(A, G, B, gamma), weight.dtype)
        return merged.clone() if merged is weight else merged

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        task_vectors, lam, A, G, B, gamma = ctx.saved_tensors
        _, _, need_lam, need_A, need_G, need_B, need_gamma, _ = ctx.needs_input_grad
        d_lam = dA = dG = dB = d_gamma = None
        if need_lam:
            d_lam = _project_on_task_vectors(d_weight, task_vectors, lam)
        if need_A or need_G or need_B or need_gamma:
            low_rank = _low_rank(A, G, B, gamma)
            assert low_rank is not None
            dA, dC, dB = _low_rank_gradients(None, None, d_weight, low_rank, need_A, need_G or need_gamma, need_B)
            if dC is not None:
                dG, d_gamma = core_gradients(dC[None], G, gamma[None], need_G, need_gamma)
                d_gamma = None if d_gamma is None else d_gamma[0]
        return None, None, d_lam, dA, dG, dB, d_gamma, None
