"""pareto_linear and merge_weight: checks at the border, and the strategy that does the work.

:mod:`pmkernels.eager` holds the strategy in plain PyTorch, :mod:`pmkernels.ops` the operators that launch kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import eager, launch, strategies
from pmkernels.checks import autocast_enabled, check_parameters, check_tensor, no_autocast, without_autocast

if launch.HAS_TRITON:
    from pmkernels import ops


def broadcasts(lead: torch.Size, to: torch.Size) -> bool:
    """Whether the leading dimensions of γ are those of x, or 1."""
    return len(lead) == len(to) and all(here in (1, there) for here, there in zip(lead, to, strict=True))


def _check_cached(cached: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    check_tensor("cached", cached, weight.device)
    if cached.shape != weight.shape or cached.dtype != dtype:
        expected = f"{list(weight.shape)} in {dtype}"
        raise ValueError(f"cached: expected {expected}, got {list(cached.shape)} in {cached.dtype}")
    if cached.requires_grad:
        raise ValueError("cached: expected requires_grad=False (its gradient is that of what it is made of), got True")


def pareto_linear(
    x: Tensor,
    weight: Tensor,
    *,
    task_vectors: Tensor | None = None,
    lam: Tensor | None = None,
    A: Tensor | None = None,
    G: Tensor | None = None,
    B: Tensor | None = None,
    gamma: Tensor | None = None,
    bias: Tensor | None = None,
    cached: Tensor | None = None,
    strategy: str = "auto",
) -> Tensor:
    """y = x·W(γ)ᵀ + b with W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ (Chen & Kwok, arXiv 2408.12105, equation 6).

    Args:
        x: ``[*, in]``, any strides, no rows allowed.
        weight: W0 ``[out, in]``, frozen. x and weight set the compute dtype and must agree, except under autocast,
            which casts x only.
        task_vectors: τ ``[K, out, in]``, frozen, or None: already folded into ``weight``.
        lam: λ ``[K]``, float32, together with ``task_vectors``.
        A, G, B: ``[out, r]``, ``[r, r, K]``, ``[in, r]``, float32, or None together with ``gamma``: λ only. With A and
            B alone the low-rank term is A·Bᵀ.
        gamma: the preference, float32: ``[K]`` for all rows, or exactly ``x.ndim`` dimensions ``[*, K]`` whose leading
            ones are 1 or x's (``[32, 1, K]`` against ``[32, 257, in]``: one preference per image). Its values are not
            looked at here.
        bias: ``[out]`` or None.
        cached: W(γ) of the same values in the compute dtype, as :func:`merge_weight` returned it: nothing is put
            together, forward or backward, and the gradients are what they are without it. With a preference per row,
            W without its low-rank term. Whoever keeps it answers for its being up to date.
        strategy: ``"auto"``; or ``"eager"`` (plain PyTorch, any device), ``"fused"`` (W assembled tile by tile inside
            the product: allocates nothing of W's size), ``"streamed"`` (W merged into a scratch tensor, then the
            library's product; so is dW, except in float16). The last two need a CUDA GPU, float32, bfloat16 or
            float16, K and R up to 32 and 64. ``"auto"`` takes what was measured on this GPU or is counted to be
            fastest, for each of forward, dx and the weight's gradient.

    Returns:
        ``[*, out]`` in the compute dtype. Differentiable once in x, lam, A, G, B, gamma and bias; the backward keeps
        x and the parameters, and forms the gradient of one layer's weight at a time.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, number of tasks, strategy, or a frozen
            tensor that requires a gradient. The message names the argument, what was expected and what came.
    """
    check_parameters(weight, task_vectors, lam, A, G, B, gamma)
    check_tensor("x", x, weight.device)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [out, in], got {list(weight.shape)}")
    n, d = weight.shape
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(f"x: expected shape [*, {d}], got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias, weight.device)
        if bias.shape != (n,):
            raise ValueError(f"bias: expected shape [{n}], got {list(bias.shape)}")
    device_type = x.device.type
    if autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != weight.dtype:
        raise TypeError(f"x: expected {weight.dtype}, the dtype of weight, got {x.dtype}")
    lead = x.shape[:-1]
    per_row = gamma is not None and gamma.ndim > 1
    if gamma is not None and per_row and not broadcasts(gamma.shape[:-1], lead):
        raise ValueError(
            f"gamma: expected shape [{gamma.shape[-1]}] or [*, {gamma.shape[-1]}] with {x.ndim} dimensions "
            f"broadcastable to {tuple(lead)}, got {list(gamma.shape)}"
        )
    if cached is not None:
        _check_cached(cached, weight, x.dtype)
    tensors = {"x": x, "weight": weight, "task_vectors": task_vectors, "lam": lam, "A": A, "G": G, "B": B}
    tensors.update(gamma=gamma, bias=bias, cached=cached)
    chosen = strategies.resolve(strategy, tensors, x.device)
    arguments = tuple(tensors.values())
    with no_autocast(device_type):
        if chosen == "eager":
            y: Tensor = (eager.RowsLinear if per_row else eager.SharedLinear).apply(*arguments)
        else:
            y = ops.pareto_linear(*arguments, chosen)
        return y


def merge_weight(
    weight: Tensor,
    *,
    task_vectors: Tensor | None = None,
    lam: Tensor | None = None,
    A: Tensor | None = None,
    G: Tensor | None = None,
    B: Tensor | None = None,
    gamma: Tensor | None = None,
    out: Tensor | None = None,
    cached: Tensor | None = None,
    strategy: str = "auto",
) -> Tensor:
    """W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ itself, for one preference.

    Args:
        weight: W0, any number of dimensions, frozen; two with a low-rank term.
        task_vectors, lam, A, G, B: as in :func:`pareto_linear`. gamma: ``[K]``.
        out: where to write, the shape, dtype and device of ``weight``; not under autograd.
        cached: W(γ) as an earlier call with the same values returned it. It is not computed again but returned, with
            this call's gradient: several losses can share one merge and still free each layer's dW at once.
        strategy: ``"auto"``, ``"eager"``, or ``"fused"`` (as is ``"streamed"``): one kernel, where
            :func:`pareto_linear` has one.

    Returns:
        A new tensor (or ``out``) like ``weight``, summed in float32 and rounded once. Differentiable once in lam, A,
        G, B and gamma.

    Raises:
        TypeError, ValueError: as :func:`pareto_linear`.
    """
    if cached is None:
        # the call that made a cached value has checked the rest
        check_parameters(weight, task_vectors, lam, A, G, B, gamma)
    if gamma is not None and gamma.ndim != 1:
        tasks = "K" if gamma.ndim == 0 else gamma.shape[-1]
        raise ValueError(f"gamma: expected shape [{tasks}], one preference, got {list(gamma.shape)}")
    if out is not None:
        check_tensor("out", out, weight.device)
        if out.shape != weight.shape or out.dtype != weight.dtype:
            raise ValueError(
                f"out: expected {list(weight.shape)} in {weight.dtype}, got {list(out.shape)} in {out.dtype}"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError("out: expected memory of its own for every element, got an expanded tensor")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (lam, A, G, B, gamma, out)):
            raise ValueError("out: expected None where a gradient is wanted, got a tensor (use torch.no_grad())")
    if cached is not None:
        _check_cached(cached, weight, weight.dtype)
    tensors = {"weight": weight, "task_vectors": task_vectors, "lam": lam, "A": A, "G": G, "B": B, "gamma": gamma}
    chosen = strategies.resolve(strategy, tensors, weight.device)
    arguments = tuple(tensors.values())
    with no_autocast(weight.device.type):
        if chosen == "eager":
            merged: Tensor = eager.MergeWeight.apply(*arguments, cached)
            return merged if out is None else out.copy_(merged)
        if cached is not None:
            merged = _CachedMerge.apply(*arguments, cached)
            return merged if out is None else out.copy_(merged)
        if out is None:
            merged = ops.merge_weight(*arguments)
            return merged
        ops.merge_weight_out(*arguments, out)
        return out


class _CachedMerge(torch.autograd.Function):
    """``cached`` with the gradient of the merge: an operator may not return its argument."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *rest: Tensor | None) -> Tensor:
        *parameters, cached = rest
        ctx.save_for_backward(*parameters)
        assert cached is not None
        return cached.detach()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2:-1])
        found = ops.merge_weight_backward(d_weight, *ctx.saved_tensors, needs)
        gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        return (None, None, *gradients, None)
