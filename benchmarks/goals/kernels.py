"""What this card does at best, the hot kernels beside their bounds, and the rest."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import pmkernels
from benchmarks.common import layer_case
from benchmarks.common.ceilings import measured_rates
from benchmarks.common.errors import Errors, relative_error
from benchmarks.common.modes import poisoned, precision
from benchmarks.common.rows import LayerRow, dtype_name
from benchmarks.common.session import Once
from benchmarks.common.timing import rounded, timed
from benchmarks.common.towers import BATCH, RANK, TASKS, TINY_LAYERS, VIT_B, VIT_L, Layer
from benchmarks.goals.context import Context
from benchmarks.suites import layers
from benchmarks.tune import cases
from pmkernels import products, reference

# a rate, as benchmarks.common.ceilings names it -> its name here, and the unit of the figure
CEILINGS = {
    "memory": ("copy", "B/s"),
    "half": ("bfloat16", "FLOP/s"),
    "float32": ("float32", "FLOP/s"),
    "tf32": ("tf32", "FLOP/s"),
    "cache": ("L2", "B/s"),
    "launch": ("launch", "s"),
}
# whose weight gradients are measured: all of a ViT-L/14 block, attention's of ViT-B/32
SIX = (*VIT_L.block_layers(BATCH), *VIT_B.block_layers(BATCH)[:2])
LIBRARY_DW = "the library's dW"
REDUCTION = "reduction of dW"
GRADIENT = {strategy: f"weight gradient, {strategy}" for strategy in ("auto", "streamed", "fused")}
COLUMN_SUMS = "db"
MERGE = "merge"
# milliseconds of repetitions of one variant
WARMUP, REPETITIONS = 5, 40


def ceilings(context: Context) -> None:
    """Measure a large copy, products of 8192³ by type, copies inside L2, and empty launches."""

    def rows() -> Iterator[dict[str, Any]]:
        measured = measured_rates(context.device, context.quick)
        for name, (title, unit) in CEILINGS.items():
            if name in measured:
                yield {"variant": title, "value": measured[name], "unit_of_value": unit, "matched": True}

    context.session.measure("ceilings/rates", rows, 15)


def hot_cases(context: Context) -> dict[str, cases.Case]:
    """Return what a step of ViT-L/14 and its served layers launch of ours, by name."""
    big, mlp = TINY_LAYERS if context.quick else VIT_L.block_layers(BATCH)[::2][:2]
    # the interpreter: few tasks, and a type that it rounds as a GPU does
    smaller: dict[str, Any] = {"tasks": 2, "dtype": dtype_name(context.dtype)} if context.quick else {}
    rows: dict[str, Any] = {"rows": big.rows}
    per_image, one_image = {**rows, "groups": big.items}, {"rows": big.tokens, "bias": True}

    def attention(call: str, **more: Any) -> cases.Case:
        return cases.Case(call, big.n, big.d, rank=RANK, **smaller, **more)

    return {
        "merge": attention("merge"),
        "merge of an MLP": cases.Case("merge", mlp.n, mlp.d, rank=0, **smaller),
        "reduction of dW": attention("merge_grad"),
        "reduction of dW of an MLP": cases.Case("merge_grad", mlp.n, mlp.d, rank=0, **smaller),
        "widen": attention("widen", **per_image),
        "preference, one image": attention("preference", **one_image),
        "preference, all images": attention("preference", **per_image, bias=True),
        "weight gradient from rows": attention("weight_grad", **rows, bias=True),
        "forward, one image": attention("forward", **one_image),
        "dx, one image": attention("dx", rows=big.tokens),
        "shrink": attention("shrink", **per_image),
        "factor gradient": attention("factor_grad", **rows),
    }


def correctness(context: Context) -> None:
    """Compare every hot kernel with float64. Its whole result counts, and the worst row or column of it."""
    measure = context.session.measure
    for name, case in hot_cases(context).items():
        measure(f"correctness/{name}", functools.partial(_compare, context, name, case), 2)
    for name, function in (("merge_vectors", _vectors), ("softmax_entropy", _entropies), ("db", _sums)):
        measure(f"correctness/{name}", functools.partial(function, context), 1)


def _compare(context: Context, name: str, case: cases.Case) -> Iterator[LayerRow]:
    prepared = cases.Prepared.make(case, context.device)
    with precision(case.kind), poisoned(), torch.no_grad():
        prepared.values["out"].fill_(torch.nan)
        results = cases.run(case, prepared.values)
        again = cases.run(case, prepared.values)
    fault = prepared.fault(results)
    if fault is None and not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        fault = "wrong: other bits the second time"
    row = LayerRow(layer=f"{case.n}×{case.d}", dtype=case.dtype, variant=name, rows=case.rows, tasks=case.tasks)
    yield _with_fault(row, fault, results, prepared)


def _with_fault(row: LayerRow, fault: str | None, results: Sequence[Tensor], prepared: cases.Prepared) -> LayerRow:
    row.error, row.plain_error = Errors.of(results, prepared.truth).whole, prepared.plain.whole
    row.matched, row.reason = fault is None, fault
    return row


Tensors = Sequence[Tensor]


def _judged(name: str, rows: int, results: Tensors, plain: Tensors, truth: Tensors, dtype: torch.dtype) -> LayerRow:
    row = LayerRow(layer="", dtype=dtype_name(dtype), variant=name, rows=rows)
    row.judge(relative_error(results, truth), relative_error(plain, truth), wrong="wrong result")
    return row


def _vectors(context: Context) -> Iterator[LayerRow]:
    """Compare all biases and norms of a ViT-L/14, merged in one launch."""
    sizes = [7, 0, 40] if context.quick else [1024] * 3 + [3072, 1024, 1024, 1024, 4096, 1024, 1024] * 24
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(context.device)

    offsets = torch.tensor([0, *sizes], device=context.device).cumsum(0)
    weight, taus = (make(*shape).to(context.dtype) for shape in ((sum(sizes),), (TASKS, sum(sizes))))
    lam, upstream = make(len(sizes), TASKS), make(sum(sizes)).to(context.dtype)

    def merged(wide: torch.dtype | None, function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        w, t, at = (v if wide is None else v.to(wide) for v in (weight, taus, lam))
        return layer_case.with_gradient(lambda one: function(w, t, one, offsets, **options), at, upstream)

    ours = merged(None, pmkernels.merge_vectors, strategy="fused")
    plain, truth = merged(None, reference.merge_vectors), merged(torch.float64, reference.merge_vectors)
    yield _judged("merge_vectors and dλ", sum(sizes), ours, plain, truth, context.dtype)


def _entropies(context: Context) -> Iterator[LayerRow]:
    for rows, classes in ((6, 10),) if context.quick else ((256, 100), (256, 1000)):
        logits = (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))).to(context.device)
        upstream = torch.ones(rows, device=context.device)
        ours = layer_case.with_gradient(lambda z: pmkernels.softmax_entropy(z, strategy="fused"), logits, upstream)
        plain = layer_case.with_gradient(reference.softmax_entropy, logits, upstream)
        truth = layer_case.with_gradient(reference.softmax_entropy, logits.double(), upstream)
        yield _judged(f"softmax_entropy, {classes} classes", rows, ours, plain, truth, torch.float32)


def _sums(context: Context) -> Iterator[LayerRow]:
    layer = (TINY_LAYERS if context.quick else SIX)[0]
    dy = torch.randn(layer.items, layer.tokens, layer.n, device=context.device).to(context.dtype)
    exact = dy.double().sum(dim=(0, 1))
    yield _judged("db", layer.rows, [products.column_sums(dy)], [exact.float()], [exact], context.dtype)


def reductions(context: Context) -> None:
    """Measure what a weight gradient consists of, layer by layer.

    That is dW by the library, its reduction, the whole in each way, db and the merge.
    """
    tasks = 2 if context.quick else TASKS
    for layer in TINY_LAYERS if context.quick else SIX:

        @torch.no_grad()
        def make(layer: Layer = layer) -> layer_case.Case:
            return layer_case.Case.make(layer, tasks, layer.rows, context.dtype, context.device)

        case = Once(make)
        units = {
            LIBRARY_DW: functools.partial(_library, context, case),
            REDUCTION: functools.partial(_hot, context, REDUCTION, "merge_grad", layer, tasks),
            **{name: functools.partial(_gradient, context, case, way) for way, name in GRADIENT.items()},
            COLUMN_SUMS: functools.partial(_db, context, case),
            MERGE: functools.partial(_hot, context, MERGE, "merge", layer, tasks),
        }
        for name, unit in units.items():
            context.session.measure(f"reductions/{layer.name}/{name}", unit, 1.5)
        case.drop()


def _row(
    context: Context, variant: str, layer: Layer, rows: int, tasks: int, operations: float, moved: float
) -> LayerRow:
    """Return a row without times of an operation of a layer that does so much."""
    rates, row = context.rates, LayerRow(layer=layer.name, dtype=dtype_name(context.dtype), variant=variant, rows=rows)
    row.tasks, row.bytes = tasks, moved
    row.bound_ms = rounded(1e3 * max(operations / rates["bfloat16"], moved / rates["copy"]))
    return row


def _fill_times(row: LayerRow, variant: Callable[[], Sequence[Tensor]], device: torch.device) -> LayerRow:
    """Time a variant that was right; off the GPU one call, which measures nothing."""
    if row.matched:
        row.note_times(timed(variant, device, warmup=WARMUP, repetitions=REPETITIONS))
    return row


def _library(context: Context, made: Once) -> Iterator[LayerRow]:
    case: layer_case.Case = made()
    x, dy, layer = case.x, case.dy, case.layer
    moved = 2.0 * (x.numel() + dy.numel() + layer.n * layer.d)
    row = _row(context, LIBRARY_DW, layer, len(x), case.tasks, 2.0 * len(x) * layer.n * layer.d, moved)
    row.judge(*layer_case.product_error(x, dy), wrong="wrong product")
    yield _fill_times(row, lambda: [dy.t() @ x], context.device)


def _gradient(context: Context, made: Once, strategy: str) -> Iterator[LayerRow]:
    """Measure dλ, dA, dG and dB from dy and x."""
    case: layer_case.Case = made()
    count, layer = len(case.x), case.layer
    with torch.no_grad():
        truth, plain = layer_case.truth(case, "weight gradient", count)
        variant = layer_case.variants(case, "weight gradient", count)[strategy]
        moved = 2.0 * (case.tasks * layer.n * layer.d + case.x.numel() + case.dy.numel())
        row = _row(context, GRADIENT[strategy], layer, count, case.tasks, 2.0 * count * layer.n * layer.d, moved)
        row.judge(relative_error(variant(), truth), plain, wrong="wrong gradient")
        yield _fill_times(row, variant, context.device)


def _db(context: Context, made: Once) -> Iterator[LayerRow]:
    case: layer_case.Case = made()
    dy = case.dy
    row = _row(context, COLUMN_SUMS, case.layer, len(dy), case.tasks, 0.0, float(dy.numel() * dy.element_size()))
    row.error = relative_error([products.column_sums(dy)], [dy.double().sum(dim=0)])
    row.matched = row.error < 1e-5
    yield _fill_times(row, lambda: [products.column_sums(dy)], context.device)


def _hot(context: Context, name: str, op: str, layer: Layer, tasks: int) -> Iterator[LayerRow]:
    """Measure a kernel whose bytes are those of weights: a reduction or the merge."""
    case = cases.Case(op, layer.n, layer.d, tasks=tasks, rank=layer.rank, dtype=dtype_name(context.dtype))
    prepared = cases.Prepared.make(case, context.device)

    def variant() -> list[Tensor]:
        return cases.run(case, prepared.values)

    with precision(case.kind), torch.no_grad():
        results = variant()
        # every task vector and dW are read; the merge also reads W0 and writes W
        moved = 2.0 * (tasks + (1 if op == "merge_grad" else 2)) * layer.n * layer.d
        row = _row(context, name, layer, 0, tasks, 0.0, moved)
        yield _fill_times(_with_fault(row, prepared.fault(results), results, prepared), variant, context.device)


def rest(context: Context) -> None:
    """Measure what has least value for its time: few bytes, a data-free run, the grid."""
    try:
        # it needs pydantic
        from benchmarks.goals import training
    except ImportError as error:
        context.session.lacks("rest/all", error)
    else:
        training.few_bytes(context)
    for point in layers.grid_points(context.quick, context.device):
        context.session.measure(f"rest/layer grid/{point.name}", point.rows, 1.0)
