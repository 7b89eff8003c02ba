"""preference_linear: a folded layer at a preference per row, for inference. It costs about what the plain layer does.

A folded layer has no task vectors: y = x·Wᵀ + t·Aᵀ + b with t = C(γ)·Bᵀx. With W and A side by side in one matrix
(:func:`widen_weight`) that is [x | t] times that matrix: a product R columns longer, whose sum has the low-rank part in
it before y is rounded, so that nearby preferences stay apart. :mod:`pmkernels.kernels.preference` has the kernels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pmkernels import strategies
from pmkernels.autocast import no_autocast
from pmkernels.checks import check_gamma, check_tensor
from pmkernels.launch import padded_rank
from pmkernels.low_rank import groups_of
from pmkernels.operators import operator
from pmkernels.reference import accumulate_dtype, preference_core
from pmkernels.strategies import AUTO, EAGER


def widen_weight(weight: Tensor, A: Tensor) -> Tensor:
    """Lay W and A side by side in a new tensor, as :func:`preference_linear` takes them.

    Args:
        weight: W ``[out, in]``, task vectors folded in. A: ``[out, r]``.

    Returns:
        ``[out, in + R]``: W, A and zeros up to R, which is r rounded up to a power of two of at least 16.
        ``wide[:, :in]`` is W.

    Raises:
        TypeError, ValueError: not two matrices of that many rows on one device.
    """
    check_tensor("weight", weight)
    check_tensor("A", A, weight.device)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [out, in], got {list(weight.shape)}")
    (n, d), rank = weight.shape, A.shape[-1] if A.ndim else 0
    if A.shape != (n, rank) or not rank:
        raise ValueError(f"A: expected shape [{n}, R], got {list(A.shape)}")
    wide = torch.zeros(n, d + padded_rank(rank), dtype=weight.dtype, device=weight.device)
    wide[:, :d] = weight.detach()
    wide[:, d : d + rank] = A.detach()
    return wide


def preference_linear(
    x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None = None, *, strategy: str = "auto"
) -> Tensor:
    """Compute y = x·Wᵀ + (C(γ)·Bᵀx)·Aᵀ + b, C(γ) = G ×₃ γ, for inference.

    This is equation 6 of Chen & Kwok, arXiv 2408.12105.

    Args:
        x: ``[*, in]``, any strides, no rows allowed.
        wide: W and A as :func:`widen_weight` lays them out, ``[out, in + R]``, in the dtype of x.
        G: ``[r, r, K]``, float32. B: ``[in, r]`` in the dtype of x; read along ``in``, so best laid out as
            ``B.t().contiguous().t()``.
        gamma: float32: ``[K]`` for all rows, or exactly ``x.ndim`` dimensions ``[*, K]`` whose leading ones are 1 or
            x's (``[32, 1, K]`` against ``[32, 257, in]``: one preference per image). Its values are not looked at.
        bias: ``[out]`` in the dtype of x, or None.
        strategy: ``"auto"``; ``"eager"`` (plain PyTorch, any device), ``"fused"`` (one kernel, for few rows: D is split
            over several programs) or ``"streamed"`` (a kernel writes [x | t], then the library's product). The last two
            need a CUDA GPU, float32, bfloat16 or float16, K and r up to 32 and 64. ``"auto"`` takes what was measured
            on this GPU or is counted to be faster.

    Returns:
        ``[*, out]`` in the dtype of x. Autocast is not looked at. Works under ``torch.vmap`` over γ: what of the layer
        does not depend on γ is then computed once.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or strategy, or a gradient is wanted.
    """
    check_tensor("wide", wide)
    given = {"x": x, "wide": wide, "G": G, "B": B, "gamma": gamma}
    for name, value in (given if bias is None else {**given, "bias": bias}).items():
        check_tensor(name, value, wide.device, learned=name in ("G", "gamma"))
        if name not in ("G", "gamma") and value.dtype != wide.dtype:
            raise TypeError(f"{name}: expected {wide.dtype}, the dtype of wide, got {value.dtype}")
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{name}: expected no gradient to be wanted (pareto_linear has one), got requires_grad")
    _check_shapes(x, wide, G, B, gamma, bias)
    chosen = strategies.resolve(strategy, {**given, "A": B}, x.device, own="preference")
    with no_autocast(x.device.type):
        y: Tensor = preference_operator(x, wide, G, B, gamma, bias, chosen)
        return y


def _check_shapes(x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    if B.ndim != 2 or not B.shape[1]:
        raise ValueError(f"B: expected shape [in, R], got {list(B.shape)}")
    d, rank = B.shape
    width = d + padded_rank(rank)
    if wide.ndim != 2 or wide.shape[1] != width:
        raise ValueError(f"wide: expected shape [out, {width}], as widen_weight returns, got {list(wide.shape)}")
    if wide.stride(1) != 1:
        raise ValueError(f"wide: expected neighbouring columns in memory, got strides {wide.stride()}")
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(f"x: expected shape [*, {d}], got {list(x.shape)}")
    if G.ndim != 3 or G.shape[:2] != (rank, rank):
        raise ValueError(f"G: expected shape [{rank}, {rank}, K], got {list(G.shape)}")
    check_gamma(gamma, x, G.shape[2])
    if bias is not None and bias.shape != (wide.shape[0],):
        raise ValueError(f"bias: expected shape [{wide.shape[0]}], got {list(bias.shape)}")


@operator(
    "preference_linear",
    "(Tensor x, Tensor wide, Tensor G, Tensor B, Tensor gamma, Tensor? bias, str strategy) -> Tensor",
    fake=lambda x, wide, *_: x.new_empty((*x.shape[:-1], wide.shape[0])),
)
def preference_operator(
    x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None, strategy: str
) -> Tensor:
    """Compute y by a strategy. So is the eager form: without a backward, it needs the operator's rule for vmap."""
    if strategy == EAGER:
        return _eager(x, wide, G, B, gamma, bias)
    (d, rank), rows = B.shape, math.prod(x.shape[:-1])
    tensors = {"x": x, "wide": wide, "G": G, "B": B, "gamma": gamma, "A": B}
    case = strategies.case_of(tensors, x.device, asked=strategy != AUTO)
    chosen = strategies.choose(
        "preference", strategy, x, rows=rows, n=wide.shape[0], d=d, rank=rank, tasks=0, case=case
    )
    compute = strategies.TABLE[chosen].preference
    assert compute is not None
    groups = groups_of(gamma, x.shape[:-1]).contiguous()
    return compute(x, wide, G, B, groups, bias)


def _eager(x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y in plain PyTorch. Of 16-bit rows the product is R columns longer; of others t·Aᵀ is added in place,
    which spares the copy of x and rounds no worse."""
    (d, rank), n, lead = B.shape, wide.shape[0], x.shape[:-1]
    count = math.prod(lead)
    rows = x.reshape(count, d)
    t = _mixed(rows @ B, G, groups_of(gamma, lead)).to(x.dtype)
    if x.element_size() < 4:
        zeros = x.new_zeros(count, wide.shape[1] - d - rank)
        y = F.linear(torch.cat([rows, t, zeros], dim=1), wide, bias)
    else:
        y = F.linear(rows, wide[:, :d], bias).addmm_(t, wide[:, d : d + rank].t())
    return y.view(*lead, n)


def _mixed(s: Tensor, G: Tensor, gamma: Tensor) -> Tensor:
    """Return t_m = C(γ)·s_m for gamma [groups, K], in the type of the sums."""
    (rank, _, tasks), groups = G.shape, gamma.shape[0]
    dtype = accumulate_dtype(G, gamma)
    C = (gamma.to(dtype) @ G.to(dtype).reshape(rank * rank, tasks).t()).view(groups, rank, rank)
    each = s.shape[0] // max(groups, 1)
    return torch.bmm(s.to(dtype).view(groups, each, rank), C.transpose(1, 2)).view(s.shape)


def _over_preferences(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """Compute y under vmap over x, γ or both."""
    x, wide, G, B, gamma, bias, strategy = inputs
    x_dim, *others, gamma_dim, bias_dim, _ = in_dims
    if any(dim is not None for dim in (*others, bias_dim)):
        raise ValueError("preference_linear: expected vmap over x and gamma alone, got another argument")
    many = info.batch_size
    if gamma_dim is None:
        x = x.movedim(x_dim or 0, 0)
        spread = gamma if gamma.ndim == 1 else gamma.unsqueeze(0)
        return preference_operator(x, wide, G, B, spread, bias, strategy), 0
    gamma = gamma.movedim(gamma_dim, 0)
    if x_dim is None and gamma.ndim == 2:
        return _shared_product(x, wide, G, B, gamma, bias), 0
    x = x.expand(many, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if gamma.ndim == 2:
        gamma = gamma.view(many, *(1 for _ in x.shape[1:-1]), gamma.shape[-1])
    return preference_operator(x, wide, G, B, gamma, bias, strategy), 0


def _shared_product(x: Tensor, wide: Tensor, G: Tensor, B: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    """Compute [many, *, N] of the same x at many γ: x·Wᵀ and Bᵀx once."""
    (d, rank), n = B.shape, wide.shape[0]
    rows = x.reshape(-1, d)
    base = F.linear(rows, wide[:, :d], bias)
    C = preference_core(G, gamma)
    t = (rows @ B).to(C.dtype) @ C.transpose(1, 2)
    left = wide[:, d : d + rank].t().expand(len(gamma), rank, n)
    y = torch.baddbmm(base.expand(len(gamma), *base.shape), t.to(x.dtype), left)
    return y.view(len(gamma), *x.shape[:-1], n)


preference_operator.register_vmap(_over_preferences)
