"""The kernels as PyTorch operators ``torch.ops.pmkernels.*``: what is launched for a call, with fakes and autograd.

With fakes ``torch.compile`` sees through a call without running it; ``needs_input_grad`` reaches the backward operators
as a list, so nothing is computed that nobody asked for. Operators cannot return an optional tensor: a gradient that was
not asked for is an empty placeholder. Arguments are checked by the public functions, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from pmkernels import eager, launch, strategies
from pmkernels.checks import without_autocast
from pmkernels.kernels import entropy as entropy_kernels
from pmkernels.kernels import linear as linear_kernels
from pmkernels.kernels import low_rank as low_rank_kernels
from pmkernels.kernels import merge as merge_kernels
from pmkernels.kernels import vectors as vector_kernels
from pmkernels.kernels import weight_grad as weight_grad_kernels
from pmkernels.reference import preference_core

# torch.library reads these annotations and knows Optional, not |
OptionalTensor = Optional[Tensor]  # noqa: UP045
LINEAR_INPUTS = ("x", "weight", "task_vectors", "lam", "A", "G", "B", "gamma", "bias", "cached")
MERGE_INPUTS = ("weight", "task_vectors", "lam", "A", "G", "B", "gamma")


def _factors(
    A: OptionalTensor, G: OptionalTensor, B: OptionalTensor, gamma: OptionalTensor
) -> tuple[Tensor, Tensor] | None:
    """A·C(γ) [N, R], or A, laid out so that neighbouring n are neighbours in memory, and B [D, R]."""
    if A is None or B is None:
        return None
    if G is None or gamma is None:
        return A.t().contiguous().t(), B
    return (preference_core(G, gamma).t() @ A.t()).t(), B


def _choose(
    operation: str,
    strategy: str,
    rows: Tensor,
    weight: Tensor,
    task_vectors: OptionalTensor,
    A: OptionalTensor,
    gamma: OptionalTensor,
) -> str:
    n, d = weight.shape
    return strategies.choose(
        operation,
        strategy,
        rows,
        rows=math.prod(rows.shape[:-1]),
        n=n,
        d=d,
        rank=0 if A is None else A.shape[1],
        tasks=0 if task_vectors is None else task_vectors.shape[0],
        per_row=gamma is not None and gamma.ndim > 1,
    )


def _contiguous(*learned: OptionalTensor) -> tuple[OptionalTensor, ...]:
    """λ, A, G, B are small: the kernels take them contiguous, and their offsets then stay in int32."""
    return tuple(None if value is None else value.contiguous() for value in learned)


def _scratch(
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    low_rank: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """W in a new tensor of ``dtype``, or ``weight`` itself where there is nothing to add."""
    if low_rank is None and task_vectors is None and weight.dtype == dtype:
        return weight
    return merge_kernels.merge_weight(weight, task_vectors, lam, low_rank, torch.empty_like(weight, dtype=dtype))


class _Groups:
    """γ per row as the kernels take it: C or (G, γ) by group, rows of a group together."""

    def __init__(self, G: Tensor, gamma: Tensor, lead: Sequence[int]) -> None:
        self.G, self.gamma = G, eager.groups_of(gamma, lead).contiguous()
        self.tasks = gamma.shape[-1]

    @classmethod
    def one(cls, G: Tensor, gamma: Tensor) -> _Groups:
        """One γ [K] for all rows: one group whose only task is C(γ)."""
        core = preference_core(G, gamma)
        return cls(core.unsqueeze(-1), torch.ones(1, dtype=core.dtype, device=core.device), ())


@torch.library.custom_op("pmkernels::pareto_linear", mutates_args=())
def pareto_linear(
    x: Tensor,
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    bias: OptionalTensor,
    cached: OptionalTensor,
    strategy: str,
) -> Tensor:
    """y = x·W(γ)ᵀ + b; gamma [K] or [*, K] (one per row); strategy ``fused``, ``streamed`` or ``auto``.

    ``cached``: W(γ), or with one γ per row the base, put together by an earlier call.
    """
    with torch.cuda.device_of(x):
        lam, A, G, B = _contiguous(lam, A, G, B)
        low_rank, start = None, None
        if gamma is None or gamma.ndim == 1:
            low_rank = _factors(A, G, B, gamma) if cached is None else None
        else:
            assert A is not None and G is not None and B is not None
            groups = _Groups(G, gamma, x.shape[:-1])
            _, t = low_rank_kernels.shrink(x, B, groups.G, groups.gamma)
            assert t is not None
            start = (t, A)
        merged = cached
        if merged is None:
            if _choose("forward", strategy, x, weight, task_vectors, A, gamma) == "fused":
                return linear_kernels.linear_fwd(
                    x, weight, task_vectors, lam, low_rank=low_rank, start=start, bias=bias
                )
            merged = _scratch(weight, task_vectors, lam, low_rank, x.dtype)
        y = F.linear(x, merged, None if bias is None else bias.to(x.dtype))
        return _add_product(y, start)


def _add_product(y: Tensor, start: tuple[Tensor, Tensor] | None) -> Tensor:
    """y [*, N] += t·Aᵀ in the dtype of y, in place."""
    if start is not None:
        t, factor = start
        rows = y.view(t.shape[0], y.shape[-1])
        rows.addmm_(t.to(y.dtype), factor.to(y.dtype).t())
    return y


@pareto_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    bias: OptionalTensor,
    cached: OptionalTensor,
    strategy: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("pmkernels::pareto_linear_backward", mutates_args=())
def pareto_linear_backward(
    dy: Tensor,
    x: OptionalTensor,
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    bias: OptionalTensor,
    cached: OptionalTensor,
    needs: list[bool],
    strategy: str,
) -> list[Tensor]:
    """The gradients of x, lam, A, G, B, gamma and bias that ``needs`` asks for, empty tensors for the others."""
    need_x, need_lam, need_A, need_G, need_B, need_gamma, need_bias = needs
    need_core = need_G or need_gamma
    found: dict[str, Tensor] = {}
    with torch.cuda.device_of(dy):
        lam, A, G, B = _contiguous(lam, A, G, B)
        per_row = gamma is not None and gamma.ndim > 1
        # one pass over dW gives everything where λ wants it anyway; otherwise the low-rank gradients go row by row
        need_low_rank = need_A or need_B or need_core
        from_tiles = need_lam and not per_row and (A is None or launch.from_tiles(A.shape[1], *weight.shape))
        by_rows = per_row or (need_low_rank and not from_tiles)
        limit = weight.numel()
        groups = u = s = t = ds = None
        if by_rows:
            assert A is not None and B is not None
            if G is not None and gamma is not None:
                groups = _Groups(G, gamma, dy.shape[:-1]) if per_row else _Groups.one(G, gamma)
            core = (None, None) if groups is None else (groups.G, groups.gamma)
            if need_B or need_core or (need_x and per_row):
                u, ds = low_rank_kernels.shrink(dy, A, *core, transposed=True)
                ds = u if ds is None else ds
            if need_A or need_core:
                assert x is not None
                s, t = low_rank_kernels.shrink(x, B, *core)
                t = s if t is None else t
        if need_x:
            start = None
            if per_row:
                assert ds is not None and B is not None
                start = (ds, B)
            low_rank = None if per_row or cached is not None else _factors(A, G, B, gamma)
            if cached is None and _choose("dx", strategy, dy, weight, task_vectors, A, gamma) == "fused":
                found["x"] = linear_kernels.linear_bwd_x(dy, weight, task_vectors, lam, low_rank=low_rank, start=start)
            else:
                merged = _scratch(weight, task_vectors, lam, low_rank, dy.dtype) if cached is None else cached
                found["x"] = _add_product(dy @ merged, start)
        d_bias = None
        if need_lam:
            assert x is not None
            fused = _choose("weight_grad", strategy, dy, weight, task_vectors, A, gamma) == "fused"
            reduced = (weight_grad_kernels.weight_grad if fused else _weight_grad_of_product)(
                dy,
                x,
                task_vectors,
                A=A if from_tiles and need_B else None,
                B=B if from_tiles and (need_A or need_core) else None,
                need_bias=need_bias,
            )
            assert reduced.d_lam is not None
            found["lam"], d_bias = reduced.d_lam, reduced.d_bias
            if from_tiles:
                found.update(_from_products(reduced.P, reduced.Q, A, G, gamma, need_A, need_G, need_gamma))
        if need_bias:
            assert bias is not None
            found["bias"] = (_column_sums(dy) if d_bias is None else d_bias).to(bias.dtype)
        if by_rows:
            if need_A:
                assert t is not None
                found["A"] = low_rank_kernels.factor_grad(dy, t, limit)
            if need_B:
                assert ds is not None and x is not None
                found["B"] = low_rank_kernels.factor_grad(x, ds, limit)
            if need_core:
                assert groups is not None and G is not None and gamma is not None
                assert u is not None and s is not None
                if per_row:
                    if need_G:
                        found["G"] = low_rank_kernels.core_grad(u, s, groups.gamma, dy.dtype, limit)
                    if need_gamma:
                        by_row = low_rank_kernels.preference_grad(u, s, groups.G, dy.dtype)
                        members = by_row.shape[0] // max(groups.gamma.shape[0], 1)
                        by_group = by_row.view(groups.gamma.shape[0], members, groups.tasks).sum(dim=1)
                        found["gamma"] = eager.ungroup(by_group, dy.shape, gamma)
                else:
                    dC = low_rank_kernels.core_grad(u, s, groups.gamma, dy.dtype, limit)[..., 0]
                    found.update(_core_gradients(dC, G, gamma, need_G, need_gamma))
    return _in_order(found, dy, x=dy, lam=lam, A=A, G=G, B=B, gamma=gamma, bias=bias)


def _in_order(found: dict[str, Tensor], placeholder: Tensor, **tensors: OptionalTensor) -> list[Tensor]:
    """Return the gradients in the order and the dtypes of ``tensors``, an empty tensor where none was found."""
    return [
        found[name].to(tensor.dtype) if tensor is not None and name in found else placeholder.new_empty(0)
        for name, tensor in tensors.items()
    ]


def _column_sums(dy: Tensor) -> Tensor:
    # a sum over no dimensions at all would be a sum over all of them
    rows = dy.unsqueeze(0)
    return rows.sum(dim=tuple(range(rows.ndim - 1)), dtype=torch.float32)


def _weight_grad_of_product(
    dy: Tensor,
    x: Tensor,
    task_vectors: OptionalTensor,
    *,
    A: OptionalTensor,
    B: OptionalTensor,
    need_bias: bool,
) -> weight_grad_kernels.WeightGradients:
    """What the fused kernel gives, by the library's product: one layer's dW in memory, in the dtype of dy."""
    rows = math.prod(dy.shape[:-1])
    d_weight = dy.reshape(rows, dy.shape[-1]).t() @ x.reshape(rows, x.shape[-1])
    reduced = weight_grad_kernels.weight_grad_of_merge(d_weight, task_vectors, A=A, B=B)
    return reduced._replace(d_bias=_column_sums(dy) if need_bias else None)


def _from_products(
    P: OptionalTensor,
    Q: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    gamma: OptionalTensor,
    need_A: bool,
    need_G: bool,
    need_gamma: bool,
) -> dict[str, Tensor]:
    """dA = P·Cᵀ, dB = Q·C, dC = Aᵀ·P and from it dG and dγ: products of r columns; without a C, P and Q themselves."""
    found: dict[str, Tensor] = {}
    if P is None and Q is None:
        return found
    if G is None or gamma is None:
        return {name: _packed(product) for name, product in (("A", P), ("B", Q)) if product is not None}
    assert A is not None
    core = preference_core(G, gamma)
    if Q is not None:
        found["B"] = Q @ core
    if P is not None:
        if need_A:
            found["A"] = P @ core.t()
        if need_G or need_gamma:
            found.update(_core_gradients(A.t() @ P, G, gamma, need_G, need_gamma))
    return found


def _packed(product: Tensor) -> Tensor:
    """Return a product as its fake lies in memory: a rank that is no multiple of 16 is cut out of one that is."""
    rows_follow = product.stride(0) == product.shape[1]
    return product if rows_follow else product.clone(memory_format=torch.contiguous_format)


def _core_gradients(dC: Tensor, G: Tensor, gamma: Tensor, need_G: bool, need_gamma: bool) -> dict[str, Tensor]:
    dG, d_gamma = eager.core_gradients(dC[None], G, gamma[None], need_G, need_gamma)
    found = {}
    if dG is not None:
        found["G"] = dG
    if d_gamma is not None:
        found["gamma"] = d_gamma[0]
    return found


def _like(needs: Sequence[bool], tensors: Sequence[OptionalTensor], placeholder: Tensor) -> list[Tensor]:
    """Fakes of the gradients asked for: contiguous, in the shape and dtype of their tensors."""
    return [
        placeholder.new_empty(0)
        if not need or tensor is None
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for need, tensor in zip(needs, tensors, strict=True)
    ]


@pareto_linear_backward.register_fake
def _(
    dy: Tensor,
    x: OptionalTensor,
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    bias: OptionalTensor,
    cached: OptionalTensor,
    needs: list[bool],
    strategy: str,
) -> list[Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1])) if needs[0] else dy.new_empty(0)
    return [dx, *_like(needs[1:], (lam, A, G, B, gamma, bias), dy)]


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, task_vectors, lam, A, G, B, gamma, bias, cached, strategy = inputs
    _, _, _, *parameters, _, _, _ = ctx.needs_input_grad
    ctx.save_for_backward(x if any(parameters) else None, weight, task_vectors, lam, A, G, B, gamma, bias, cached)
    ctx.strategy = strategy


@without_autocast
def _linear_backward(ctx: Any, dy: Tensor) -> tuple[OptionalTensor, ...]:
    x, weight, task_vectors, lam, A, G, B, gamma, bias, cached = ctx.saved_tensors
    need_x, _, _, *needs_rest, _, _ = ctx.needs_input_grad
    needs = [need_x, *needs_rest]
    found = pareto_linear_backward(dy, x, weight, task_vectors, lam, A, G, B, gamma, bias, cached, needs, ctx.strategy)
    dx, *rest = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return (dx, None, None, *rest, None, None)


torch.library.register_autograd("pmkernels::pareto_linear", _linear_backward, setup_context=_linear_context)


@torch.library.custom_op("pmkernels::merge_weight", mutates_args=())
def merge_weight(
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
) -> Tensor:
    """W(γ) in a new tensor like ``weight``."""
    with torch.cuda.device_of(weight):
        lam, A, G, B = _contiguous(lam, A, G, B)
        low_rank = _factors(A, G, B, gamma)
        return merge_kernels.merge_weight(weight, task_vectors, lam, low_rank, torch.empty_like(weight))


@merge_weight.register_fake
def _(
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("pmkernels::merge_weight_out", mutates_args=("out",))
def merge_weight_out(
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    out: Tensor,
) -> None:
    """W(γ) into ``out``."""
    with torch.cuda.device_of(weight):
        lam, A, G, B = _contiguous(lam, A, G, B)
        merge_kernels.merge_weight(weight, task_vectors, lam, _factors(A, G, B, gamma), out)


@merge_weight_out.register_fake
def _(
    weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    out: Tensor,
) -> None:
    return None


@torch.library.custom_op("pmkernels::merge_weight_backward", mutates_args=())
def merge_weight_backward(
    d_weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of lam, A, G, B and gamma that ``needs`` asks for, empty tensors for the others."""
    need_lam, need_A, need_G, need_B, need_gamma = needs
    found: dict[str, Tensor] = {}
    with torch.cuda.device_of(d_weight):
        need_P, need_Q = need_A or need_G or need_gamma, need_B
        reduced = weight_grad_kernels.weight_grad_of_merge(
            d_weight, task_vectors if need_lam else None, A=A if need_Q else None, B=B if need_P else None
        )
        if reduced.d_lam is not None:
            found["lam"] = reduced.d_lam
        found.update(_from_products(reduced.P, reduced.Q, A, G, gamma, need_A, need_G, need_gamma))
    return _in_order(found, d_weight, lam=lam, A=A, G=G, B=B, gamma=gamma)


@merge_weight_backward.register_fake
def _(
    d_weight: Tensor,
    task_vectors: OptionalTensor,
    lam: OptionalTensor,
    A: OptionalTensor,
    G: OptionalTensor,
    B: OptionalTensor,
    gamma: OptionalTensor,
    needs: list[bool],
) -> list[Tensor]:
    return _like(needs, (lam, A, G, B, gamma), d_weight)


def _merge_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


@without_autocast
def _merge_backward(ctx: Any, d_weight: Tensor) -> tuple[OptionalTensor, ...]:
    needs = list(ctx.needs_input_grad[2:])
    found = merge_weight_backward(d_weight, *ctx.saved_tensors, needs)
    return (None, None, *(gradient if need else None for gradient, need in zip(found, needs, strict=True)))


torch.library.register_autograd("pmkernels::merge_weight", _merge_backward, setup_context=_merge_context)


@torch.library.custom_op("pmkernels::merge_vectors", mutates_args=())
def merge_vectors(weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
    """w0 + Σ_k λ_lk τ_k piece by piece: [S], [K, S], [L, K], [L + 1] -> [S]."""
    with torch.cuda.device_of(weight):
        weight, lam, offsets = weight.contiguous(), lam.contiguous(), offsets.contiguous()
        return vector_kernels.merge_vectors_fwd(weight, _rows_contiguous(task_vectors), lam, offsets)


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


@merge_vectors.register_fake
def _(weight: Tensor, task_vectors: Tensor, lam: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@torch.library.custom_op("pmkernels::merge_vectors_backward", mutates_args=())
def merge_vectors_backward(grad: Tensor, task_vectors: Tensor, offsets: Tensor) -> Tensor:
    """dλ [L, K] of the merged [S]."""
    with torch.cuda.device_of(grad):
        return vector_kernels.merge_vectors_bwd(grad, _rows_contiguous(task_vectors), offsets.contiguous())


@merge_vectors_backward.register_fake
def _(grad: Tensor, task_vectors: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty((offsets.shape[0] - 1, task_vectors.shape[0]), dtype=torch.float32)


def _vectors_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, task_vectors, _, offsets = inputs
    ctx.save_for_backward(task_vectors, offsets)


@without_autocast
def _vectors_backward(ctx: Any, grad: Tensor) -> tuple[OptionalTensor, ...]:
    return None, None, merge_vectors_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd("pmkernels::merge_vectors", _vectors_backward, setup_context=_vectors_context)


@torch.library.custom_op("pmkernels::shrink", mutates_args=())
def shrink(x: Tensor, factor: Tensor) -> Tensor:
    """x·factor: [*, D], [D, R] -> [*, R] in float32, x read once."""
    with torch.cuda.device_of(x):
        s, _ = low_rank_kernels.shrink(x, factor, None, None)
        return s.view(*x.shape[:-1], factor.shape[1])


@shrink.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], factor.shape[1]), dtype=torch.float32)


@torch.library.custom_op("pmkernels::softmax_entropy", mutates_args=())
def softmax_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H of each row, and what the backward needs with it: max z and log Σ exp(z − max z)."""
    with torch.cuda.device_of(logits):
        return entropy_kernels.entropy_fwd(logits)


@softmax_entropy.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def row() -> Tensor:
        return logits.new_empty(logits.shape[:-1], dtype=torch.float32)

    return row(), row(), row()


@torch.library.custom_op("pmkernels::softmax_entropy_backward", mutates_args=())
def softmax_entropy_backward(
    grad: Tensor, logits: Tensor, entropy: Tensor, largest: Tensor, normaliser: Tensor
) -> Tensor:
    """dH -> dlogits."""
    with torch.cuda.device_of(logits):
        return entropy_kernels.entropy_bwd(grad, logits, entropy, largest, normaliser)


@softmax_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, entropy: Tensor, largest: Tensor, normaliser: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    entropy, largest, normaliser = output
    ctx.mark_non_differentiable(largest, normaliser)
    ctx.save_for_backward(inputs[0], entropy, largest, normaliser)


@without_autocast
def _entropy_backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
    logits, entropy, largest, normaliser = ctx.saved_tensors
    return softmax_entropy_backward(grad, logits, entropy, largest, normaliser)


torch.library.register_autograd("pmkernels::softmax_entropy", _entropy_backward, setup_context=_entropy_context)

OPERATORS: tuple[Callable[..., Any], ...] = (
    pareto_linear,
    pareto_linear_backward,
    merge_weight,
    merge_weight_out,
    merge_weight_backward,
    merge_vectors,
    merge_vectors_backward,
    shrink,
    softmax_entropy,
    softmax_entropy_backward,
)
