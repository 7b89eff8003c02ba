"""pareto_linear: y = x·W(γ)ᵀ + b and its gradients, by any strategy.

What is computed is the same for all of them (:func:`_forward`, :func:`_gradients`); who computes it is looked up in
:mod:`pmkernels.strategies`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import products, strategies
from pmkernels.autocast import autocast_enabled, no_autocast, without_autocast
from pmkernels.checks import check_cached, check_gamma, check_parts, check_tensor
from pmkernels.low_rank import Needs, Parts, Terms, gradients_of_weight
from pmkernels.operators import PARTS, differentiable, fakes, in_order, operator, wanted
from pmkernels.strategies import EAGER

# of the operator, before the strategy
INPUTS = ("x", *Parts._fields, "bias", "cached")
LEARNED = (*Parts._fields[2:], "bias")


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
    A_c: Tensor | None = None,
    B_c: Tensor | None = None,
    bias: Tensor | None = None,
    cached: Tensor | None = None,
    strategy: str = "auto",
) -> Tensor:
    """Compute y = x·W(γ)ᵀ + b.

    W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·(G ×₃ γ)·Bᵀ is equation 6 of Chen & Kwok, arXiv 2408.12105, and a constant
    low-rank term.

    Longer than 60 lines because it says all there is to say about a layer's arguments, and checks them.

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
        A_c, B_c: ``[out, r_c]``, ``[in, r_c]``, float32, or both None. They add A_c·B_cᵀ whatever γ is, with or without
            the rest.
        bias: ``[out]`` or None.
        cached: W(γ) of the same values in the compute dtype, as :func:`merge_weight` returned it: nothing is put
            together, forward or backward, and the gradients are what they are without it. With a preference per row,
            W without its term of the preference, W0 + Σ_k λ_k τ_k + A_c·B_cᵀ. Whoever keeps it answers for its being up
            to date.
        strategy: ``"auto"``; or ``"eager"`` (plain PyTorch, any device), ``"fused"`` (W assembled tile by tile inside
            the product: allocates nothing of W's size), ``"streamed"`` (W merged into a scratch tensor, then the
            library's product; so is dW, except in float16). The last two need a CUDA GPU, float32, bfloat16 or
            float16, K up to 32 and r_c + r up to 64. ``"auto"`` takes what was measured on this GPU or is counted to be
            fastest, for each of forward, dx and the weight's gradient.

    Returns:
        ``[*, out]`` in the compute dtype. Differentiable once in x, lam, A, G, B, gamma, A_c, B_c and bias; the
        backward keeps x and the parameters, and forms the gradient of one layer's weight at a time.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device, number of tasks, strategy, or a frozen
            tensor that requires a gradient. The message names the argument, what was expected and what came.
    """
    parts = Parts(weight, task_vectors, lam, A, G, B, gamma, A_c, B_c)
    check_parts(parts)
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
    if gamma is not None and parts.per_row:
        check_gamma(gamma, x, gamma.shape[-1])
    if cached is not None:
        check_cached(cached, weight, x.dtype)
    inputs = x, *parts, bias, cached
    chosen = strategies.resolve(strategy, dict(zip(INPUTS, inputs, strict=True)), x.device)
    with no_autocast(device_type):
        y: Tensor = _Eager.apply(*inputs) if chosen == EAGER else linear_operator(*inputs, chosen)
        return y


def _forward(x: Tensor, parts: Parts, bias: Tensor | None, cached: Tensor | None, strategy: str) -> Tensor:
    chosen = strategies.pick("forward", strategy, x, parts, bias=bias, cached=cached)
    start = None
    if parts.per_row:
        assert parts.A is not None
        _, t = chosen.rows(parts, x).shrink(x)
        start = t, parts.A
    if cached is not None:
        return products.forward(x, Terms(cached), start=start, bias=bias, by_kernel=chosen.kernels)
    return chosen.forward(x, parts.terms(parts.core(), by_columns=chosen.kernels), start=start, bias=bias)


def _gradients(
    dy: Tensor, x: Tensor | None, parts: Parts, asked: list[bool], strategy: str, **others: Tensor | None
) -> dict[str, Tensor]:
    """Return the gradients ``asked`` for, by name: x and those of LEARNED. ``others``: bias and cached."""
    need_x, *parameters, need_bias = asked
    needs, cached = Needs(*parameters), others.get("cached")
    of_x = strategies.pick("dx", strategy, dy, parts, **others) if need_x else None
    of_w = of_x if of_x and not needs.lam else strategies.pick("weight_grad", strategy, dy, parts, **others)
    of_dW, by_rows = needs.divided(parts, of_w.rows.from_tiles)
    gradients: dict[str, Tensor] = {}
    ds = None
    if by_rows.low_rank or (need_x and parts.per_row):
        gradients, ds = of_w.rows(parts, dy).gradients(dy, x, by_rows, need_x and parts.per_row)
    if by_rows.constant:
        alone = Needs(False, by_rows.A_c, False, by_rows.B_c, False)
        named, _ = of_w.rows(parts.constant(), dy).gradients(dy, x, alone, False)
        gradients |= {f"{name}_c": gradient for name, gradient in named.items()}
    core = parts.core() if of_dW.low_rank or (of_x is not None and cached is None) else None
    if of_x is not None:
        start = None
        if parts.per_row:
            assert ds is not None and parts.B is not None
            start = ds, parts.B
        if cached is not None:
            gradients["x"] = products.dx(dy, Terms(cached), start=start, by_kernel=of_x.kernels)
        else:
            gradients["x"] = of_x.dx(dy, parts.terms(core, by_columns=of_x.kernels), start=start)
    if needs.lam:
        assert x is not None and parts.lam is not None
        # a λ in float64 has a gradient in float64, all the way
        rows = (dy, x) if parts.lam.dtype != torch.float64 else (dy.double(), x.double())
        reduced = of_w.weight_grad(*rows, parts.task_vectors, **of_dW.factors(parts), need_bias=need_bias)
        gradients |= gradients_of_weight(reduced, parts, core, of_dW)
    if need_bias and "bias" not in gradients:
        gradients["bias"] = products.column_sums(dy)
    return gradients


class _Eager(torch.autograd.Function):
    """The eager form. It saves x and the parts; the backward merges W(γ) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *tensors, bias, cached = rest
        parts = Parts(*tensors)
        needs_x = any(tensor is not None and tensor.requires_grad for tensor in parts[2:])
        ctx.save_for_backward(x if needs_x else None, *parts, cached)
        return _forward(x, parts, bias, cached, EAGER)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors, cached = ctx.saved_tensors
        need_x, _, _, *parameters, _ = ctx.needs_input_grad
        # rows in one block of memory, wherever that takes a copy
        dy = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).view(dy.shape)
        # autograd rounds each to the dtype of its tensor
        gradients = _gradients(dy, x, Parts(*tensors), [need_x, *parameters], EAGER, cached=cached)
        return gradients.get("x"), None, None, *(gradients.get(name) for name in LEARNED), None


@operator(
    "pareto_linear",
    f"(Tensor x, {PARTS}, Tensor? bias, Tensor? cached, str strategy) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
def linear_operator(x: Tensor, *rest: Any) -> Tensor:
    """Compute y = x·W(γ)ᵀ + b by a strategy. ``cached``: W(γ), or with one γ per row the base, put together before."""
    *tensors, bias, cached, strategy = rest
    return _forward(x, Parts(*tensors).contiguous(), bias, cached, strategy)


def _fake_gradients(dy: Tensor, _: Tensor | None, weight: Tensor, *rest: Any) -> list[Tensor]:
    _, *tensors, _, needs, _ = rest
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1])) if needs[0] else dy.new_empty(0)
    return [dx, *fakes(needs[1:], tensors, dy)]


@operator(
    "pareto_linear_backward",
    f"(Tensor dy, Tensor? x, {PARTS}, Tensor? bias, Tensor? cached, bool[] needs, str strategy) -> Tensor[]",
    fake=_fake_gradients,
)
def linear_backward_operator(dy: Tensor, x: Tensor | None, *rest: Any) -> list[Tensor]:
    """Return the gradients from x to bias that ``needs`` asks for, empty tensors for others."""
    *tensors, bias, cached, needs, strategy = rest
    parts = Parts(*tensors).contiguous()
    gradients = _gradients(dy, x, parts, needs, strategy, bias=bias, cached=cached)
    return in_order(gradients, dy, dict(zip(("x", *LEARNED), (dy, *parts[2:], bias), strict=True)))


def _kept(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> tuple[Tensor | None, ...]:
    # of λ, factors, G and γ: without them nobody asks for x
    return inputs[0] if any(ctx.needs_input_grad[3 : 1 + len(Parts._fields)]) else None, *inputs[1:-1]


@differentiable(linear_operator, keep=_kept)
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, _, *needs, _, _ = ctx.needs_input_grad
    gradients = linear_backward_operator(dy, *ctx.saved_tensors, [need_x, *needs], ctx.strategy)
    dx, *rest = wanted(gradients, [need_x, *needs])
    return dx, None, None, *rest, None, None
