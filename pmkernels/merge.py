"""merge_weight: W(γ) itself and the reductions of its gradient, by any strategy."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pmkernels import strategies
from pmkernels.autocast import no_autocast, without_autocast
from pmkernels.checks import check_cached, check_parts, check_tensor
from pmkernels.low_rank import Needs, Parts, gradients_of_weight
from pmkernels.operators import LEARNED, PARTS, differentiable, fakes, in_order, operator, wanted
from pmkernels.strategies import EAGER


def merge_weight(
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
    out: Tensor | None = None,
    cached: Tensor | None = None,
    strategy: str = "auto",
) -> Tensor:
    """Merge W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·(G ×₃ γ)·Bᵀ for one preference.

    Args:
        weight: W0, any number of dimensions, frozen; two with a low-rank term.
        task_vectors, lam, A, G, B, A_c, B_c: as in :func:`pareto_linear`. gamma: ``[K]``.
        out: where to write, the shape, dtype and device of ``weight``; not under autograd.
        cached: W(γ) as an earlier call with the same values returned it. It is not computed again but returned, with
            this call's gradient: several losses can share one merge and still free each layer's dW at once.
        strategy: ``"auto"``, ``"eager"``, or ``"fused"`` (as is ``"streamed"``): one kernel.

    Returns:
        A new tensor (or ``out``) like ``weight``, summed in float32 and rounded once. Differentiable once in all
        but weight and task_vectors.

    Raises:
        TypeError, ValueError: as :func:`pareto_linear`.
    """
    parts = Parts(weight, task_vectors, lam, A, G, B, gamma, A_c, B_c)
    if cached is None:
        # the call that made a cached value has checked the rest
        check_parts(parts)
    if gamma is not None and gamma.ndim != 1:
        tasks = "K" if gamma.ndim == 0 else gamma.shape[-1]
        raise ValueError(f"gamma: expected shape [{tasks}], one preference, got {list(gamma.shape)}")
    if out is not None:
        check_tensor("out", out, weight.device)
        if out.shape != weight.shape or out.dtype != weight.dtype:
            expected = f"{list(weight.shape)} in {weight.dtype}"
            raise ValueError(f"out: expected {expected}, got {list(out.shape)} in {out.dtype}")
        if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError("out: expected memory of its own for every element, got an expanded tensor")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*parts[2:], out)):
            raise ValueError("out: expected None where a gradient is wanted, got a tensor (use torch.no_grad())")
    if cached is not None:
        check_cached(cached, weight, weight.dtype)
    chosen = strategies.resolve(strategy, parts._asdict(), weight.device)
    with no_autocast(weight.device.type):
        if chosen == EAGER or cached is not None:
            merged: Tensor = _Eager.apply(*parts, cached, chosen)
            return merged if out is None else out.copy_(merged)
        if out is None:
            merged = merge_operator(*parts, chosen)
            return merged
        merge_out_operator(*parts, out, chosen)
        return out


def _merged(parts: Parts, strategy: str, out: Tensor | None = None) -> Tensor:
    chosen = strategies.pick("merge", strategy, parts.weight, parts)
    return chosen.merge(parts.terms(parts.core(), by_columns=chosen.kernels), out)


def _gradients(parts: Parts, asked: list[bool], strategy: str) -> dict[str, Tensor]:
    """Return the gradients that are ``asked`` for, by name: lam to B_c. dW is in the place of ``weight``."""
    d_weight, needs = parts.weight, Needs(*asked)
    chosen = strategies.pick("merge", strategy, d_weight, parts)
    if parts.lam is not None and parts.lam.dtype == torch.float64:
        # which then has a gradient in float64
        d_weight = d_weight.double()
    reduced = chosen.reduce(d_weight, parts.task_vectors if needs.lam else None, **needs.factors(parts))
    return gradients_of_weight(reduced, parts, parts.core(), needs)


class _Eager(torch.autograd.Function):
    """The eager form, and a W(γ) that is there with a merge's gradient. Operators may not return an argument."""

    @staticmethod
    def forward(ctx: Any, *rest: Any) -> Tensor:
        *tensors, cached, ctx.strategy = rest
        ctx.save_for_backward(*tensors[1:])
        return _merged(Parts(*tensors), EAGER) if cached is None else cached.detach()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2 : len(Parts._fields)])
        if ctx.strategy == EAGER:
            # autograd rounds each to the dtype of its tensor
            by_name = _gradients(Parts(d_weight, *ctx.saved_tensors), needs, EAGER)
            return None, None, *(by_name.get(name) for name in Parts._fields[2:]), None, None
        gradients = merge_backward_operator(d_weight, *ctx.saved_tensors, needs, ctx.strategy)
        return None, None, *wanted(gradients, needs), None, None


@operator("merge_weight", f"({PARTS}, str strategy) -> Tensor", fake=lambda weight, *_: torch.empty_like(weight))
def merge_operator(*rest: Any) -> Tensor:
    """Return W(γ) in a new tensor like ``weight``."""
    *tensors, strategy = rest
    return _merged(Parts(*tensors).contiguous(), strategy)


@operator("merge_weight_out", f"({PARTS}, Tensor(a!) out, str strategy) -> ()", fake=lambda *_: None, mutates=("out",))
def merge_out_operator(*rest: Any) -> None:
    """Write W(γ) into ``out``."""
    *tensors, out, strategy = rest
    _merged(Parts(*tensors).contiguous(), strategy, out)


@operator(
    "merge_weight_backward",
    f"(Tensor d_weight, {LEARNED}, bool[] needs, str strategy) -> Tensor[]",
    fake=lambda d_weight, _, *rest: fakes(rest[-2], rest[:-2], d_weight),
)
def merge_backward_operator(d_weight: Tensor, *rest: Any) -> list[Tensor]:
    """Return the gradients from lam to B_c that ``needs`` asks for, empty tensors for others."""
    *tensors, needs, strategy = rest
    gradients = _gradients(Parts(d_weight, *tensors), needs, strategy)
    return in_order(gradients, d_weight, dict(zip(Parts._fields[2:], tensors[1:], strict=True)))


@differentiable(merge_operator, keep=lambda _, inputs, merged: inputs[1:-1])
def _backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[2 : len(Parts._fields)])
    gradients = merge_backward_operator(d_weight, *ctx.saved_tensors, needs, ctx.strategy)
    return None, None, *wanted(gradients, needs), None
