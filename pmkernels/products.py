"""W(γ), its products with rows and the reductions of dW by the library's products.

With dW = dyᵀx, every parameter gradient is a reduction of dW (the notation of :mod:`pmkernels.reference`):

    dx = dy·W(γ)    dλ_k = ⟨dW, τ_k⟩    P = dW·B    Q = dWᵀ·A    dA = P·Cᵀ    dB = Q·C    dC = AᵀP    dG[:,:,k] = γ_k dC

so a backward holds at most one layer's dW at a time and keeps none. All is plain PyTorch on any device, but that
``by_kernel`` a kernel puts W together, or reduces dW.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pmkernels.launch import HAS_TRITON
from pmkernels.low_rank import Factors, Terms, WeightGradients
from pmkernels.reference import accumulate_dtype, converted

if HAS_TRITON:
    from pmkernels.kernels.merge import merge_weight
    from pmkernels.kernels.weight_grad import weight_grad_of_merge


def assemble(terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return W0 + Σ λ_k τ_k + left·rightᵀ, summed in float32 (float64) and rounded once."""
    weight, task_vectors, lam, low_rank = terms
    accumulate = accumulate_dtype(weight, lam)
    if task_vectors is None or lam is None:
        if low_rank is None and weight.dtype == dtype:
            return weight
        merged = converted(weight, accumulate)
    elif weight.dtype == accumulate and task_vectors.dtype == accumulate:
        # one pass over W0 and the task vectors
        flat = task_vectors.reshape(task_vectors.shape[0], weight.numel())
        merged = torch.empty(weight.shape, dtype=accumulate, device=weight.device)
        # into a tensor that is nobody's view: a merged parameter may be written into (nn.Embedding's max_norm)
        torch.addmv(weight.reshape(-1), flat.t(), converted(lam, accumulate), out=merged.view(-1))
    else:
        # one task vector at a time: never K of them in float32
        merged = converted(weight, accumulate)
        for k in range(task_vectors.shape[0]):
            merged = torch.addcmul(merged, task_vectors[k].to(accumulate), lam[k].to(accumulate))
    if low_rank is not None:
        left, right = low_rank
        merged = torch.addmm(merged, converted(left, accumulate), converted(right, accumulate).t())
    # PyTorch 2.11 compiles a result that is a conversion to its own dtype into one without a gradient
    return converted(merged, dtype)


def scratch(terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return what :func:`assemble` does, by one kernel."""
    weight, task_vectors, _, low_rank = terms
    if low_rank is None and task_vectors is None and weight.dtype == dtype:
        return weight
    return merge_weight(terms, torch.empty_like(weight, dtype=dtype))


def merge(terms: Terms, out: Tensor | None = None, *, by_kernel: bool = False) -> Tensor:
    """Return W like W0, in a new tensor or in ``out``."""
    if by_kernel:
        return merge_weight(terms, torch.empty_like(terms.weight) if out is None else out)
    merged = assemble(terms, terms.weight.dtype)
    if out is not None:
        return out.copy_(merged)
    return merged.clone() if merged is terms.weight else merged


def forward(
    x: Tensor, terms: Terms, *, start: Factors | None = None, bias: Tensor | None = None, by_kernel: bool = False
) -> Tensor:
    """Return x·Wᵀ + b; ``start`` = (t, A) adds t·Aᵀ. ``by_kernel``: W is merged by one, t·Aᵀ added in place."""
    merged = (scratch if by_kernel else assemble)(terms, x.dtype)
    bias = None if bias is None else converted(bias, x.dtype)
    if start is None or by_kernel:
        return _add_in_place(F.linear(x, merged, bias), start)
    rows = x.reshape(*start[0].shape[:-1], x.shape[-1])
    return _with(F.linear(rows, merged, bias), start).view(*x.shape[:-1], merged.shape[0])


def dx(dy: Tensor, terms: Terms, *, start: Factors | None = None, by_kernel: bool = False) -> Tensor:
    """Return dy·W; ``start`` = (ds, B) adds ds·Bᵀ. ``by_kernel`` as in :func:`forward`."""
    merged = (scratch if by_kernel else assemble)(terms, dy.dtype)
    if by_kernel:
        return _add_in_place(dy @ merged, start)
    lead = (math.prod(dy.shape[:-1]),) if start is None else start[0].shape[:-1]
    return _with(dy.reshape(*lead, dy.shape[-1]) @ merged, start).view(*dy.shape[:-1], merged.shape[1])


def _with(y: Tensor, start: Factors | None) -> Tensor:
    return y if start is None else y + converted(start[0], y.dtype) @ converted(start[1], y.dtype).t()


def _add_in_place(y: Tensor, start: Factors | None) -> Tensor:
    if start is not None:
        t, factor = start
        count = math.prod(t.shape[:-1])
        rows = y.view(count, y.shape[-1])
        rows.addmm_(t.to(y.dtype).reshape(count, t.shape[-1]), factor.to(y.dtype).t())
    return y


def dense_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dW = dyᵀx of dy [*, N] and x [*, D], in their dtype."""
    rows = math.prod(dy.shape[:-1])
    return dy.reshape(rows, dy.shape[-1]).t() @ x.reshape(rows, x.shape[-1])


def column_sums(dy: Tensor) -> Tensor:
    """Return db = Σ_m dy_m of dy [*, N], in float32 (float64)."""
    # a sum over no dimensions at all would be a sum over all of them
    rows = dy.unsqueeze(0)
    return rows.sum(dim=tuple(range(rows.ndim - 1)), dtype=accumulate_dtype(dy))


def weight_gradients(
    dy: Tensor,
    x: Tensor,
    task_vectors: Tensor | None,
    *,
    need_bias: bool = False,
    by_kernel: bool = False,
    **factors: Any,
) -> WeightGradients:
    """Return :func:`reductions` of one layer's dW in memory, and db. ``by_kernel``: dW is reduced by one."""
    reduced = (weight_grad_of_merge if by_kernel else reductions)(dense_gradient(dy, x), task_vectors, **factors)
    return reduced._replace(d_bias=column_sums(dy)) if need_bias else reduced


def reductions(d_weight: Tensor, task_vectors: Tensor | None, *, A: Tensor | None, B: Tensor | None) -> WeightGradients:
    """Return dλ, P and Q of a dW, each where its other factor is given."""
    d_lam = None if task_vectors is None else _on_task_vectors(d_weight, task_vectors)
    if A is None and B is None:
        return WeightGradients(d_lam)
    wide = converted(d_weight, accumulate_dtype(d_weight, A, B))
    P = None if B is None else wide @ converted(B, wide.dtype)
    Q = None if A is None else wide.t() @ converted(A, wide.dtype)
    return WeightGradients(d_lam, P, Q)


def _on_task_vectors(d_weight: Tensor, task_vectors: Tensor) -> Tensor:
    flat = converted(d_weight, accumulate_dtype(d_weight)).reshape(-1)
    tasks = task_vectors.shape[0]
    if not tasks:
        return flat.new_zeros(0)
    if task_vectors.dtype == flat.dtype:
        return torch.mv(task_vectors.reshape(tasks, flat.numel()), flat)
    return torch.stack([torch.dot(tau.reshape(-1).to(flat.dtype), flat) for tau in task_vectors])
