"""The layer grid: each strategy beside the limit, over layers, rows and K, in one run.

A time is reported only if its output matched float64 in that run. Calls are captured in CUDA graphs and replayed with a
cold L2 cache: what is compared is the work on the GPU, also at one row, where a launch from Python takes longer than
the kernel. ``auto`` should be within :data:`GOAL` of the better of ``fused`` and ``streamed`` at every point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks import limits
from benchmarks.common.session import Once
from benchmarks.common.suites import Save, nowhere
from benchmarks.kernels import LIMIT, RANK, TOLERANCE, Layer, relative_error, timed
from pmkernels import costs, dispatch, ops, reference, strategies
from pmkernels.costs import Problem
from pmkernels.graphs import capture, warm_up

TASKS = (2, 8)
# a layer's own number of rows comes besides
POWERS = (1, 8, 64, 512, 4096)
LAYERS = (
    *(layer for tower in limits.TOWERS for layer in tower.block_layers(limits.BATCH)),
    Layer(limits.LANGUAGE_MODEL[0].name, 4096, 4096, 1, 1),
)
TINY_LAYERS = (Layer("tiny", 40, 24, 3, 5), Layer("tiny MLP", 24, 40, 3, 5))
TINY_POWERS = (1,)
# operation as results files call it -> as pmkernels.costs does
OPERATIONS = {name: key for key, name in limits.OPERATIONS.items() if key != "merge"}
CHOICES = ("fused", "streamed")
VARIANTS = (LIMIT, *CHOICES, "cached", "auto")
GOAL = 1.15
# milliseconds of repetitions of one variant; the grid has fifteen hundred
WARMUP, REPETITIONS = 2, 8


@dataclass
class Row:
    """One variant of one operation at one point: milliseconds (median, 20th and 80th percentile), or None if wrong.

    ``chosen``: what ``auto`` stands for here. ``graph``: replayed from a CUDA graph.
    """

    op: str
    layer: str
    n: int
    d: int
    tasks: int
    rank: int
    rows: int
    dtype: str
    variant: str
    error: float
    plain_error: float
    matched: bool
    chosen: str | None = None
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    graph: bool = False


Variant = Callable[[], Sequence[Tensor]]


def rounded(value: float) -> float:
    """Four digits: the grid is thousands of figures in a committed file."""
    return float(f"{value:.4g}")


def captured(function: Variant) -> torch.cuda.CUDAGraph | None:
    """``function`` as a CUDA graph; None where something in it cannot be captured."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        warm_up(function, device)
        return capture(function, device)[0]
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def measure(row: Row, variant: Variant, device: torch.device) -> None:
    """Fill in the times of a variant that was right."""
    if device.type != "cuda":
        row.ms, row.p20, row.p80 = (rounded(ms) for ms in timed(variant, device))
        return
    from triton.testing import do_bench

    graph = captured(variant)
    row.graph = graph is not None
    function = variant if graph is None else graph.replay
    times = do_bench(function, warmup=WARMUP, rep=REPETITIONS, quantiles=[0.5, 0.2, 0.8])
    row.ms, row.p20, row.p80 = (rounded(ms) for ms in times)


def free_memory(device: torch.device) -> float:
    """Bytes that tensors can still take on the device."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def needed_memory(layer: Layer, tasks: int, rows: int) -> float:
    """Bytes at a point: weights in 16 bits and as the reference sums them, float64 of the truth, activations."""
    weight, activations = layer.n * layer.d, rows * (layer.n + layer.d)
    return weight * ((tasks + 4) * 2 + (tasks + 2) * 4 + 4 * 8) + activations * (4 * 2 + 3 * 8)


@dataclass(frozen=True)
class Case:
    """One layer with K task vectors: inputs for the most rows, and W(γ) in the model's type and in float64."""

    layer: Layer
    tasks: int
    x: Tensor
    dy: Tensor
    parts: dict[str, Tensor]
    bias: Tensor
    merged: Tensor
    exact: Tensor

    @classmethod
    def make(cls, layer: Layer, tasks: int, rows: int, dtype: torch.dtype, device: torch.device) -> Case:
        """Random, but dy depends on x through Σ_k τ_k: each dλ_k is then a sum that does not cancel."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, into: torch.dtype = torch.float32) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, device=device)).to(into)

        width = layer.d**-0.5
        parts = {
            "weight": normal(layer.n, layer.d, scale=width, into=dtype),
            "task_vectors": torch.stack(
                [normal(layer.n, layer.d, scale=0.1 * width, into=dtype) for _ in range(tasks)]
            ),
            "lam": normal(tasks, scale=0.3),
        }
        if limits.has_low_rank(layer.name):
            parts |= {
                "A": normal(layer.n, RANK),
                "G": normal(RANK, RANK, tasks, scale=0.1),
                "B": normal(layer.d, RANK, scale=width),
                "gamma": torch.softmax(normal(tasks), dim=0),
            }
        x = normal(rows, layer.d, into=dtype)
        dy = F.linear(x, parts["task_vectors"].sum(dim=0))
        dy = dy / dy.float().std().to(dtype)
        exact = parts["weight"].double()
        for scale, task_vector in zip(parts["lam"].double(), parts["task_vectors"], strict=True):
            exact += scale * task_vector.double()
        if "A" in parts:
            core = reference.preference_core(parts["G"].double(), parts["gamma"].double())
            exact += parts["A"].double() @ core @ parts["B"].double().t()
        return cls(layer, tasks, x, dy, parts, normal(layer.n, into=dtype), reference.merge_weight(**parts), exact)

    def reduced(self, d_weight: Tensor) -> list[Tensor]:
        """dλ, and dA, dG, dB where there is a low-rank term, of a dW in memory."""
        dtype, parts = d_weight.dtype, self.parts
        found = [torch.stack([(tau.to(dtype) * d_weight).sum() for tau in parts["task_vectors"]])]
        if "A" in parts:
            A, G, B, gamma = (parts[name].to(dtype) for name in ("A", "G", "B", "gamma"))
            core = reference.preference_core(G, gamma)
            P = d_weight @ B
            found += [P @ core.t(), (A.t() @ P)[:, :, None] * gamma, d_weight.t() @ A @ core]
        return found


def variants(case: Case, op: str, rows: int) -> dict[str, Variant]:
    """What is measured of an operation, by name; the limit of the weight gradient is dW alone."""
    x, dy, merged, bias = case.x[:rows], case.dy[:rows], case.merged, case.bias

    def forward(strategy: str, cached: Tensor | None = None) -> Variant:
        return lambda: [pmkernels.pareto_linear(x, **case.parts, bias=bias, cached=cached, strategy=strategy)]

    def backward(strategy: str, cached: Tensor | None = None) -> Variant:
        values = {**case.parts, "x": x, "bias": bias, "cached": cached}
        inputs = [values.get(name) for name in ops.LINEAR_INPUTS]
        low_rank = "A" in case.parts
        # of x, lam, A, G, B, gamma and bias
        needs = [True, *[False] * 6] if op == "dx" else [False, True, low_rank, low_rank, low_rank, False, False]

        def run() -> list[Tensor]:
            found = ops.pareto_linear_backward(dy, *inputs, needs, strategy)
            return [gradient for gradient, need in zip(found, needs, strict=True) if need]

        return run

    make = forward if op == "forward" else backward
    found: dict[str, Variant] = {name: make(name) for name in (*CHOICES, "auto")}
    if op == "weight gradient":
        return {LIMIT: lambda: [dy.t() @ x], **found}
    limit: Variant = (lambda: [F.linear(x, merged, bias)]) if op == "forward" else (lambda: [dy @ merged])
    return {LIMIT: limit, **found, "cached": make("auto", merged)}


def truth(case: Case, op: str, rows: int) -> tuple[list[Tensor], float]:
    """The result in float64, and the error of plain PyTorch in the model's type.

    For the weight gradient that error is at least the one of its dW: a few numbers dλ may come out right by luck.
    """
    x, dy = case.x[:rows], case.dy[:rows]
    if op == "forward":
        truth = [F.linear(x.double(), case.exact, case.bias.double())]
        return truth, relative_error([F.linear(x, case.merged, case.bias)], truth)
    if op == "dx":
        truth = [dy.double() @ case.exact]
        return truth, relative_error([dy @ case.merged], truth)
    exact, plain = dy.double().t() @ x.double(), dy.t() @ x
    truth = case.reduced(exact)
    return truth, max(relative_error([plain], [exact]), relative_error(case.reduced(plain.float()), truth))


def product_error(x: Tensor, dy: Tensor) -> tuple[float, float]:
    """The error of the library's dW = dyᵀ·x, and what rounding allows it: its partial sums may be of 16 bits too."""
    exact = dy.double().t() @ x.double()
    return relative_error([dy.t() @ x], [exact]), 2 * relative_error([exact.to(x.dtype)], [exact])


def points(case: Case, op: str, rows: int) -> Iterator[Row]:
    """A row per variant of one operation at one point."""
    layer, device = case.layer, case.x.device
    rank = RANK if "A" in case.parts else 0
    exact, plain = truth(case, op, rows)
    dtype = str(case.x.dtype).removeprefix("torch.")
    for name, variant in variants(case, op, rows).items():
        if name == LIMIT and op == "weight gradient":
            error, allowed = product_error(case.x[:rows], case.dy[:rows])
        else:
            error, allowed = relative_error(variant(), exact), plain
        matched = error <= TOLERANCE * allowed + 1e-6
        errors = rounded(error), rounded(allowed)
        row = Row(op, layer.name, layer.n, layer.d, case.tasks, rank, rows, dtype, name, *errors, matched)
        if name == "auto":
            row.chosen = strategies.choose(
                OPERATIONS[op], "auto", case.x, rows=rows, n=layer.n, d=layer.d, rank=rank, tasks=case.tasks
            )
        if matched:
            measure(row, variant, device)
        yield row


def grid(layer: Layer, powers: Sequence[int]) -> list[int]:
    """The rows of a layer: powers of two, and the model's own number."""
    return sorted({*powers, layer.items * layer.tokens})


def crossover(times: Mapping[int, tuple[float, float]]) -> int | None:
    """The rows from which on streamed is faster than fused at every larger number too; None: at none.

    ``times``: rows -> fused, streamed.
    """
    found = None
    for rows in sorted(times, reverse=True):
        fused, streamed = times[rows]
        if streamed >= fused:
            break
        found = rows
    return found


Point = tuple[str, str, int]


def _by_point(rows: Sequence[Mapping[str, Any]]) -> dict[Point, dict[int, dict[str, float]]]:
    """(operation, layer, K) -> rows -> variant -> milliseconds, of the variants that were right."""
    found: dict[Point, dict[int, dict[str, float]]] = {}
    for row in rows:
        at = found.setdefault((row["op"], row["layer"], row["tasks"]), {}).setdefault(row["rows"], {})
        if row["ms"] is not None:
            at[row["variant"]] = row["ms"]
    return found


def crossovers(rows: Sequence[Mapping[str, Any]], gpu: str | None, configuration: str) -> list[dict[str, Any]]:
    """Measured, and predicted for the same rows with that configuration file where the GPU's rates are known."""
    shapes = {(row["op"], row["layer"], row["tasks"]): row for row in rows}
    found = []
    for (op, layer, tasks), at in _by_point(rows).items():
        shape = shapes[op, layer, tasks]
        both = {m: (ms["fused"], ms["streamed"]) for m, ms in at.items() if set(CHOICES) <= set(ms)}
        entry = {"op": op, "layer": layer, "tasks": tasks, "measured": crossover(both), "predicted": None}
        if gpu is not None and gpu in costs.GPUS:
            predicted = {}
            for m in both:
                counted = Problem(m, shape["n"], shape["d"], tasks, shape["rank"], limits.KIND)
                fused, streamed = (
                    limits.predicted(OPERATIONS[op], strategy, counted, gpu, configuration=configuration)
                    for strategy in CHOICES
                )
                predicted[m] = (fused, streamed)
            entry["predicted"] = crossover(predicted)
        found.append(entry)
    return found


@dataclass(frozen=True)
class GridPoint:
    """One operation of one layer at one number of rows; ``rows`` measures every variant of it."""

    layer: Layer
    tasks: int
    count: int
    op: str
    rows: Callable[[], Iterator[Row]]

    @property
    def name(self) -> str:
        """For people and for keys."""
        return f"{self.layer.name}, K = {self.tasks}, M = {self.count}, {self.op}"


def grid_points(quick: bool, device: torch.device, skipped: list[dict[str, Any]] | None = None) -> Iterator[GridPoint]:
    """All points that fit in memory; a layer's tensors are made by the first point of it that is measured.

    ``quick``: tiny shapes on any device. ``skipped``: gets what does not fit.
    """
    # the interpreter cuts bfloat16 off where a GPU rounds
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    for layer, tasks in itertools.product(TINY_LAYERS if quick else LAYERS, TASKS[:1] if quick else TASKS):
        free = free_memory(device)
        everything = grid(layer, TINY_POWERS if quick else POWERS)
        fitting = [m for m in everything if needed_memory(layer, tasks, m) <= free]
        if skipped is not None:
            skipped += [{"layer": layer.name, "tasks": tasks, "rows": m} for m in everything if m not in fitting]
        if not fitting:
            continue

        def make(layer: Layer = layer, tasks: int = tasks, most: int = fitting[-1]) -> Case:
            with torch.no_grad():
                return Case.make(layer, tasks, most, dtype, device)

        case = Once(make)
        for m, op in itertools.product(fitting, OPERATIONS):

            @torch.no_grad()
            def rows(case: Once = case, op: str = op, m: int = m) -> Iterator[Row]:
                yield from points(case(), op, m)

            yield GridPoint(layer, tasks, m, op, rows)
        case.drop()


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """The whole grid. ``quick``: tiny shapes on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    if not quick and not torch.cuda.is_available():
        raise SystemExit("--suite layers: expected a CUDA GPU, got none (--quick rehearses it on the CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = dispatch.gpu_name(0) if device.type == "cuda" else None
    skipped: list[dict[str, Any]] = []
    report: dict[str, Any] = {"rank": RANK, "gpu": gpu, "rates": gpu if gpu in costs.GPUS else None, "rows": []}
    report |= {"skipped": skipped, "launch_ms": _launch(device), "crossovers": []}
    before = None
    for point in grid_points(quick, device, skipped):
        if (point.layer, point.tasks) != before:
            before = point.layer, point.tasks
            print(f"{point.layer.name}, K = {point.tasks}", flush=True)
        for row in point.rows():
            report["rows"].append(asdict(row))
            save(report)
    report["crossovers"] = crossovers(report["rows"], gpu, dispatch.gpu_file(device))
    return report


def _launch(device: torch.device) -> float | None:
    """Milliseconds of a graph with nothing but an empty kernel: what every time below holds besides its work."""
    if device.type != "cuda":
        return None
    row, one = Row("launch", "", 0, 0, 0, 0, 0, "", "", 0.0, 0.0, True), torch.zeros(1, device=device)
    measure(row, lambda: [one.zero_()], device)
    return row.ms


def ratios(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``auto`` over the better strategy at every point that has all three times, worst first."""
    chosen = {
        (row["op"], row["layer"], row["tasks"], row["rows"]): row["chosen"]
        for row in report["rows"]
        if row["variant"] == "auto"
    }
    found = []
    for (op, layer, tasks), at in _by_point(report["rows"]).items():
        for rows, ms in at.items():
            if {*CHOICES, "auto"} <= set(ms):
                best = min(CHOICES, key=lambda name: ms[name])
                entry = {"op": op, "layer": layer, "tasks": tasks, "rows": rows, "best": best}
                found.append({**entry, "chosen": chosen[op, layer, tasks, rows], "ratio": ms["auto"] / ms[best]})
    return sorted(found, key=lambda entry: -entry["ratio"])


def _times(ms: Mapping[str, float], variant: str) -> str:
    if variant not in ms:
        return "–"
    if LIMIT not in ms:
        return f"{ms[variant] * 1e3:.1f}"
    return f"{ms[variant] / ms[LIMIT]:.2f}×"


def markdown(report: Mapping[str, Any]) -> str:
    """The worst of ``auto``, the crossovers, and a few rows of each layer; the results file has all of them."""
    if not report["rows"]:
        return "No point of the grid fits in this GPU's memory.\n"
    dtype, found = report["rows"][0]["dtype"], ratios(report)
    wrong = sum(not row["matched"] for row in report["rows"])
    direct = sum(row["ms"] is not None and not row["graph"] for row in report["rows"])
    lines = [
        f"One layer, {dtype}, r = {report['rank']} (MLP: no low-rank term); median of one run, cold L2 cache. "
        f"{len(found)} points have every strategy"
        + (f", {len(report['skipped'])} do not fit in memory" if report["skipped"] else "")
        + (f", {wrong} outputs were wrong and have no time" if wrong else "")
        + (f"; {direct} times include launches from Python" if direct else "")
        + (
            f"; launching a graph, {1e3 * report['launch_ms']:.1f} µs, is in every time"
            if report.get("launch_ms")
            else ""
        )
        + ".",
        "",
        f"**`auto` over the better strategy** (goal: at most {GOAL} everywhere)",
        "",
        "| operation | points | within the goal | worst | where | `auto` took | best |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for op in OPERATIONS:
        of_op = [entry for entry in found if entry["op"] == op]
        if of_op:
            worst, within = of_op[0], sum(entry["ratio"] <= GOAL for entry in of_op)
            lines.append(
                f"| {op} | {len(of_op)} | {within} | {worst['ratio']:.2f}× | {worst['layer']}, K = {worst['tasks']}, "
                f"M = {worst['rows']} | {worst['chosen']} | {worst['best']} |"
            )
    lines += [
        "",
        "**Rows from which on `streamed` is faster than `fused`**: measured (predicted)",
        "",
        f"| layer | K | {' | '.join(OPERATIONS)} |",
        f"|---|---:|{'---:|' * len(OPERATIONS)}",
    ]
    at = {(e["layer"], e["tasks"], e["op"]): e for e in report["crossovers"]}
    for layer, tasks in dict.fromkeys((e["layer"], e["tasks"]) for e in report["crossovers"]):
        cells = []
        for op in OPERATIONS:
            entry = at[layer, tasks, op]
            predicted = (entry["predicted"] or "never") if report["rates"] else "–"
            cells.append(f"{entry['measured'] or 'never'} ({predicted})")
        lines.append(f"| {layer} | {tasks} | {' | '.join(cells)} |")
    times = _by_point(report["rows"])
    for op in OPERATIONS:
        variants = [name for name in VARIANTS[1:] if op != "weight gradient" or name != "cached"]
        lines += [
            "",
            f"**{op}**: time over the limit"
            + (" (dW alone)" if op == "weight gradient" else " (the library's product on a weight merged beforehand)"),
            "",
            f"| layer | K | rows | limit µs | {' | '.join(variants)} |",
            f"|---|---:|---:|---:|{'---:|' * len(variants)}",
        ]
        for (name, layer, tasks), by_rows in times.items():
            for rows in _shown(by_rows) if name == op else ():
                ms = by_rows[rows]
                limit = f"{ms[LIMIT] * 1e3:.1f}" if LIMIT in ms else "–"
                cells = [_times(ms, variant) for variant in variants]
                lines.append(f"| {layer} | {tasks} | {rows} | {limit} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(rows: Mapping[int, Any]) -> list[int]:
    """Of a layer's rows: 1, 64, 512, and the model's own number or else the most."""
    own = [m for m in rows if m & (m - 1)]
    return sorted({m for m in (1, 64, 512, *(own or [max(rows)])) if m in rows})


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture per operation: time over the limit against rows, a panel per layer, a line per strategy and K."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    times = _by_point(report["rows"])
    colours = {"fused": "#0072B2", "streamed": "#E69F00", "cached": "#009E73", "auto": "#111111"}
    written = []
    for op in OPERATIONS:
        layers = list(dict.fromkeys(layer for name, layer, _ in times if name == op))
        if not layers:
            continue
        across = min(len(layers), 3)
        down = -(-len(layers) // across)
        figure = Figure(figsize=(4.2 * across, 2.9 * down + 0.7), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
        all_tasks = sorted({tasks for name, _, tasks in times if name == op})
        for panel, layer in zip(panels, layers, strict=False):
            panel.set(xscale="log", yscale="log", title=layer, xlabel="rows")
            panel.label_outer()
            panel.axhline(1.0, color="grey", linewidth=0.8)
            panel.grid(alpha=0.3)
            for tasks in all_tasks:
                style = "-" if tasks == all_tasks[-1] else ":"
                by_rows = times.get((op, layer, tasks), {})
                for variant, colour in colours.items():
                    line = {m: ms[variant] / ms[LIMIT] for m, ms in by_rows.items() if {variant, LIMIT} <= set(ms)}
                    if line:
                        panel.plot(
                            list(line),
                            list(line.values()),
                            style,
                            color=colour,
                            linewidth=0.9 if variant == "auto" else 1.8,
                            marker="." if variant == "auto" else None,
                            label=f"{variant}, K = {tasks}",
                        )
        for panel in panels[len(layers) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"{op}: time over the limit (= 1)")
        path = folder / f"layers-{op.replace(' ', '-')}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
