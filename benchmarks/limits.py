"""``python -m benchmarks.limits``: write ``benchmarks/limits.md``, what each layer and each model costs at the least.

Operations and bytes are counted by :mod:`pmkernels.costs`; a bound is the larger of their two times at a GPU's rates,
a predicted time is the sum over the kernels that a strategy launches (:mod:`benchmarks.predictions`). Measured figures
are taken from the newest committed results file of that GPU and appear nowhere else: what has none says "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import predictions, results
from benchmarks.kernels import RANK, Layer
from benchmarks.predictions import BATCH as BATCH
from benchmarks.predictions import DEVICES, GROUPS, TASKS, Prediction, problem, rates_of
from benchmarks.predictions import KIND as KIND
from benchmarks.predictions import LANGUAGE_MODEL as LANGUAGE_MODEL
from benchmarks.predictions import TOWERS as TOWERS
from benchmarks.predictions import Tower as Tower
from benchmarks.predictions import has_low_rank as has_low_rank
from benchmarks.predictions import predicted as predicted
from pmkernels import costs, dispatch
from pmkernels.costs import Bound, Rates

PAGE = Path(__file__).parent / "limits.md"
# operation of pmkernels.costs -> as results files call it
OPERATIONS = {"forward": "forward", "dx": "dx", "weight_grad": "weight gradient", "merge": "merge"}
NOT_MEASURED = "not measured"
# optimiser steps of the published runs
STEPS = {2: 2000, 8: 4000}
# task vectors of the goals, and how far a predicted time may be off
GOAL_TASKS, UNCERTAINTY = 8, 0.25
GOAL_DEVICES = ("nvidia-h200", "nvidia-h100-80gb-hbm3")

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
    """Rows of the kernels suite and of the layer grid, its own suite or (before) the training suite's."""
    kernels = suites.get("kernels", {})
    for row in kernels.get("rows", ()):
        if kernels["rank"] == RANK:
            yield {**row, "tasks": kernels["tasks"]}
    for grid in (suites.get("training", {}).get("layers", {}), suites.get("layers", {})):
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
*predicted*, not measured**, and ±{UNCERTAINTY:.0%}; a bound is arithmetic, no kernel is faster at the rates below. What
was measured is named after its file; the rest says “{NOT_MEASURED}”. Two GPUs never stand in one table of times.

## Rates

A GPU does this much in a second at best, in 10¹² operations or bytes. *16-bit* is products on tensor cores, *float32*
other arithmetic, *memory* device memory and *L2* its cache; *launch* is what a kernel costs besides, in µs. Assumed
rates come from the vendor's figures, measured ones from a tuned configuration file."""
    columns = ["GPU", "16-bit", "float32", "memory", "L2", "launch", "rates"]
    return [introduction, *table(columns, rates), *_forms()]


def _forms() -> list[str]:
    introduction = """\
No kernel reaches all of them. Predictions take these shares of the tensor cores' rate and of the bytes per second, by
the form of a kernel, until a results file says what is reached. A kernel's operations and bytes overlap, kernels do
not."""
    rows = [
        [name, form.source, f"{form.product_efficiency:.0%}", f"{form.memory_efficiency:.0%}"]
        for name, form in costs.FORMS.items()
    ]
    more = """\
Every block of rows of a fused forward reads all of W0 and τ again through L2. A fused weight gradient has one program
on a multiprocessor at a time, and reduces its tile of dW after it has multiplied."""
    return [introduction, *table(["form", "where the shares come from", "products", "bytes"], rows, 2), more, ""]


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
    return [*lines, *_gradient_counts()]


def db_bytes(tower: Tower) -> float:
    """Add up the bytes of dy that db reads once more in a block and task, by the library's sum over rows."""
    gradients = (problem(layer, GOAL_TASKS, bias=True) for layer in tower.block_layers(BATCH))
    return sum(kernel.cache for p in gradients for kernel in costs.bias_sums(p, 0.0))


def _gradient_counts() -> list[str]:
    introduction = f"""\
### Counts: what a weight gradient moves besides its product

MB of a weight gradient through a dW in memory (*streamed*), K = {GOAL_TASKS}, {BATCH} images, beyond what its product
reads and writes. The reduction reads dW (from L2 where half of that has room for it) and every τ, and writes partial
sums of P, Q and dλ, which another launch reads. db = Σ dy reads dy once more, in a launch of its own. None of this is
part of a bound but τ."""
    rows = []
    for tower in TOWERS:
        cells = []
        for layer in tower.block_layers(BATCH):
            p = problem(layer, GOAL_TASKS, bias=True)
            tiles = dispatch.lookup("default", "merge_grad", KIND, 1, p.rank, True)
            partial = p.partials(tiles.block_n, tiles.block_d)
            cells.append([p.weight, p.tasks * p.weight, partial, partial, p.output])
            rows.append([_layer_name(layer), *(figure(value / 1e6) for value in cells[-1])])
        whole = [sum(column) for column in zip(*cells, strict=True)]
        assert whole[-1] == db_bytes(tower)
        rows.append([f"**{tower.name}, a block and task**", *(f"**{figure(value / 1e6)}**" for value in whole)])
    columns = ["layer", "dW read", "τ read", "partial sums written", "read again", "dy read again for db"]
    return [introduction, *table(columns, rows)]


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
            lines += _folded(f"**K = {tasks}**, µs", table(columns, rows, text=2), tasks < GOAL_TASKS)
    return lines


def _folded(title: str, lines: list[str], folded: bool) -> list[str]:
    """A table under its title, folded away where it is one of many."""
    if not folded:
        return [title, *lines]
    return ["<details>", f"<summary>{title.replace('**', '')}</summary>", *lines, "</details>", ""]


def served_line(layer: Layer, gpu: str) -> list[str]:
    """A folded layer at a preference per image, in µs: its bound and predictions beside those of the plain layer."""
    rates = rates_of(gpu)
    p = problem(layer, 0, per_row=True)
    bound = costs.served_seconds(p, rates.products(KIND), rates.memory)
    plain = costs.seconds(costs.passes("forward", "streamed", p, cached=True), rates, KIND)
    ways = {name: predicted("preference", name, p, gpu) for name in ("fused", "streamed")}
    cells = [f"*{figure(1e6 * seconds)}*" for seconds in (plain, *ways.values())]
    return [_layer_name(layer), figure(1e6 * bound), *cells, f"*{min(ways.values()) / plain:.2f}×*"]


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
        "A whole block and model, with attention and the rest of the network:",
        *table(
            ["model", "images", "*a served block over the plain*", "*a served model over the plain*"], _served(gpu), 1
        ),
    ]


def _served(gpu: str) -> list[list[str]]:
    ways = (predictions.block_kernels, predictions.forward_kernels)
    return [
        [tower.name, str(items), *(_over(*predictions.served_and_plain(way, tower, items, gpu), 3) for way in ways)]
        for tower in TOWERS
        for items in (1, BATCH)
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
            found = predictions.step(tower, tasks, gpu)
            steps = STEPS.get(tasks)
            run = f"{steps} steps: *{figure(steps * found.predicted['cached'].seconds)} s*" if steps else "–"
            rows.append(
                [
                    str(tasks),
                    figure(found.operations / 1e12),
                    figure(found.limit * 1e3),
                    figure(found.bound * 1e3),
                    f"{found.bound / found.limit:.3f}×",
                    f"*{figure(found.predicted_limit.seconds * 1e3)}*",
                    *(f"*{figure(way.seconds * 1e3)}*" for way in found.predicted.values()),
                    *(f"*{found.ratio(way):.2f}×*" for way in ("cached", "all at once")),
                    run,
                ]
            )
        columns = ["K", "TFLOP", "limit", "bound", "bound ÷ limit", "*limit*", "*cached*", "*all at once*"]
        columns += ["*streamed*", "*fused*", "*cached ÷ limit*", "*all at once ÷ limit*", "*run, cached*"]
        lines += [f"### {title}: a training step of {tower.name}, ms", *table(columns, rows, 0)]
        lines += _parts(tower, gpu, title)
    return lines


def _parts(tower: Tower, gpu: str, title: str) -> list[str]:
    """Where the milliseconds of a predicted step go."""
    kernels = [
        list(predictions.limit_kernels(tower, GOAL_TASKS, gpu)),
        *(list(predictions.step_kernels(tower, GOAL_TASKS, gpu, way)) for way in ("cached", "all at once")),
        list(predictions.once_kernels(tower, GOAL_TASKS, gpu)),
    ]
    ways = [predictions.prediction(each, gpu) for each in kernels]
    full = [predictions.prediction(predictions.at_full_rate(each), gpu).seconds for each in kernels]
    rows = [
        [part, *(f"*{figure(way.parts[part] * 1e3)}*" if part in way.parts else "–" for way in ways)]
        for part in predictions.PARTS
        if any(part in way.parts for way in ways)
    ]
    limit = ways[0]
    rows += [
        ["**all**", *(f"*{figure(way.seconds * 1e3)}*" for way in ways)],
        ["÷ limit", *(f"*{way.seconds / limit.seconds:.3f}×*" for way in ways)],
        [
            "÷ limit, products and attention alone",
            *(f"*{way.counted_alone / limit.counted_alone:.3f}×*" for way in ways),
        ],
        ["÷ limit, all at the memory's full rate", *(f"*{seconds / full[0]:.3f}×*" for seconds in full)],
        ["launches", *(f"{way.launches:,}" for way in ways)],
    ]
    columns = [
        f"{title}, {tower.name}, K = {GOAL_TASKS}, ms",
        "*limit*",
        "*cached*",
        "*all at once*",
        "*merged once, autograd*",
    ]
    return ["Of which:", *table(columns, rows)]


def _ratio(value: float, off: float, digits: int = 2) -> str:
    """Write a predicted ratio, and what it may be where it is so much more or less."""
    return f"*{value:.{digits}f}× ({value - off:.{digits}f}–{value + off:.{digits}f})*"


def _over(ours: Prediction, other: Prediction, digits: int = 2) -> str:
    """Write the ratio of two predictions; parts that are alike in both are off alike."""
    return _ratio(ours.seconds / other.seconds, UNCERTAINTY * ours.apart(other) / other.seconds, digits)


def _seconds(value: float) -> str:
    return f"*{figure(value)} s ({figure(value * (1 - UNCERTAINTY))}–{figure(value * (1 + UNCERTAINTY))})*"


def _extremes(values: Iterable[float]) -> tuple[float, float]:
    found = sorted(values)
    return found[0], found[-1]


def _share(least: float, most: float) -> str:
    return f"*{least:.0%}–{most:.0%} ({least / (1 + UNCERTAINTY):.0%}–{most / (1 - UNCERTAINTY):.0%})*"


def goal_lines(gpu: str) -> list[list[str]]:
    """Goal, what is to be reached, what is predicted on that GPU, and what that counts."""
    small, large = TOWERS
    steps = {tower.name: predictions.step(tower, GOAL_TASKS, gpu) for tower in TOWERS}
    in_a_step = (
        "products, attention, the rest of the network, merge, reduction, partial sums, db, own gradients of norms"
    )
    forward = "products, widening, attention and the rest of the network; no copies of images, no host"
    whole, block = (
        _over(*predictions.served_and_plain(kernels, large, BATCH, gpu), 3)
        for kernels in (predictions.forward_kernels, predictions.block_kernels)
    )
    lines = [
        [f"serving {large.name}, {BATCH} preferences ÷ one plain merged model", "≤ 1.03×", whole, forward],
        [f"a served block of {large.name} ÷ the plain block", "≤ 1.05×", block, "the same of one block"],
    ]
    for tower, way, aim in (
        (large, "cached", "≤ 1.05×"),
        (small, "cached", "≤ 1.15×"),
        (small, "all at once", "≤ 0.9×"),
        (large, "all at once", "–"),
    ):
        name = f"training step {tower.name}{', all tasks at once' if way != 'cached' else ''} ÷ limit"
        lines.append([name, aim, _over(steps[tower.name].predicted[way], steps[tower.name].predicted_limit), in_a_step])
    for tower in (large, small):
        once = predictions.prediction(predictions.once_kernels(tower, GOAL_TASKS, gpu), gpu)
        ratio = _over(steps[tower.name].predicted["cached"], once)
        counted = "as above; that one adds up K dW and reduces once, in PyTorch's own kernels; no host"
        lines.append([f"training step {tower.name} ÷ merged once with autograd", "< 1×", ratio, counted])
    for tower in (large, small):
        shares = _extremes(predictions.reduction_share(one, GOAL_TASKS, gpu) for one in tower.block_layers(BATCH))
        counted = (
            "dW and every τ once over bandwidth, over the reduction and its partial sums, smallest and largest layer"
        )
        lines.append([f"reduction of dW, layers of {tower.name}", "≥ 80 %", _share(*shares), counted])
    for tower in (large, small):
        for bias in (False, True):
            layers = tower.block_layers(BATCH)
            ratios = _extremes(predictions.weight_gradient_ratio(one, GOAL_TASKS, gpu, bias=bias) for one in layers)
            text = " to ".join(_ratio(value, UNCERTAINTY * abs(value - 1)) for value in ratios)
            counted = "dW, reduction, partial sums" + (" and db" if bias else "") + ", over dW and the bytes of τ"
            lines.append(
                [f"weight gradient, layers of {tower.name}{', with db' if bias else ''}", "≤ 1.15×", text, counted]
            )
    for tower, aim in ((small, "≤ 90 s"), (large, "≤ 1500 s")):
        seconds = STEPS[GOAL_TASKS] * steps[tower.name].predicted["cached"].seconds
        lines.append(
            [f"{STEPS[GOAL_TASKS]} steps, {tower.name}", aim, _seconds(seconds), "as a step; no images read, no host"]
        )
    ratio = _over(*predictions.served_and_plain(predictions.forward_kernels, large, 1, gpu))
    lines.append([f"one image of {large.name}, unseen preference ÷ plain model", "≤ 1.10×", ratio, forward])
    return lines


def _device_goals(gpu: str, title: str) -> list[str]:
    introduction = f"""\
### {title}: the goals, predicted

K = {GOAL_TASKS}, {BATCH} images unless said. Each figure in italics is **predicted** from counted kernels for this GPU
alone, none is measured. It is ±{UNCERTAINTY:.0%}, in brackets: of a ratio, ±{UNCERTAINTY:.0%} of what the parts of the
two differ by, because what is alike in both is off alike. Not predicted are the steps under 6 and 3.5 GiB, the
layer-wise AdaMerging computation, data-free runs, and how well `auto` chooses: they hang on what is not counted."""
    return [introduction, *table(["goal", "to reach", "*predicted*", "counted"], goal_lines(gpu), 4)]


def _models() -> list[str]:
    rows = [
        [tower.name, str(tasks), f"{tower.parameters / 1e6:.1f}", *(f"{held / 1e9:.2f}" for held in bytes_.values())]
        for tower in TOWERS
        for tasks in TASKS
        for bytes_ in [predictions.memory(tower, tasks)]
    ]
    introduction = f"""\
## Whole models: what is counted

A training step is the forward and backward of K tasks, {BATCH} images each, one task after the other.

- **Products with a merged weight**: the patch embedding (one row per patch, D = 3·patch²; no dx, as nothing before it
  learns), four projections per block (in 3E×E, out E×E, fc 4E×E, proj E×4E) and the final projection of the class
  token ({BATCH} rows). Each has a forward, a dx and a weight gradient.
- **Attention itself**: QKᵀ and AV are 2·M·tokens·E operations each, twice that backward (recomputed scores are not
  counted). Bytes are those of flash attention: Q, K, V and the output, with their gradients backward.
- **The rest of the network**, in predictions alone and the same in the limit and in ours: two normalisations, one
  activation, two residual sums of a block, their backwards, and the gradients of q, k and v joined.
- **Ours besides**: W(γ) merged once a step; of every weight gradient the reduction of dW against τ, A and B, its
  partial sums written and read again, and **db, which reads dy once more** ({db_bytes(TOWERS[1]) / 1e6:.1f} MB a block
  and task of {TOWERS[1].name}); the gradients of the normalisations' own weights and biases, which the limit has not.
- **Not counted**: embeddings, the first and last normalisation, heads, entropies, all biases and norms merged and their
  dλ (a launch a step, two a task), the tensor norm, a task's gradient put into one row, the optimiser, images, Python.
- **limit**: the same network with weights merged beforehand and frozen, plus a full weight-gradient product per layer,
  in one graph: the sum of bounds of products and attention; *in italics* what is predicted of it, launches and the
  rest of the network with it.
- **bound**: ours at the least, products and attention alone. W(γ) is assembled once per step and kept, and every task's
  weight gradient reads K task vectors where the limit writes one dW.
- ***cached***, ***streamed***, ***fused***: predicted. *cached* assembles once per step, *streamed* for every forward
  and dx, *fused* inside every product. The first two take the weight gradient that `auto` takes, *fused* its own.
- ***all at once***: as *cached*, with `tasks_at_once: all`: products of K times the rows and one weight gradient for
  all tasks, which reads the task vectors once, at the activations of K tasks. The limit stays that of task by task.
- ***merged once, autograd***: the baseline of two more models of memory. One product of λ with all τ merges, every
  task's dW is added in place, one product reduces them.
- ***run, cached***: a learning run of as many steps as were published for so many tasks: what a step counts, alone.

Memory of weights during a step, in GB (10⁹ bytes). Activations, the learned parameters and the optimiser's state come
on top."""
    return [introduction, *table(["model", "K", "million parameters", "cached", "streamed", "fused"], rows)]


COLUMNS = """\
- **bound** and **by**: no kernel is faster at these rates, because of its operations or because of its bytes.
- ***fused***, ***streamed***: predicted, without db. *fused* assembles W(γ) inside the product (weight gradient: dW
  stays in registers); *streamed* goes through a scratch tensor (W(γ), or dW) and the library's product.
- **measured**: the fastest measured strategy, its name, and its ratio to the bound.
- **cached**: bound, prediction and measurement where W(γ) was assembled before and is only read."""


def page() -> str:
    """The whole page."""
    lines = [*_introduction(), *_models()]
    for gpu, (title, _) in DEVICES.items():
        lines += [f"## {title}: goals and steps", ""]
        lines += _device_goals(gpu, title) if gpu in GOAL_DEVICES else []
        lines += _device_models(gpu, title)
    lines += _counts()
    for gpu, (title, _) in DEVICES.items():
        figures, sources = measured(gpu)
        names = ", ".join(f"[`{name}`](results/{name})" for name in sources)
        lines += [
            f"## {title}: layers",
            "",
            f"Measured: {names or 'nothing yet on this GPU'}.",
            "",
            COLUMNS,
            "",
            *_device_layers(gpu, title, figures),
            *_device_served(gpu, title),
        ]
    lines += ["## Compiled kernels", ""]
    for arch in dict.fromkeys(arch for _, arch in DEVICES.values()):
        lines += _device_compiled(arch)
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
