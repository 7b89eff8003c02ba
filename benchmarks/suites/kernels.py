"""The kernels suite: each operation of a layer beside the library's and strong baselines.

Everything is measured side by side in one run, on the same inputs, with a cold L2 cache; a time is reported only if the
outputs matched float64 in that run. The limit of every row is ``F.linear`` (or the plain product) on a weight merged
beforehand: what a layer costs that is not a Pareto layer. Bounds count operations and bytes against ceilings measured
in the same run.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks.common import layer_case
from benchmarks.common.ceilings import REPETITIONS, WARMUP, ceilings
from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import CHOICES, LIMIT, OPERATIONS, PYTORCH, Case, Variant
from benchmarks.common.pages import table
from benchmarks.common.rows import Json, LayerRow, dtype_name, why_not
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import suite_device, timed
from benchmarks.common.towers import BATCH, RANK, TASKS, TINY_LAYERS, TOWERS, Layer
from pmkernels import costs, reference
from pmkernels.costs import Bound, Problem
from pmkernels.graphs import capture, warm_up
from pmkernels.launch import precision_kind

LAYERS = (
    *(layer for tower in TOWERS for layer in tower.block_layers(BATCH)[:2]),
    *(replace(layer, name=f"{layer.name}, one image") for tower in TOWERS for layer in tower.block_layers(1)[:1]),
)
LOGITS = ((256, 10), (256, 1000), (8192, 1000), (1024, 50257))
TINY_LOGITS = ((6, 10),)
PARAMETERS = ("lam", "A", "G", "B")


@dataclass(frozen=True)
class Bench:
    """What rows are of: a layer in one type, on a device. ``rates``: the ceilings of this run."""

    layer: str
    dtype: torch.dtype
    rows: int
    device: torch.device
    rates: Json

    def measure(
        self,
        op: str,
        variants: Mapping[str, Variant],
        truth: Sequence[Tensor],
        least: Bound,
        *,
        exempt: Sequence[str] = (LIMIT,),
        plain_error: float | None = None,
    ) -> Iterator[LayerRow]:
        """Yield a row per variant, judged by plain PyTorch's own error. The outputs of ``exempt`` are not judged."""
        plain = relative_error(variants[PYTORCH](), truth) if plain_error is None else plain_error
        bound_ms = 1e3 * max(least.operations / self.rates[dtype_name(self.dtype)], least.bytes / self.rates["copy"])
        for name, variant in variants.items():
            row = LayerRow(op=op, layer=self.layer, dtype=dtype_name(self.dtype), variant=name, rows=self.rows)
            row.bound_ms = bound_ms
            row.judge(0.0 if name in exempt else relative_error(variant(), truth), plain)
            if row.matched:
                row.note_times(timed(variant, self.device, warmup=WARMUP, repetitions=REPETITIONS, graph=False))
            yield row


def _gradients(
    values: Mapping[str, Tensor], names: Sequence[str], dy: Tensor, function: Callable[..., Tensor], **options: Any
) -> list[Tensor]:
    """Return the gradients of ``names`` by autograd through ``function``."""
    return layer_case.with_gradients(functools.partial(function, **options), values, names, dy)[1:]


def _merge_and_linear(x: Tensor, bias: Tensor, **parts: Tensor) -> Tensor:
    """Merge into a tensor of the graph, then multiply. The strong baseline merges once per step."""
    return F.linear(x, reference.merge_weight(**parts), bias)


def layer_rows(layer: Layer, dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """Measure every operation of a layer at one preference. The merge is into a weight that is there."""
    bench = Bench(layer.name, dtype, layer.rows, device, rates)
    with torch.no_grad():
        case = Case.make(layer, TASKS, layer.rows, dtype, device)
    problem = Problem(layer.rows, layer.n, layer.d, TASKS, RANK, precision_kind(dtype))
    for op, key in OPERATIONS.items():
        truth, plain = layer_case.truth(case, op, layer.rows)
        variants = layer_case.variants(case, op, layer.rows)
        variants.pop("cached", None)
        yield from bench.measure(op, variants, truth, costs.bound(key, problem), plain_error=plain)
    yield from _low_rank_rows(bench, case)
    out = torch.empty_like(case.merged)
    variants = {
        "fused": lambda: [pmkernels.merge_weight(**case.parts, out=out, strategy="fused")],
        PYTORCH: lambda: [reference.merge_weight(**case.parts)],
    }
    yield from bench.measure("merge", variants, [case.exact], costs.bound("merge", problem))
    if device.type == "cuda":
        yield from _beside(bench, case, costs.bound("forward", problem))
    yield from _step_rows(bench, case, problem)


def _low_rank_rows(bench: Bench, case: Case) -> Iterator[LayerRow]:
    """Measure the gradients of A, G and B where λ is frozen."""
    names, rows, layer = ("A", "G", "B"), bench.rows, case.layer
    values = {**case.parts, "x": case.x, "bias": case.bias}
    variants: dict[str, Variant] = {
        "fused": layer_case.backward(case, rows, names, "fused"),
        PYTORCH: lambda: _gradients(values, names, case.dy, pmkernels.pareto_linear, strategy="eager"),
    }
    truth = case.reduced(case.dy.double().t() @ case.x.double())[1:]
    moved = 2.0 * rows * (layer.n + layer.d) * case.x.element_size()
    least = Bound(8.0 * rows * RANK * (layer.n + layer.d), moved)
    yield from bench.measure("low-rank gradient, λ frozen", variants, truth, least)


def _step_rows(bench: Bench, case: Case, problem: Problem) -> Iterator[LayerRow]:
    """Measure forward and backward together, beside a merged weight's products and its full dW."""
    x, dy, names = case.x, case.dy, ("x", *layer_case.learned(case.parts))
    whole = functools.partial(_gradients, {**case.parts, "x": x, "bias": case.bias}, names, dy)
    limit = "limit: full dW, merged beforehand"
    variants: dict[str, Variant] = {
        limit: lambda: [F.linear(x, case.merged, case.bias), dy @ case.merged, dy.t() @ x],
        **{name: functools.partial(whole, pmkernels.pareto_linear, strategy=name) for name in (*CHOICES, "auto")},
        "merge with autograd, then F.linear": lambda: whole(_merge_and_linear),
        PYTORCH: lambda: whole(pmkernels.pareto_linear, strategy="eager"),
    }
    truth = [dy.double() @ case.exact, *case.reduced(dy.double().t() @ x.double())]
    least = layer_case.total(costs.bound(operation, problem) for operation in OPERATIONS.values())
    yield from bench.measure("forward and backward", variants, truth, least, exempt=(limit,))


def _replayed(variant: Variant, device: torch.device) -> Variant:
    """Return a variant as a CUDA graph of it."""
    warm_up(variant, device)
    graph, results = capture(variant, device)

    def run() -> Sequence[Tensor]:
        graph.replay()
        return results

    return run


def _beside(bench: Bench, case: Case, least: Bound) -> Iterator[LayerRow]:
    """Measure whether merging the next layer hides behind this layer's product. Running ahead gains that at most."""
    x, bias, merged, side = case.x, case.bias, case.merged, torch.cuda.Stream()
    out = torch.empty_like(merged)
    merge = functools.partial(pmkernels.merge_weight, **case.parts, out=out, strategy="fused")

    def beside() -> list[Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            merge()
        y = F.linear(x, merged, bias)
        torch.cuda.current_stream().wait_stream(side)
        return [y, out]

    limit = "limit: the product alone"
    variants: dict[str, Variant] = {
        limit: _replayed(lambda: [F.linear(x, merged, bias)], x.device),
        # from a graph, or Python's launches would be all that is seen
        "one after the other": _replayed(lambda: [merge(), F.linear(x, merged, bias)][::-1], x.device),
        "beside each other, on two streams": _replayed(beside, x.device),
        PYTORCH: lambda: [F.linear(x, merged, bias), reference.merge_weight(**case.parts)],
    }
    truth = [F.linear(x.double(), case.exact, bias.double()), case.exact]
    yield from bench.measure("product, and the merge of the next layer", variants, truth, least, exempt=(limit,))


def per_item_rows(layer: Layer, dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """Measure one preference per item of the batch, λ folded: what a server does."""
    values = layer_case.make_served(layer, TASKS, RANK, dtype, device)
    weight, A, G, B, gamma, x, bias = (values[name] for name in ("weight", "A", "G", "B", "gamma", "x", "bias"))
    low, up = B.to(dtype), A.to(dtype).t()
    cores = reference.preference_core(G, gamma.squeeze(1))

    def merged(g: Tensor) -> Tensor:
        return reference.merge_weight(weight, A=A, G=G, B=B, gamma=g)

    def one_by_one() -> list[Tensor]:
        return [torch.stack([F.linear(item, merged(g), bias) for item, g in zip(x, gamma.squeeze(1), strict=True)])]

    copies = torch.stack([merged(g) for g in gamma.squeeze(1)])

    def loop_of_adapters() -> list[Tensor]:
        y = F.linear(x, weight, bias)
        for index in range(layer.items):
            y[index] += x[index] @ low @ cores[index].t().to(dtype) @ up
        return [y]

    def kernel(strategy: str) -> Variant:
        return lambda: [pmkernels.pareto_linear(**values, strategy=strategy)]

    variants: dict[str, Variant] = {
        LIMIT: lambda: [F.linear(x, weight, bias)],
        **{name: kernel(name) for name in (*CHOICES, "auto")},
        "merge again for each request": one_by_one,
        "batched product over merged copies": lambda: [torch.bmm(x, copies.transpose(1, 2)) + bias],
        "loop over the preferences' adapters": loop_of_adapters,
        PYTORCH: lambda: [reference.pareto_linear(**values)],
    }
    truth = [reference.pareto_linear(**{name: v.double() for name, v in values.items()})]
    least = costs.bound("forward", Problem(layer.rows, layer.n, layer.d, 0, RANK, precision_kind(dtype)), cached=True)
    bench = Bench(layer.name, dtype, layer.rows, device, rates)
    yield from bench.measure(f"forward, {layer.items} preferences", variants, truth, least)


def entropy_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """Measure softmax_entropy, forward and backward."""
    logits = (3 * torch.randn(*shape, device=device)).to(dtype)
    grad = torch.randn(shape[0], device=device)

    def variant(function: Callable[[Tensor], Tensor], like: Tensor = logits) -> Variant:
        return lambda: layer_case.with_gradient(function, like, grad)

    variants = {
        "fused": variant(lambda z: pmkernels.softmax_entropy(z, strategy="fused")),
        PYTORCH: variant(reference.softmax_entropy),
    }
    truth = variant(reference.softmax_entropy, logits.double())()
    bench = Bench(f"{shape[0]} rows of {shape[1]} classes", dtype, shape[0], device, rates)
    least = Bound(0.0, 3.0 * logits.numel() * logits.element_size())
    yield from bench.measure("softmax entropy, forward and backward", variants, truth, least)


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """Return all rows; ``save`` gets the report after each. ``quick``: tiny shapes, to prove that it runs."""
    device = suite_device("kernels", quick)
    rates = ceilings(device, quick)
    report: dict[str, Any] = {"tasks": TASKS, "rank": RANK, "ceilings": rates, "rows": []}
    for row in _rows(quick, device, rates):
        report["rows"].append(asdict(row))
        save(report)
    return report


def _rows(quick: bool, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    layers, logits = (TINY_LAYERS[:1], TINY_LOGITS) if quick else (LAYERS, LOGITS)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    # the interpreter cuts bfloat16 off where a GPU rounds
    for dtype in dtypes if device.type == "cuda" else dtypes[1:]:
        for layer in layers if dtype == torch.bfloat16 else layers[2:3] or layers:
            print(f"{layer.name}, {dtype_name(dtype)}", flush=True)
            yield from layer_rows(layer, dtype, device, rates)
            if layer.items > 1:
                yield from per_item_rows(layer, dtype, device, rates)
        for shape in logits if dtype == torch.bfloat16 else logits[-1:]:
            yield from entropy_rows(shape, dtype, device, rates)


def markdown(report: dict[str, Any]) -> str:
    """Return a table per operation: milliseconds, over the row's limit, and the bound's share."""
    rates = report["ceilings"]
    lines = [
        f"One layer, K = {report['tasks']}, r = {report['rank']}; median of one run, cold L2 cache. Ceilings measured "
        f"in the same run: copy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 {rates['bfloat16'] / 1e12:.0f} TFLOP/s."
    ]
    columns = ["layer", "type", "variant", "ms", "to the limit", "of the bound"]
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        group = [row for row in report["rows"] if row["op"] == op]
        # of several limits the first
        of_limits = [row for row in group if row["variant"].startswith("limit")][::-1]
        limits = {(row["layer"], row["dtype"]): row["ms"] for row in of_limits}
        cells = [_cells(row, limits.get((row["layer"], row["dtype"]))) for row in group]
        lines += ["", f"**{op}**", "", *table(columns, cells, "lllr")]
    return "\n".join(lines) + "\n"


def _cells(row: Json, limit: float | None) -> list[str]:
    about = [row["layer"], row["dtype"], row["variant"]]
    if row["ms"] is None:
        return [*about, why_not(row), "", ""]
    ratio = f"{row['ms'] / limit:.2f}×" if limit else ""
    return [*about, f"{row['ms']:.4f}", ratio, f"{row['bound_ms'] / row['ms']:.0%}"]
