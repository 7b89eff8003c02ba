"""What each layer costs at the least, counted and on each GPU."""

import itertools
from collections.abc import Iterator, Sequence

from benchmarks.common.layer_case import NAMES
from benchmarks.common.towers import BATCH, KIND, LANGUAGE_MODEL, TOWERS, Layer, Tower
from benchmarks.limits import predictions
from benchmarks.limits.predictions import GOAL_TASKS, GROUPS, TASKS, figure, predicted, problem, rates_of, table
from pmkernels import costs, dispatch
from pmkernels.costs import Bound, Rates

NOT_MEASURED = "not measured"
# (layer, rows, operation, tasks) -> variant -> milliseconds
Figures = dict[tuple[str, int, str, int], dict[str, float]]


def _name(layer: Layer, operation: str = "") -> str:
    """Name a layer with its rows, which a merge does not have."""
    return layer.name if operation == "merge" else f"{layer.name}, {layer.rows} {'row' if layer.rows == 1 else 'rows'}"


def _lines(layers: Sequence[Layer]) -> Iterator[tuple[Layer, str]]:
    """Yield layer and operation of each line of a table. A merge does not depend on rows and comes once a shape."""
    first = {(layer.name, layer.n, layer.d): layer for layer in reversed(layers)}
    for layer, operation in itertools.product(layers, NAMES):
        if operation != "merge" or layer is first[layer.name, layer.n, layer.d]:
            yield layer, operation


def counts() -> list[str]:
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
            title, last = NAMES[operation], "–"
            if operation == "forward":
                title, last = "forward; dx", figure(cached.bytes / 1e6)
            billions = figure(counted[0].operations / 1e9) if counted[0].operations else "–"
            millions = (figure(bound.bytes / 1e6) for bound in counted)
            rows.append([_name(layer, operation), f"{layer.n}×{layer.d}", title, billions, *millions, last])
        columns = ["layer", "N×D", "operation", "GFLOP", *(f"MB, K = {tasks}" for tasks in TASKS), "MB, cached"]
        lines += [f"### Counts: {group}", *table(columns, rows, text=3)]
    return [*lines, *_gradient_counts()]


def db_bytes(tower: Tower) -> float:
    """Add up the bytes of dy that db reads again in a block and task. The library's sum over rows reads them."""
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
            rows.append([_name(layer), *(figure(value / 1e6) for value in cells[-1])])
        whole = [sum(column) for column in zip(*cells, strict=True)]
        assert whole[-1] == db_bytes(tower)
        rows.append([f"**{tower.name}, a block and task**", *(f"**{figure(value / 1e6)}**" for value in whole)])
    columns = ["layer", "dW read", "τ read", "partial sums written", "read again", "dy read again for db"]
    return [introduction, *table(columns, rows)]


def _bound_of(bound: Bound, rates: Rates) -> tuple[str, str]:
    by_operations = bound.operations / rates.products(KIND) >= bound.bytes / rates.memory
    return figure(bound.seconds(rates, KIND) * 1e6), "operations" if by_operations else "bytes"


def layer_line(layer: Layer, operation: str, tasks: int, gpu: str, figures: Figures) -> list[str]:
    """Return one line of a GPU's table."""
    rates, counted = rates_of(gpu), problem(layer, tasks)
    bound = costs.bound(operation, counted)
    times = figures.get((layer.name, 0 if operation == "merge" else counted.rows, NAMES[operation], tasks), {})
    fused = "–" if operation == "merge" else f"*{figure(predicted(operation, 'fused', counted, gpu) * 1e6)}*"
    streamed = f"*{figure(predicted(operation, 'streamed', counted, gpu) * 1e6)}*"
    own = {name: ms for name, ms in times.items() if name != "cached"}
    cells = [_name(layer, operation), NAMES[operation], *_bound_of(bound, rates), fused, streamed]
    cells.append(_measured_cell(own, bound.seconds(rates, KIND)))
    if operation not in ("forward", "dx"):
        return [*cells, "–", "–", "–"]
    cached = costs.bound(operation, counted, cached=True)
    micro = figure(predicted(operation, "streamed", counted, gpu, cached=True) * 1e6)
    measured = _measured_cell({k: ms for k, ms in times.items() if k not in own}, cached.seconds(rates, KIND))
    return [*cells, " ".join(_bound_of(cached, rates)), f"*{micro}*", measured]


def _measured_cell(times: dict[str, float], bound: float) -> str:
    """Return the fastest variant's µs, its name, and the ratio to the bound."""
    if not times:
        return NOT_MEASURED
    name = min(times, key=lambda variant: times[variant])
    return f"{figure(times[name] * 1e3)} {name}, {times[name] * 1e-3 / bound:.2f}×"


def device_layers(gpu: str, title: str, figures: Figures) -> list[str]:
    lines = []
    for group, layers in GROUPS.items():
        lines += [f"### {title}: {group}", ""]
        for tasks in TASKS:
            shown = [(a, b) for a, b in _lines(layers) if b != "merge" or a.items > 1 or layers is LANGUAGE_MODEL]
            rows = [layer_line(layer, operation, tasks, gpu, figures) for layer, operation in shown]
            columns = ["layer", "operation", "bound", "by", "*fused*", "*streamed*", "measured"]
            figures_of = table([*columns, "bound, cached", "*cached*", "measured, cached"], rows, text=2)
            if tasks == GOAL_TASKS:
                lines += [f"**K = {tasks}**, µs", *figures_of]
            else:
                # folded away: one of many
                lines += ["<details>", f"<summary>K = {tasks}, µs</summary>", *figures_of, "</details>", ""]
    return lines


def served_line(layer: Layer, gpu: str) -> list[str]:
    """Return a folded layer at a preference per image beside the plain layer, in µs."""
    rates = rates_of(gpu)
    p = problem(layer, 0, per_row=True)
    bound = costs.served_seconds(p, rates.products(KIND), rates.memory)
    plain = costs.seconds(costs.product(p), rates, KIND)
    ways = {name: predicted("preference", name, p, gpu) for name in ("fused", "streamed")}
    cells = [f"*{figure(1e6 * seconds)}*" for seconds in (plain, *ways.values())]
    return [_name(layer), figure(1e6 * bound), *cells, f"*{min(ways.values()) / plain:.2f}×*"]


def device_served(gpu: str, title: str) -> list[str]:
    """Return lines of the layers with a low-rank term, for one image and a batch."""
    served = [layer for tower in TOWERS for items in (1, BATCH) for layer in tower.block_layers(items) if layer.rank]
    columns = ["layer", "bound", "*plain*", "*fused*", "*streamed*", "*the faster over plain*"]
    ways = (predictions.block_kernels, predictions.forward_kernels)
    whole = []
    for tower, items in itertools.product(TOWERS, (1, BATCH)):
        ratios = (predictions.over_text(*predictions.served_and_plain(way, tower, items, gpu), 3) for way in ways)
        whole.append([tower.name, str(items), *ratios])
    return [
        f"### {title}: a preference per image, folded layers",
        "",
        "The bound counts x twice: Bᵀx comes before t·Aᵀ. Predicted: *plain*, a library's product with merged weights; "
        "*fused*, one kernel; *streamed*, a kernel that writes [x \\| t] and the library's product. µs",
        *table(columns, [served_line(layer, gpu) for layer in served]),
        "A whole block and model, with attention and the rest of the network:",
        *table(["model", "images", "*a served block over the plain*", "*a served model over the plain*"], whole, 1),
    ]


COLUMNS = """\
- **bound** and **by**: no kernel is faster at these rates, because of its operations or because of its bytes.
- ***fused***, ***streamed***: predicted, without db. *fused* assembles W(γ) inside the product (weight gradient: dW
  stays in registers); *streamed* goes through a scratch tensor (W(γ), or dW) and the library's product.
- **measured**: the fastest measured strategy, its name, and its ratio to the bound.
- **cached**: bound, prediction and measurement where W(γ) was assembled before and is only read."""
