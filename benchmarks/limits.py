"""``python -m benchmarks.limits``: write ``benchmarks/limits.md``, what each layer and each model costs at the least.

Operations and bytes are counted by :mod:`pmkernels.costs`; a bound is the larger of their two times at a GPU's rates,
a predicted time is the sum over the kernels that a strategy launches. Measured figures are taken from the newest
committed results file of that GPU and appear nowhere else: what has none says "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.kernels import RANK, Layer
from pmkernels import costs, dispatch
from pmkernels.costs import Bound, Pass, Problem, Rates

PAGE = Path(__file__).parent / "limits.md"
KIND = "16-bit"
TASKS = (2, 4, 8)
BATCH = 32
# name of a configuration file -> title, architecture
DEVICES = {"nvidia-h200": ("NVIDIA H200", "sm_90"), "nvidia-rtx-a6000": ("NVIDIA RTX A6000", "sm_86")}
# operation of pmkernels.costs -> as results files call it
OPERATIONS = {"forward": "forward", "dx": "dx", "weight_grad": "weight gradient", "merge": "merge"}
NOT_MEASURED = "not measured"
# optimiser steps of the published runs
STEPS = {2: 2000, 8: 4000}


@dataclass(frozen=True)
class Tower:
    """A vision transformer: MLPs of four widths, ``tokens`` with the class token, patches of ``patch``² pixels."""

    name: str
    width: int
    blocks: int
    tokens: int
    patch: int
    output: int

    def block_layers(self, items: int) -> tuple[Layer, ...]:
        """The four projections of a block, for that many images."""
        shapes = (("in-projection", 3, 1), ("out-projection", 1, 1), ("MLP fc", 4, 1), ("MLP proj", 1, 4))
        width = self.width
        return tuple(Layer(f"{self.name} {name}", n * width, d * width, items, self.tokens) for name, n, d in shapes)

    @property
    def parameters(self) -> int:
        """Of the whole tower: products, biases, normalisations and embeddings."""
        width = self.width
        ends = width * (3 * self.patch**2 + 1 + self.tokens + 4 + self.output)
        return self.blocks * (12 * width**2 + 13 * width) + ends


TOWERS = (Tower("ViT-B/32", 768, 12, 50, 32, 512), Tower("ViT-L/14", 1024, 24, 257, 14, 768))
LANGUAGE_MODEL = tuple(Layer("7B projection", 4096, 4096, 1, rows) for rows in (1, 16, 128, 512, 2048, 8192))
GROUPS: dict[str, tuple[Layer, ...]] = {
    **{f"{tower.name}, {BATCH} images": tower.block_layers(BATCH) for tower in TOWERS},
    "One image": tuple(layer for tower in TOWERS for layer in tower.block_layers(1)),
    "A 4096×4096 projection of a 7B language model": LANGUAGE_MODEL,
}


def has_low_rank(layer: str) -> bool:
    """Whether A·C(γ)·Bᵀ is part of the layer: attention's projections; the language model's is taken as one."""
    return "MLP" not in layer


def problem(layer: Layer, tasks: int) -> Problem:
    """``layer`` as :mod:`pmkernels.costs` counts it."""
    rank = RANK if has_low_rank(layer.name) else 0
    return Problem(layer.items * layer.tokens, layer.n, layer.d, tasks, rank, KIND)


def configuration_file(gpu: str) -> str:
    """The configuration file that a GPU of that name would take: its own, its architecture's, or the default one."""
    arch = DEVICES[gpu][1] if gpu in DEVICES else ""
    files = dispatch.config_files()
    return next((name for name in (gpu, arch) if name in files), "default")


def rates_of(gpu: str) -> Rates:
    """The rates of a GPU of :data:`pmkernels.costs.GPUS`, measured ones where its configuration file has them."""
    return replace(costs.GPUS[gpu], **dispatch.read_rates(dispatch.config_files()[configuration_file(gpu)]))


def predicted(
    operation: str,
    strategy: str,
    counted: Problem,
    gpu: str,
    *,
    cached: bool = False,
    configuration: str | None = None,
) -> float:
    """Seconds that ``strategy`` should take on a GPU of :data:`pmkernels.costs.GPUS`, with the tiles of its kernel.

    ``configuration``: the file that they are read from, instead of the one that a GPU of :data:`DEVICES` takes.
    """
    name = configuration or configuration_file(gpu)
    return dispatch.predicted_seconds(name, rates_of(gpu), operation, strategy, counted, cached=cached)


# (layer, rows, operation, tasks) -> variant -> milliseconds
Figures = dict[tuple[str, int, str, int], dict[str, float]]


def _reports() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Committed results, oldest first; a rehearsal is nobody's result."""
    found = []
    for path in sorted(results.RESULTS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report.get("quick"):
            found.append((report.get("date", ""), path, report))
    yield from ((path, report) for _, path, report in sorted(found, key=lambda item: item[:2]))


def file_name(gpu: str) -> str:
    """A GPU's name as configuration files spell it: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _layer_rows(suites: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Rows of the kernels suite and of the training suite's layer grid, where a report has them."""
    kernels = suites.get("kernels", {})
    for row in kernels.get("rows", ()):
        if kernels["rank"] == RANK:
            yield {**row, "tasks": kernels["tasks"]}
    grid = suites.get("training", {}).get("layers", {})
    if grid.get("rank") == RANK:
        yield from grid.get("rows", ())


def measured(gpu: str) -> tuple[Figures, list[str]]:
    """The newest committed milliseconds of our variants on that GPU, bfloat16, and the files they come from."""
    figures: Figures = {}
    sources: dict[tuple[str, int, str, int], str] = {}
    for path, report in _reports():
        where = report.get("environment", {}).get("gpu")
        if not where or file_name(where) != gpu:
            continue
        mine: Figures = {}
        for row in _layer_rows(report.get("suites", {})):
            if row["ms"] is None or row["dtype"] != "bfloat16":
                continue
            if row["variant"] in ("fused", "streamed", "auto", "cached"):
                rows = 0 if row["op"] == "merge" else row["rows"]
                key = (row["layer"].removesuffix(", one image"), rows, row["op"], row["tasks"])
                mine.setdefault(key, {})[row["variant"]] = row["ms"]
        figures |= mine
        sources |= dict.fromkeys(mine, path.name)
    return figures, sorted(set(sources.values()))


def compiled(arch: str) -> tuple[Path, list[dict[str, Any]]] | None:
    """The newest committed budget file that has the architecture, and its 16-bit rows of the three main kernels."""
    newest = None
    for path, report in _reports():
        if report.get("suite") == "budget":
            rows = [row for row in report["rows"] if row["arch"] == arch and row["dtype"] == "bfloat16"]
            rows = [row for row in rows if row["kernel"] in ("linear_fwd_kernel", "weight_grad_kernel", "merge_kernel")]
            newest = (path, rows) if rows else newest
    return newest


@dataclass(frozen=True)
class Product:
    """A product of a step and how often it comes: ``dx`` is false where nothing before it learns."""

    problem: Problem
    times: int
    dx: bool = True


def products(tower: Tower, tasks: int) -> list[Product]:
    """Every product with a merged weight in one task's forward: patch embedding, blocks, final projection."""
    patches = Problem(BATCH * (tower.tokens - 1), tower.width, 3 * tower.patch**2, tasks, 0, KIND)
    final = Problem(BATCH, tower.output, tower.width, tasks, 0, KIND)
    blocks = [Product(problem(layer, tasks), tower.blocks) for layer in tower.block_layers(BATCH)]
    return [Product(patches, 1, dx=False), *blocks, Product(final, 1)]


def attention(tower: Tower) -> list[Pass]:
    """QKᵀ and AV of all blocks for one task, forward and backward, as flash attention moves bytes.

    Forward: two products; Q, K, V read, the output written. Backward: four products (the recomputed scores are not
    counted); Q, K, V, output and its gradient read, three gradients written.
    """
    rows = BATCH * tower.tokens
    product, tensor = 2.0 * rows * tower.tokens * tower.width, 2.0 * rows * tower.width
    forward = Pass("attention", products=2 * product, memory=4 * tensor)
    backward = Pass("attention backward", products=4 * product, memory=8 * tensor)
    return [forward, backward] * tower.blocks


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step (all tasks, forward and backward), and its operations."""

    operations: float
    limit: float
    bound: float
    predicted_limit: float
    predicted: dict[str, float]


def step(tower: Tower, tasks: int, gpu: str) -> Step:
    """The limit, the bound and the predictions of a training step of ``tasks`` tasks on ``gpu``."""
    rates = rates_of(gpu)
    scores = attention(tower)
    operations = tasks * sum(kernel.products for kernel in scores)
    attended = tasks * sum(Bound(k.products, k.memory).seconds(rates, KIND) for k in scores)
    limit = bound = attended
    ideal = cached = streamed = fused = tasks * costs.seconds(scores, rates, KIND)
    together = [replace(k, products=tasks * k.products, memory=tasks * k.memory) for k in scores]
    at_once = costs.seconds(together, rates, KIND)
    for product in products(tower, tasks):
        p, times = product.problem, product.times
        # forward, dx and dW on a merged weight read or write the same: one weight, x and y
        plain = costs.bound("forward", p, cached=True)
        one = plain.seconds(rates, KIND)
        gemm = costs.seconds(costs.passes("forward", "streamed", p, cached=True), rates, KIND)
        with_weight = 2 if product.dx else 1
        operations += tasks * times * (with_weight + 1) * plain.operations
        limit += tasks * times * (with_weight + 1) * one
        gradient = costs.bound("weight_grad", p).seconds(rates, KIND)
        bound += times * (costs.bound("merge", p).seconds(rates, KIND) + tasks * (with_weight * one + gradient))
        ideal += tasks * times * (with_weight + 1) * gemm
        gradient = min(predicted("weight_grad", name, p, gpu) for name in ("fused", "streamed"))
        merge = predicted("merge", "streamed", p, gpu)
        cached += times * (merge + tasks * (with_weight * gemm + gradient))
        whole = replace(p, rows=tasks * p.rows)
        products_of_all = costs.seconds(costs.passes("forward", "streamed", whole, cached=True), rates, KIND)
        gradient_of_all = min(predicted("weight_grad", name, whole, gpu) for name in ("fused", "streamed"))
        at_once += times * (merge + with_weight * products_of_all + gradient_of_all)
        for_x = ("forward", "dx") if product.dx else ("forward",)
        streamed += tasks * times * (sum(predicted(op, "streamed", p, gpu) for op in for_x) + gradient)
        fused += (
            tasks
            * times
            * (sum(predicted(op, "fused", p, gpu) for op in for_x) + predicted("weight_grad", "fused", p, gpu))
        )
    found = {"cached": cached, "all at once": at_once, "streamed": streamed, "fused": fused}
    return Step(operations, limit, bound, ideal, found)


def memory(tower: Tower, tasks: int) -> dict[str, float]:
    """Bytes of weights that a step holds by strategy: W0, K task vectors, and what is merged."""
    held = 2.0 * (tasks + 1) * tower.parameters
    largest = 2.0 * max(p.problem.n * p.problem.d for p in products(tower, tasks))
    return {"cached": held + 2.0 * tower.parameters, "streamed": held + largest, "fused": held}


def figure(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """A markdown table whose first ``text`` columns are words and the others figures."""
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * text + "---:|" * (len(columns) - text)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _layer_name(layer: Layer) -> str:
    rows = layer.items * layer.tokens
    return f"{layer.name}, {rows} {'row' if rows == 1 else 'rows'}"


def _lines(layers: Sequence[Layer]) -> Iterator[tuple[Layer, str]]:
    """Layer and operation of each line of a table; a merge does not depend on rows and comes once a shape."""
    merged = set()
    for layer in layers:
        for operation in OPERATIONS:
            if operation == "merge":
                if (layer.name, layer.n, layer.d) in merged:
                    continue
                merged.add((layer.name, layer.n, layer.d))
            yield layer, operation


def _introduction() -> list[str]:
    block_m = {d: dispatch.lookup(configuration_file(d), "linear", KIND, 8192, RANK, True).block_m for d in DEVICES}
    tiles = sorted(set(block_m.values()))
    rates = [
        [
            f"{title} ({arch})",
            figure(rates_of(name).half / 1e12),
            figure(rates_of(name).float32 / 1e12),
            f"{rates_of(name).memory / 1e12:.3g}",
            f"{rates_of(name).cache / 1e12:.3g}",
            figure(rates_of(name).launch * 1e6),
            "measured" if rates_of(name).measured else "assumed",
        ]
        for name, (title, arch) in DEVICES.items()
    ]
    introduction = f"""\
# Limits: what a layer and a model cost at the least

Generated by `python -m benchmarks.limits` (`--check` compares) from the counts in
[`pmkernels/costs.py`](../pmkernels/costs.py), the launch configurations in `pmkernels/configs` and the files in
[`results`](results). Do not edit.

Everything is bfloat16 with r = {RANK} on attention's projections and λ on every tensor. **A time in italics is
*predicted*, not measured**, and a bound is arithmetic. What was measured is named after its file; the rest says
“{NOT_MEASURED}”.

## Rates

A GPU does this much in a second at best, in 10¹² operations or bytes. *16-bit* is products on tensor cores, *float32*
other arithmetic, *memory* device memory and *L2* its cache; *launch* is what a kernel costs besides, in µs. Assumed
rates come from the vendor's figures, measured ones from a tuned configuration file."""
    assumed = f"""\
Predictions assume besides that our products of tiles reach {costs.KERNEL_EFFICIENCY:.0%} of the tensor cores' rate and
the library's all of it, that every block of {" or ".join(map(str, tiles))} rows reads all of W0 and τ again through L2,
and that a kernel's operations and bytes overlap."""
    columns = ["GPU", "16-bit", "float32", "memory", "L2", "launch", "rates"]
    return [introduction, *table(columns, rates), assumed, ""]


def _counts() -> list[str]:
    introduction = """\
## Counted: operations and bytes of a layer

- **GFLOP**: operations of the product, 2·M·N·D; assembling W(γ) is not counted, so a merge has none.
- **MB, K = …**: each input read once and each output written once: W0 and K task vectors, x and y. The weight gradient
  reads the task vectors, x and dy; the gradients of λ, A, B and G that it writes are too small to count.
- **MB, cached**: the same where W(γ) is there already, from earlier in the step."""
    lines = [introduction, ""]
    for group, layers in GROUPS.items():
        rows = []
        for layer, operation in _lines(layers):
            if operation == "dx":
                continue
            counted = [costs.bound(operation, problem(layer, tasks)) for tasks in TASKS]
            cached = costs.bound(operation, problem(layer, TASKS[0]), cached=True)
            product = operation == "forward"
            rows.append(
                [
                    _layer_name(layer) if operation != "merge" else layer.name,
                    f"{layer.n}×{layer.d}",
                    "forward; dx" if product else OPERATIONS[operation],
                    figure(counted[0].operations / 1e9) if counted[0].operations else "–",
                    *(figure(bound.bytes / 1e6) for bound in counted),
                    figure(cached.bytes / 1e6) if product else "–",
                ]
            )
        columns = ["layer", "N×D", "operation", "GFLOP", *(f"MB, K = {tasks}" for tasks in TASKS), "MB, cached"]
        lines += [f"### Counts: {group}", *table(columns, rows, text=3)]
    return lines


def _bound_of(bound: Bound, rates: Rates) -> tuple[str, str]:
    by_operations = bound.operations / rates.products(KIND) >= bound.bytes / rates.memory
    return figure(bound.seconds(rates, KIND) * 1e6), "operations" if by_operations else "bytes"


def layer_line(layer: Layer, operation: str, tasks: int, gpu: str, figures: Figures) -> list[str]:
    """One line of a GPU's table."""
    rates, counted = rates_of(gpu), problem(layer, tasks)
    bound = costs.bound(operation, counted)
    micro, which = _bound_of(bound, rates)
    rows = 0 if operation == "merge" else counted.rows
    found = figures.get((layer.name, rows, OPERATIONS[operation], tasks), {})
    fused = "–" if operation == "merge" else f"*{figure(predicted(operation, 'fused', counted, gpu) * 1e6)}*"
    streamed = figure(predicted(operation, "streamed", counted, gpu) * 1e6)
    own = {name: ms for name, ms in found.items() if name != "cached"}
    cells = [
        _layer_name(layer) if operation != "merge" else layer.name,
        OPERATIONS[operation],
        micro,
        which,
        fused,
        f"*{streamed}*",
        _measured_cell(own, bound.seconds(rates, KIND)),
    ]
    if operation not in ("forward", "dx"):
        return [*cells, "–", "–", "–"]
    cached = costs.bound(operation, counted, cached=True)
    cached_seconds = predicted(operation, "streamed", counted, gpu, cached=True)
    cached_found = {name: ms for name, ms in found.items() if name == "cached"}
    return [
        *cells,
        " ".join(_bound_of(cached, rates)),
        f"*{figure(cached_seconds * 1e6)}*",
        _measured_cell(cached_found, cached.seconds(rates, KIND)),
    ]


def _measured_cell(found: dict[str, float], bound: float) -> str:
    """The fastest variant's µs, its name, and the ratio to the bound."""
    if not found:
        return NOT_MEASURED
    name = min(found, key=lambda variant: found[variant])
    return f"{figure(found[name] * 1e3)} {name}, {found[name] * 1e-3 / bound:.2f}×"


def _device_layers(gpu: str, title: str, figures: Figures) -> list[str]:
    lines = []
    for group, layers in GROUPS.items():
        lines += [f"### {title}: {group}", ""]
        for tasks in TASKS:
            rows = [
                layer_line(layer, operation, tasks, gpu, figures)
                for layer, operation in _lines(layers)
                if operation != "merge" or layer.items > 1 or layers is LANGUAGE_MODEL
            ]
            columns = ["layer", "operation", "bound", "by", "*fused*", "*streamed*", "measured"]
            columns += ["bound, cached", "*cached*", "measured, cached"]
            lines += [f"**K = {tasks}**, µs", *table(columns, rows, text=2)]
    return lines


def served_line(layer: Layer, gpu: str) -> list[str]:
    """A folded layer at a preference per image, in µs: its bound and predictions beside those of the plain layer."""
    rates = rates_of(gpu)
    p = replace(problem(layer, 0), per_row=True)
    bound = costs.served_seconds(p, rates.products(KIND), rates.memory)
    plain = costs.seconds(costs.passes("forward", "streamed", p, cached=True), rates, KIND)
    ways = {name: predicted("preference", name, p, gpu) for name in ("fused", "streamed")}
    cells = [figure(1e6 * seconds) for seconds in (bound, plain, *ways.values())]
    return [_layer_name(layer), *cells, f"{min(ways.values()) / plain:.2f}×"]


def _device_served(gpu: str, title: str) -> list[str]:
    """Of the layers with a low-rank term, one image and a batch of them."""
    served = [
        layer
        for tower in TOWERS
        for items in (1, BATCH)
        for layer in tower.block_layers(items)
        if has_low_rank(layer.name)
    ]
    columns = ["layer", "bound", "*plain*", "*fused*", "*streamed*", "*the faster over plain*"]
    return [
        f"### {title}: a preference per image, folded layers",
        "",
        "The bound counts x twice: Bᵀx comes before t·Aᵀ. Predicted: *plain*, a library's product with merged weights; "
        "*fused*, one kernel; *streamed*, a kernel that writes [x \\| t] and the library's product. µs",
        *table(columns, [served_line(layer, gpu) for layer in served]),
    ]


def _device_compiled(arch: str) -> list[str]:
    found = compiled(arch)
    lines = [f"### Compiled for {arch}", ""]
    if found is None:
        return [*lines, "No committed `budget-*.json` has this architecture.", ""]
    path, rows = found
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"].removesuffix("_kernel"), row["configuration"]), []).append(row)
    introduction = f"""\
Read from the machine code of the 16-bit kernels, without a GPU ([`{path.name}`](results/{path.name})): the worst of
each configuration's variants. *Occupancy* is the share of a multiprocessor's warps that its registers and shared memory
let in."""
    cells = [
        [
            kernel,
            configuration,
            str(max(row["registers"] for row in group)),
            f"{max(row['shared'] for row in group) / 1024:.1f}",
            str(max(row["spills"] for row in group)),
            f"{min(row['occupancy'] for row in group):.0%}",
        ]
        for (kernel, configuration), group in sorted(groups.items())
    ]
    return [
        *lines,
        introduction,
        *table(["kernel", "configuration", "registers", "shared KiB", "spills", "occupancy"], cells, 2),
    ]


def _device_models(gpu: str, title: str) -> list[str]:
    lines = []
    for tower in TOWERS:
        rows = []
        for tasks in TASKS:
            found = step(tower, tasks, gpu)
            steps = STEPS.get(tasks)
            run = f"{steps} steps: *{figure(steps * found.predicted['cached'])} s*" if steps else "–"
            rows.append(
                [
                    str(tasks),
                    figure(found.operations / 1e12),
                    figure(found.limit * 1e3),
                    figure(found.bound * 1e3),
                    f"{found.bound / found.limit:.3f}×",
                    f"*{figure(found.predicted_limit * 1e3)}*",
                    *(f"*{figure(seconds * 1e3)}*" for seconds in found.predicted.values()),
                    *(f"*{found.predicted[name] / found.predicted_limit:.2f}×*" for name in ("cached", "all at once")),
                    run,
                ]
            )
        columns = ["K", "TFLOP", "limit", "bound", "bound ÷ limit", "*limit*", "*cached*", "*all at once*"]
        columns += ["*streamed*", "*fused*", "*cached ÷ limit*", "*all at once ÷ limit*", "*run, cached*"]
        lines += [f"### {title}: a training step of {tower.name}, ms", *table(columns, rows, 0)]
    return lines


def _models() -> list[str]:
    rows = [
        [tower.name, str(tasks), f"{tower.parameters / 1e6:.1f}", *(f"{held / 1e9:.2f}" for held in bytes_.values())]
        for tower in TOWERS
        for tasks in TASKS
        for bytes_ in [memory(tower, tasks)]
    ]
    introduction = f"""\
## Whole models: what is counted

A training step is the forward and backward of K tasks, {BATCH} images each, one task after the other.

- **Products with a merged weight**: the patch embedding (one row per patch, D = 3·patch²; no dx, as nothing before it
  learns), four projections per block (in 3E×E, out E×E, fc 4E×E, proj E×4E) and the final projection of the class
  token ({BATCH} rows). Each has a forward, a dx and a weight gradient.
- **Attention itself**: QKᵀ and AV are 2·M·tokens·E operations each, twice that backward (recomputed scores are not
  counted). Bytes are those of flash attention: Q, K, V and the output, with their gradients backward.
- **Not counted**, neither in the limit nor in ours: normalisations, GELU, softmax, residuals, biases, heads, entropies,
  the optimiser, reading images. They take the same time in both, so the ratio to the limit of a true step is nearer to
  1, and a true run is longer.
- **limit**: the same network with weights merged beforehand and frozen, plus a full weight-gradient product per layer:
  the sum of bounds; *in italics* with launches.
- **bound**: ours at the least. W(γ) is assembled once per step and kept, and every task's weight gradient reads K task
  vectors where the limit writes one dW.
- ***cached***, ***streamed***, ***fused***: predicted. *cached* assembles once per step, *streamed* for every forward
  and dx, *fused* inside every product. The first two take the faster weight gradient, *fused* its own.
- ***all at once***: as *cached*, with `tasks_at_once: all`: products of K times the rows and one weight gradient for
  all tasks, which reads the task vectors once, at the activations of K tasks. The limit stays that of task by task.
- ***run, cached***: a learning run of as many steps as were published for so many tasks: counted products alone.

Memory of weights during a step, in GB (10⁹ bytes). Activations, the learned parameters and the optimiser's state come
on top."""
    return [introduction, *table(["model", "K", "million parameters", "cached", "streamed", "fused"], rows)]


COLUMNS = """\
- **bound** and **by**: no kernel is faster at these rates, because of its operations or because of its bytes.
- ***fused***, ***streamed***: predicted. *fused* assembles W(γ) inside the product (weight gradient: dW stays in
  registers); *streamed* goes through a scratch tensor (W(γ), or dW) and the library's product.
- **measured**: the fastest measured strategy, its name, and its ratio to the bound.
- **cached**: bound, prediction and measurement where W(γ) was assembled before and is only read."""


def page() -> str:
    """The whole page."""
    lines = [*_introduction(), *_counts(), *_models()]
    for gpu, (title, arch) in DEVICES.items():
        figures, sources = measured(gpu)
        names = ", ".join(f"[`{name}`](results/{name})" for name in sources)
        lines += [
            f"## {title}",
            "",
            f"Measured: {names or 'nothing yet on this GPU'}.",
            "",
            COLUMNS,
            "",
            *_device_models(gpu, title),
            *_device_layers(gpu, title, figures),
            *_device_served(gpu, title),
            *_device_compiled(arch),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="the file to write (default: benchmarks/limits.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file would change")
    chosen = parser.parse_args(arguments)
    text = page()
    if chosen.check:
        if chosen.out.exists() and chosen.out.read_text(encoding="utf-8") == text:
            return 0
        print(f"{chosen.out}: not what `python -m benchmarks.limits` writes now", file=sys.stderr)
        return 1
    chosen.out.write_text(text, encoding="utf-8")
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
