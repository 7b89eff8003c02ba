"""The hot kernels: right on the shapes that the goals use, then reductions and weight gradients beside their bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pmkernels
from benchmarks import layers, limits, tune
from benchmarks.common.session import Once
from benchmarks.goals.context import Context, Row, dtype_name, fill_times
from benchmarks.kernels import RANK, TASKS, TOLERANCE, Layer, relative_error
from pmkernels import ops, reference

VIT_L, VIT_B = (
    dict(zip(("in", "out", "fc", "proj"), tower.block_layers(limits.BATCH), strict=True))
    for tower in sorted(limits.TOWERS, key=lambda tower: tower.name, reverse=True)
)
# whose weight gradients are measured: all of a ViT-L/14 block, attention's of ViT-B/32
SIX = (*VIT_L.values(), VIT_B["in"], VIT_B["out"])
LIBRARY_DW = "the library's dW"
REDUCTION = "reduction of dW"
GRADIENT = {strategy: f"weight gradient, {strategy}" for strategy in ("auto", "streamed", "fused")}
COLUMN_SUMS = "db"
MERGE = "merge"


def _rank(layer: Layer) -> int:
    return RANK if limits.has_low_rank(layer.name) else 0


def _six(context: Context) -> Sequence[Layer]:
    return layers.TINY_LAYERS if context.quick else SIX


def hot_cases(context: Context) -> dict[str, tune.Case]:
    """What a step of ViT-L/14 and its served layers launch of ours, by name."""
    big = layers.TINY_LAYERS[0] if context.quick else VIT_L["in"]
    mlp = layers.TINY_LAYERS[1] if context.quick else VIT_L["fc"]
    rows, image = big.items * big.tokens, big.tokens
    attention: dict[str, Any] = {"n": big.n, "d": big.d, "rank": RANK}
    plain: dict[str, Any] = {"n": mlp.n, "d": mlp.d, "rank": 0}
    found = {
        "merge": tune.Case("merge", **attention),
        "merge of an MLP": tune.Case("merge", **plain),
        "reduction of dW": tune.Case("merge_grad", **attention),
        "reduction of dW of an MLP": tune.Case("merge_grad", **plain),
        "widen": tune.Case("widen", **attention, rows=rows, groups=big.items),
        "preference, one image": tune.Case("preference", **attention, rows=image, bias=True),
        "preference, all images": tune.Case("preference", **attention, rows=rows, groups=big.items, bias=True),
        "weight gradient from rows": tune.Case("weight_grad", **attention, rows=rows, bias=True),
        "forward, one image": tune.Case("forward", **attention, rows=image, bias=True),
        "dx, one image": tune.Case("dx", **attention, rows=image),
        "shrink": tune.Case("shrink", **attention, rows=rows, groups=big.items),
        "factor gradient": tune.Case("factor_grad", **attention, rows=rows),
    }
    if context.quick:
        # the interpreter: few tasks, and a type that it rounds as a GPU does
        return {name: replace(case, tasks=2, dtype=dtype_name(context.dtype)) for name, case in found.items()}
    return found


def correctness(context: Context) -> None:
    """Compare every hot kernel with float64: its whole result, and the worst row or column of it."""
    measure = context.session.measure
    for name, case in hot_cases(context).items():
        measure(f"correctness/{name}", functools.partial(_compare, context, name, case), 2)
    for name, function in (("merge_vectors", _vectors), ("softmax_entropy", _entropies), ("db", _sums)):
        measure(f"correctness/{name}", functools.partial(function, context), 1)


def _compare(context: Context, name: str, case: tune.Case) -> Iterator[Row]:
    prepared = tune.Prepared.make(case, context.device)
    with tune.precision(case.kind), tune.poisoned(), torch.no_grad():
        prepared.values["out"].fill_(torch.nan)
        found = tune.run(case, prepared.values)
        again = tune.run(case, prepared.values)
    fault = prepared.fault(found)
    if fault is None and not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        fault = "wrong: other bits the second time"
    errors = tune.Errors.of(found, prepared.truth)
    layer = f"{case.n}×{case.d}"
    yield Row(
        layer, name, case.rows, case.dtype, errors.whole, prepared.plain.whole, fault is None, case.tasks, reason=fault
    )


def _judged(
    name: str, rows: int, found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> Row:
    error, allowed = relative_error(found, truth), relative_error(plain, truth)
    right = error <= TOLERANCE * allowed + 1e-6
    return Row("", name, rows, dtype_name(dtype), error, allowed, right, reason=None if right else "wrong result")


def _with_gradient(function: Callable[[Tensor], Tensor], at: Tensor, upstream: Tensor) -> list[Tensor]:
    at = at.detach().requires_grad_()
    result = function(at)
    return [result.detach(), torch.autograd.grad(result, at, upstream.to(result.dtype))[0]]


def _vectors(context: Context) -> Iterator[Row]:
    """All biases and norms of a ViT-L/14, in one launch."""
    sizes = [7, 0, 40] if context.quick else [1024] * 3 + [3072, 1024, 1024, 1024, 4096, 1024, 1024] * 24
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(context.device)

    offsets = torch.tensor([0, *sizes], device=context.device).cumsum(0)
    weight, taus = (make(*shape).to(context.dtype) for shape in ((sum(sizes),), (TASKS, sum(sizes))))
    lam, upstream = make(len(sizes), TASKS), make(sum(sizes)).to(context.dtype)

    def merged(wide: torch.dtype | None, function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        w, t, at = (v if wide is None else v.to(wide) for v in (weight, taus, lam))
        return _with_gradient(lambda one: function(w, t, one, offsets, **options), at, upstream)

    ours = merged(None, pmkernels.merge_vectors, strategy="fused")
    plain, truth = merged(None, reference.merge_vectors), merged(torch.float64, reference.merge_vectors)
    yield _judged("merge_vectors and dλ", sum(sizes), ours, plain, truth, context.dtype)


def _entropies(context: Context) -> Iterator[Row]:
    for rows, classes in ((6, 10),) if context.quick else ((256, 100), (256, 1000)):
        logits = (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))).to(context.device)
        upstream = torch.ones(rows, device=context.device)
        ours = _with_gradient(lambda z: pmkernels.softmax_entropy(z, strategy="fused"), logits, upstream)
        plain = _with_gradient(reference.softmax_entropy, logits, upstream)
        truth = _with_gradient(reference.softmax_entropy, logits.double(), upstream)
        yield _judged(f"softmax_entropy, {classes} classes", rows, ours, plain, truth, torch.float32)


def _sums(context: Context) -> Iterator[Row]:
    layer = _six(context)[0]
    dy = torch.randn(layer.items, layer.tokens, layer.n, device=context.device).to(context.dtype)
    exact = dy.double().sum(dim=(0, 1))
    yield _judged("db", layer.items * layer.tokens, [column_sums(dy)], [exact.float()], [exact], context.dtype)


def column_sums(dy: Tensor) -> Tensor:
    """Σ_m dy [N] in float32, as the streamed way computes db."""
    return ops._column_sums(dy)


def reductions(context: Context) -> None:
    """Measure dW by the library, its reduction, the whole weight gradient in each way, db and the merge, by layer."""
    for layer in _six(context):
        rows = layer.items * layer.tokens
        tasks = 2 if context.quick else TASKS

        def make(layer: Layer = layer, tasks: int = tasks, rows: int = rows) -> layers.Case:
            with torch.no_grad():
                return layers.Case.make(layer, tasks, rows, context.dtype, context.device)

        case = Once(make)
        units: dict[str, Callable[[], Iterator[Row]]] = {
            LIBRARY_DW: lambda case=case: _library(context, case()),  # type: ignore[misc]
            REDUCTION: lambda layer=layer, tasks=tasks: _hot(context, REDUCTION, "merge_grad", layer, tasks),  # type: ignore[misc]
        }
        for strategy in GRADIENT:
            units[GRADIENT[strategy]] = lambda case=case, strategy=strategy: _gradient(context, case(), strategy)  # type: ignore[misc]
        units[COLUMN_SUMS] = lambda case=case: _db(context, case())  # type: ignore[misc]
        units[MERGE] = lambda layer=layer, tasks=tasks: _hot(context, MERGE, "merge", layer, tasks)  # type: ignore[misc]
        for name, function in units.items():
            context.session.measure(f"reductions/{layer.name}/{name}", function, 1.5)
        case.drop()


def _bound_ms(context: Context, operations: float, moved: float) -> float:
    rates = context.rates
    return layers.rounded(1e3 * max(operations / rates["bfloat16"], moved / rates["copy"]))


def _library(context: Context, case: layers.Case) -> Iterator[Row]:
    x, dy, layer = case.x, case.dy, case.layer
    operations, moved = 2.0 * x.shape[0] * layer.n * layer.d, 2.0 * (x.numel() + dy.numel() + layer.n * layer.d)
    error, plain = layers.product_error(x, dy)
    right = error <= TOLERANCE * plain + 1e-6
    row = Row(layer.name, LIBRARY_DW, x.shape[0], dtype_name(x.dtype), error, plain, right, case.tasks, moved)
    row.reason = None if right else "wrong product"
    row.bound_ms = _bound_ms(context, operations, moved)
    yield fill_times(row, lambda: [dy.t() @ x], context.device)


def _gradient(context: Context, case: layers.Case, strategy: str) -> Iterator[Row]:
    """dλ, dA, dG and dB from dy and x."""
    rows, layer = case.x.shape[0], case.layer
    with torch.no_grad():
        truth, plain = layers.truth(case, "weight gradient", rows)
        variant = layers.variants(case, "weight gradient", rows)[strategy]
        error = relative_error(variant(), truth)
        moved = 2.0 * (case.tasks * layer.n * layer.d + case.x.numel() + case.dy.numel())
        name, right = dtype_name(case.x.dtype), error <= TOLERANCE * plain + 1e-6
        row = Row(layer.name, GRADIENT[strategy], rows, name, error, plain, right, case.tasks, moved)
        row.bound_ms = _bound_ms(context, 2.0 * rows * layer.n * layer.d, moved)
        row.reason = None if right else "wrong gradient"
        yield fill_times(row, variant, context.device)


def _db(context: Context, case: layers.Case) -> Iterator[Row]:
    dy, layer = case.dy, case.layer
    exact = dy.double().sum(dim=0)
    error = relative_error([column_sums(dy)], [exact])
    moved = float(dy.numel() * dy.element_size())
    row = Row(layer.name, COLUMN_SUMS, dy.shape[0], dtype_name(dy.dtype), error, 0.0, error < 1e-5, case.tasks, moved)
    row.bound_ms = _bound_ms(context, 0.0, moved)
    yield fill_times(row, lambda: [column_sums(dy)], context.device)


def _hot(context: Context, name: str, op: str, layer: Layer, tasks: int) -> Iterator[Row]:
    """A kernel whose bytes are those of weights: the reduction of a dW that is there, and the merge."""
    case = tune.Case(op, layer.n, layer.d, tasks=tasks, rank=_rank(layer), dtype=dtype_name(context.dtype))
    prepared = tune.Prepared.make(case, context.device)

    def variant() -> list[Tensor]:
        return tune.run(case, prepared.values)

    with tune.precision(case.kind), torch.no_grad():
        found = variant()
        fault = prepared.fault(found)
        # every task vector and dW are read; the merge also reads W0 and writes W
        moved = 2.0 * (tasks + (1 if op == "merge_grad" else 2)) * layer.n * layer.d
        whole = tune.Errors.of(found, prepared.truth).whole
        row = Row(layer.name, name, 0, case.dtype, whole, prepared.plain.whole, fault is None, tasks, moved)
        row.reason = fault
        row.bound_ms = _bound_ms(context, 0.0, moved)
        yield fill_times(row, variant, context.device)
