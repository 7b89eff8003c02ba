"""The kernels suite: each operation of one layer beside the library's own product and the strong baselines, on one GPU.

Everything is measured side by side in one run, on the same inputs, with a cold L2 cache; a time is reported only if the
outputs matched float64 in that run. The limit of every row is ``F.linear`` (or the plain product) on a weight merged
beforehand: what a layer costs that is not a Pareto layer. Bounds count operations and bytes against ceilings measured
in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks.common.ceilings import ceilings
from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import LIMIT, Variant
from benchmarks.common.rows import Json, LayerRow, dtype_name
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import timed
from benchmarks.common.towers import RANK, TASKS, TINY_LAYERS, Layer
from pmkernels import linear, reference
from pmkernels.graphs import capture, warm_up

LAYERS = (
    Layer("ViT-B/32 in-projection", 2304, 768, 32, 50),
    Layer("ViT-B/32 out-projection", 768, 768, 32, 50),
    Layer("ViT-L/14 in-projection", 3072, 1024, 32, 257),
    Layer("ViT-L/14 out-projection", 1024, 1024, 32, 257),
    Layer("ViT-B/32 in-projection, one image", 2304, 768, 1, 50),
    Layer("ViT-L/14 in-projection, one image", 3072, 1024, 1, 257),
)
LOGITS = ((256, 10), (256, 1000), (8192, 1000), (1024, 50257))
TINY_LOGITS = ((6, 10),)


def measure(
    op: str,
    layer: str,
    dtype: torch.dtype,
    rows: int,
    variants: dict[str, Variant],
    truth: Sequence[Tensor],
    device: torch.device,
    *,
    bound: tuple[float, float],
    rates: Json,
    exempt: Sequence[str] = (LIMIT,),
) -> Iterator[LayerRow]:
    """A row per variant. Errors are judged against ``plain``, PyTorch's own in this precision; ``exempt``: not judged.

    ``bound``: operations and bytes that cannot be avoided.
    """
    plain = relative_error(variants["PyTorch"](), truth)
    bound_ms = 1e3 * max(bound[0] / rates[dtype_name(dtype)], bound[1] / rates["copy"])
    for name, variant in variants.items():
        found = variant()
        error = relative_error(found, truth) if len(found) == len(truth) else 0.0
        row = LayerRow(op=op, layer=layer, dtype=dtype_name(dtype), variant=name, rows=rows, bound_ms=bound_ms)
        row.judge(0.0 if name in exempt else error, plain)
        if row.matched:
            row.note_times(timed(variant, device, warmup=25, repetitions=100, graph=False))
        yield row


def _arguments(layer: Layer, dtype: torch.dtype, device: torch.device, per_item: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0, into: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, into)

    width = layer.d**-0.5
    lead = (layer.items, 1) if per_item else ()
    return {
        "x": make(layer.items, layer.tokens, layer.d, into=dtype),
        "weight": make(layer.n, layer.d, scale=width, into=dtype),
        "task_vectors": make(TASKS, layer.n, layer.d, scale=0.1 * width, into=dtype),
        "lam": make(TASKS, scale=0.3),
        "A": make(layer.n, RANK),
        "G": make(RANK, RANK, TASKS, scale=0.1),
        "B": make(layer.d, RANK, scale=width),
        "gamma": torch.softmax(make(*lead, TASKS), dim=-1),
        "bias": make(layer.n, into=dtype),
    }


PARAMETERS = ("lam", "A", "G", "B")


def _gradients(
    values: dict[str, Tensor], names: Sequence[str], dy: Tensor, function: Callable[..., Tensor], **options: Any
) -> list[Tensor]:
    """The gradients of ``names`` by autograd through ``function``."""
    wanted = {name: v.detach().requires_grad_(name in names) for name, v in values.items()}
    y = function(**wanted, **options)
    return list(torch.autograd.grad(y, [wanted[name] for name in names], dy.to(y.dtype)))


def layer_rows(layer: Layer, dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """Forward, dx, the weight gradient, the low-rank gradient with a frozen λ, and the merge, at one preference."""
    values = _arguments(layer, dtype, device, per_item=False)
    x, weight, rows = values["x"], values["weight"], layer.items * layer.tokens
    flat = x.view(rows, layer.d)
    dy = torch.randn(layer.items, layer.tokens, layer.n, device=device).to(dtype)
    dy_rows = dy.view(rows, layer.n)
    parts = {name: v for name, v in values.items() if name not in ("x", "bias")}
    exact = {name: v.double() for name, v in values.items()}
    merged = reference.merge_weight(**parts)
    size = weight.element_size()
    operations = 2.0 * rows * layer.n * layer.d
    weights, activations = (TASKS + 1) * weight.numel() * size, rows * (layer.n + layer.d) * size
    common: dict[str, Any] = {"device": device, "rates": rates}
    inputs = [values.get(name) for name in linear.INPUTS]

    def forward(strategy: str) -> Variant:
        return lambda: [pmkernels.pareto_linear(**values, strategy=strategy)]

    yield from measure(
        "forward",
        layer.name,
        dtype,
        rows,
        {
            LIMIT: lambda: [F.linear(x, merged, values["bias"])],
            "fused": forward("fused"),
            "streamed": forward("streamed"),
            "auto": forward("auto"),
            "PyTorch": lambda: [reference.pareto_linear(**values)],
        },
        [reference.pareto_linear(**exact)],
        bound=(operations, weights + activations),
        **common,
    )

    def backward(needs: Sequence[bool], strategy: str) -> Variant:
        def run() -> list[Tensor]:
            found = linear.linear_backward_operator(dy, *inputs, list(needs), strategy)
            return [gradient for gradient, need in zip(found, needs, strict=True) if need]

        return run

    only_x = [True, *[False] * 6]
    yield from measure(
        "dx",
        layer.name,
        dtype,
        rows,
        {
            LIMIT: lambda: [dy @ merged],
            **{name: backward(only_x, name) for name in ("fused", "streamed", "auto")},
            "PyTorch": lambda: [dy @ reference.merge_weight(**parts)],
        },
        _gradients(exact, ("x",), dy.double(), reference.pareto_linear),
        bound=(operations, weights + activations),
        **common,
    )
    truth = _gradients(exact, PARAMETERS, dy.double(), reference.pareto_linear)
    yield from measure(
        "weight gradient",
        layer.name,
        dtype,
        rows,
        {
            "limit: dW alone": lambda: [dy_rows.t() @ flat],
            "fused": backward([False, True, True, True, True, False, False], "fused"),
            "PyTorch": lambda: _reduce(dy_rows.t() @ flat, parts),
        },
        truth,
        bound=(operations, TASKS * weight.numel() * size + activations),
        exempt=("limit: dW alone",),
        **common,
    )
    low_rank = ("A", "G", "B")
    yield from measure(
        "low-rank gradient, λ frozen",
        layer.name,
        dtype,
        rows,
        {
            "fused": backward([False, False, True, True, True, False, False], "fused"),
            "PyTorch": lambda: _gradients(values, low_rank, dy, pmkernels.pareto_linear, strategy="eager"),
        },
        truth[1:],
        bound=(8.0 * rows * RANK * (layer.n + layer.d), 2 * activations),
        **common,
    )
    out = torch.empty_like(weight)
    whole = functools.partial(_gradients, values, ("x", *PARAMETERS), dy)
    yield from measure(
        "merge",
        layer.name,
        dtype,
        rows,
        {
            "fused": lambda: [pmkernels.merge_weight(**parts, out=out, strategy="fused")],
            "PyTorch": lambda: [reference.merge_weight(**parts)],
        },
        [reference.merge_weight(**{name: v for name, v in exact.items() if name in parts})],
        bound=(0.0, weights + weight.numel() * size),
        **common,
    )
    if device.type == "cuda":
        yield from _beside(layer, values, parts, exact, merged, out, (operations, weights + activations), common)
    yield from measure(
        "forward and backward",
        layer.name,
        dtype,
        rows,
        {
            "limit: full dW, merged beforehand": lambda: [
                F.linear(x, merged, values["bias"]),
                dy @ merged,
                dy_rows.t() @ flat,
            ],
            **{
                name: functools.partial(whole, pmkernels.pareto_linear, strategy=name)
                for name in ("fused", "streamed", "auto")
            },
            "merge with autograd, then F.linear": lambda: whole(_merge_and_linear),
            "PyTorch": lambda: whole(pmkernels.pareto_linear, strategy="eager"),
        },
        _gradients(exact, ("x", *PARAMETERS), dy.double(), reference.pareto_linear),
        bound=(3 * operations, 3 * weights + 3 * activations),
        exempt=("limit: full dW, merged beforehand",),
        **common,
    )


def _replayed(variant: Variant, device: torch.device) -> Variant:
    """A variant as a CUDA graph of it."""
    warm_up(variant, device)
    graph, results = capture(variant, device)

    def run() -> Sequence[Tensor]:
        graph.replay()
        return results

    return run


def _beside(
    layer: Layer,
    values: dict[str, Tensor],
    parts: dict[str, Tensor],
    exact: dict[str, Tensor],
    merged: Tensor,
    out: Tensor,
    bound: tuple[float, float],
    common: dict[str, Any],
) -> Iterator[LayerRow]:
    """Whether merging the next layer hides behind this layer's product: what running ahead could gain at most."""
    x, bias, side = values["x"], values["bias"], torch.cuda.Stream()
    merge = functools.partial(pmkernels.merge_weight, **parts, out=out, strategy="fused")

    def beside() -> list[Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            merge()
        y = F.linear(x, merged, bias)
        torch.cuda.current_stream().wait_stream(side)
        return [y, out]

    yield from measure(
        "product, and the merge of the next layer",
        layer.name,
        x.dtype,
        layer.items * layer.tokens,
        {
            "limit: the product alone": _replayed(lambda: [F.linear(x, merged, bias)], x.device),
            # from a graph, or Python's launches would be all that is seen
            "one after the other": _replayed(lambda: [merge(), F.linear(x, merged, bias)][::-1], x.device),
            "beside each other, on two streams": _replayed(beside, x.device),
            "PyTorch": lambda: [F.linear(x, merged, bias), reference.merge_weight(**parts)],
        },
        [
            reference.pareto_linear(**exact),
            reference.merge_weight(**{name: v for name, v in exact.items() if name in parts}),
        ],
        bound=bound,
        exempt=("limit: the product alone",),
        **common,
    )


def _reduce(d_weight: Tensor, parts: dict[str, Tensor]) -> list[Tensor]:
    """dλ, dA, dG, dB from a dW in memory, in PyTorch."""
    d_weight = d_weight.float()
    A, B, G, gamma = (parts[name] for name in ("A", "B", "G", "gamma"))
    d_lam = torch.stack([torch.dot(tau.reshape(-1).float(), d_weight.reshape(-1)) for tau in parts["task_vectors"]])
    core = reference.preference_core(G, gamma)
    P = d_weight @ B
    return [d_lam, P @ core.t(), (A.t() @ P)[:, :, None] * gamma, d_weight.t() @ A @ core]


def _merge_and_linear(x: Tensor, bias: Tensor, **parts: Tensor) -> Tensor:
    """The strong baseline: the merged weight is a tensor of the graph, made once per step."""
    return F.linear(x, reference.merge_weight(**parts), bias)


def per_item_rows(layer: Layer, dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """One preference per item of the batch, λ folded: what a server does."""
    values = _arguments(layer, dtype, device, per_item=True)
    del values["task_vectors"], values["lam"]
    x, weight, bias, rows = values["x"], values["weight"], values["bias"], layer.items * layer.tokens
    A, G, B, gamma = (values[name] for name in ("A", "G", "B", "gamma"))
    low, up = B.to(dtype), A.to(dtype).t()
    cores = reference.preference_core(G, gamma.squeeze(1))
    copies = torch.stack([reference.merge_weight(weight, A=A, G=G, B=B, gamma=g) for g in gamma.squeeze(1)])

    def one_by_one() -> list[Tensor]:
        out = [
            F.linear(item, reference.merge_weight(weight, A=A, G=G, B=B, gamma=g), bias)
            for item, g in zip(x, gamma.squeeze(1), strict=True)
        ]
        return [torch.stack(out)]

    def loop_of_adapters() -> list[Tensor]:
        y = F.linear(x, weight, bias)
        for index in range(layer.items):
            y[index] += x[index] @ low @ cores[index].t().to(dtype) @ up
        return [y]

    def kernel(strategy: str) -> Variant:
        return lambda: [pmkernels.pareto_linear(**values, strategy=strategy)]

    size = weight.element_size()
    yield from measure(
        f"forward, {layer.items} preferences",
        layer.name,
        dtype,
        rows,
        {
            LIMIT: lambda: [F.linear(x, weight, bias)],
            **{name: kernel(name) for name in ("fused", "streamed", "auto")},
            "merge again for each request": one_by_one,
            "batched product over merged copies": lambda: [torch.bmm(x, copies.transpose(1, 2)) + bias],
            "loop over the preferences' adapters": loop_of_adapters,
            "PyTorch": lambda: [reference.pareto_linear(**values)],
        },
        [reference.pareto_linear(**{name: v.double() for name, v in values.items()})],
        device,
        bound=(2.0 * rows * layer.n * layer.d, weight.numel() * size + rows * (layer.n + layer.d) * size),
        rates=rates,
    )


def entropy_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rates: Json) -> Iterator[LayerRow]:
    """softmax_entropy, forward and backward."""
    logits = (3 * torch.randn(*shape, device=device)).to(dtype)
    grad = torch.randn(shape[0], device=device)

    def variant(function: Callable[[Tensor], Tensor], like: Tensor = logits) -> Variant:
        def run() -> list[Tensor]:
            z = like.detach().requires_grad_()
            entropy = function(z)
            return [entropy.detach(), torch.autograd.grad(entropy, z, grad.to(entropy.dtype))[0]]

        return run

    yield from measure(
        "softmax entropy, forward and backward",
        f"{shape[0]} rows of {shape[1]} classes",
        dtype,
        shape[0],
        {
            "fused": variant(lambda z: pmkernels.softmax_entropy(z, strategy="fused")),
            "PyTorch": variant(reference.softmax_entropy),
        },
        variant(reference.softmax_entropy, logits.double())(),
        device,
        bound=(0.0, 3.0 * logits.numel() * logits.element_size()),
        rates=rates,
    )


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """All rows. ``quick``: tiny shapes on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    if not quick and not torch.cuda.is_available():
        raise SystemExit("--suite kernels: expected a CUDA GPU, got none (--quick rehearses it on the CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """One table per operation: milliseconds, the ratio to the row's limit, and the share of the bound."""
    rates = report["ceilings"]
    lines = [
        f"One layer, K = {report['tasks']}, r = {report['rank']}; median of one run, cold L2 cache. Ceilings measured "
        f"in the same run: copy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 {rates['bfloat16'] / 1e12:.0f} TFLOP/s.",
    ]
    operations = list(dict.fromkeys(row["op"] for row in report["rows"]))
    for op in operations:
        lines += ["", f"**{op}**", "", "| layer | type | variant | ms | to the limit | of the bound |"]
        lines.append("|---|---|---|---:|---:|---:|")
        group = [row for row in report["rows"] if row["op"] == op]
        for row in group:
            limit = next(
                (
                    r["ms"]
                    for r in group
                    if (r["layer"], r["dtype"]) == (row["layer"], row["dtype"]) and r["variant"].startswith("limit")
                ),
                None,
            )
            if row["ms"] is None:
                figures = f"wrong: error {row['error']:.1e}, PyTorch {row['plain_error']:.1e} | |"
            else:
                ratio = f"{row['ms'] / limit:.2f}×" if limit else ""
                figures = f"{row['ms']:.4f} | {ratio} | {row['bound_ms'] / row['ms']:.0%}"
            lines.append(f"| {row['layer']} | {row['dtype']} | {row['variant']} | {figures} |")
    return "\n".join(lines) + "\n"
