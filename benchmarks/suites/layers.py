"""The layer grid: each strategy beside the limit, over layers, rows and K. Its tables and pictures too.

A time is reported only if its output matched float64 in that run. Calls are captured in CUDA graphs and replayed with a
cold L2 cache: what is compared is the work on the GPU, also at one row, where a launch from Python takes longer than
the kernel. ``auto`` should be within :data:`GOAL` of the better of ``fused`` and ``streamed`` at every point.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import towers
from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import CHOICES, LIMIT, OPERATIONS, Case, needed_memory, product_error, truth, variants
from benchmarks.common.pages import table
from benchmarks.common.rows import Json, LayerRow, dtype_name
from benchmarks.common.session import Once
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import free_memory, rounded, suite_device, timed
from benchmarks.common.towers import RANK, TINY_LAYERS, Layer
from benchmarks.limits import predictions
from pmkernels import costs, dispatch, strategies
from pmkernels.costs import Problem

TASKS = (2, 8)
# a layer's own number of rows comes besides
POWERS = (1, 8, 64, 512, 4096)
LAYERS = (
    *(layer for tower in towers.TOWERS for layer in tower.block_layers(towers.BATCH)),
    Layer(towers.LANGUAGE_MODEL[0].name, 4096, 4096, 1, 1),
)
TINY_POWERS = (1,)
VARIANTS = (LIMIT, *CHOICES, "cached", "auto")
GOAL = 1.15
Point = tuple[str, str, int]


@dataclass(kw_only=True)
class GridRow(LayerRow):
    """One variant of one operation at one point of the grid."""

    n: int
    d: int
    rank: int


def points(case: Case, op: str, rows: int) -> Iterator[GridRow]:
    """Yield a row per variant of one operation at one point."""
    layer, device = case.layer, case.x.device
    exact, plain = truth(case, op, rows)
    shape: dict[str, Any] = {"n": layer.n, "d": layer.d, "rank": layer.rank, "tasks": case.tasks, "rows": rows}
    for name, variant in variants(case, op, rows).items():
        if name not in VARIANTS:
            continue
        row = GridRow(op=op, layer=layer.name, dtype=dtype_name(case.x.dtype), variant=name, **shape)
        if name == LIMIT and op == "weight gradient":
            row.judge(*product_error(case.x[:rows], case.dy[:rows]))
        else:
            row.judge(relative_error(variant(), exact), plain)
        if name == "auto":
            row.chosen = strategies.choose(OPERATIONS[op], "auto", case.x, **shape)
        if row.matched:
            row.note_times(timed(variant, device))
        yield row


def grid(layer: Layer, powers: Sequence[int]) -> list[int]:
    """Return the rows of a layer: powers of two, and the model's own number."""
    return sorted({*powers, layer.rows})


def crossover(times: Mapping[int, tuple[float, float]]) -> int | None:
    """Return the rows from which on streamed is faster than fused, of rows -> (fused, streamed).

    It is so at every larger number too; None: at none.
    """
    faster = itertools.takewhile(lambda rows: times[rows][1] < times[rows][0], sorted(times, reverse=True))
    return min(faster, default=None)


def by_point(rows: Sequence[Mapping[str, Any]]) -> dict[Point, dict[int, dict[str, float]]]:
    """Return (operation, layer, K) -> rows -> variant -> milliseconds, of the variants that were right."""
    times: dict[Point, dict[int, dict[str, float]]] = {}
    for row in rows:
        at = times.setdefault((row["op"], row["layer"], row["tasks"]), {}).setdefault(row["rows"], {})
        if row["ms"] is not None:
            at[row["variant"]] = row["ms"]
    return times


def crossovers(rows: Sequence[Mapping[str, Any]], gpu: str | None, configuration: str) -> list[dict[str, Any]]:
    """Return crossovers as measured, and as predicted with a configuration file where rates are known."""
    shapes = {(row["op"], row["layer"], row["tasks"]): row for row in rows}
    entries = []
    for (op, layer, tasks), at in by_point(rows).items():
        shape = shapes[op, layer, tasks]
        both = {m: (ms["fused"], ms["streamed"]) for m, ms in at.items() if set(CHOICES) <= set(ms)}
        entry = {"op": op, "layer": layer, "tasks": tasks, "measured": crossover(both), "predicted": None}
        if gpu is not None and gpu in costs.GPUS:
            predicted = {}
            for m in both:
                counted = Problem(m, shape["n"], shape["d"], tasks, shape["rank"], towers.KIND)
                fused, streamed = (
                    predictions.predicted(OPERATIONS[op], strategy, counted, gpu, configuration=configuration)
                    for strategy in CHOICES
                )
                predicted[m] = (fused, streamed)
            entry["predicted"] = crossover(predicted)
        entries.append(entry)
    return entries


@dataclass(frozen=True)
class GridPoint:
    """One operation of one layer at one number of rows. ``rows`` measures every variant of it."""

    layer: Layer
    tasks: int
    count: int
    op: str
    rows: Callable[[], Iterator[GridRow]]

    @property
    def name(self) -> str:
        """Name the point for people and for keys."""
        return f"{self.layer.name}, K = {self.tasks}, M = {self.count}, {self.op}"


def grid_points(quick: bool, device: torch.device, skipped: list[dict[str, Any]] | None = None) -> Iterator[GridPoint]:
    """Yield all points that fit in memory. A layer's tensors are made by the first point of it that is measured.

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
            def rows(case: Once = case, op: str = op, m: int = m) -> Iterator[GridRow]:
                yield from points(case(), op, m)

            yield GridPoint(layer, tasks, m, op, rows)
        case.drop()


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """Return the whole grid; ``save`` gets the report after each row. ``quick``: tiny shapes, to prove that it runs."""
    device = suite_device("layers", quick)
    gpu = dispatch.gpu_name(0) if device.type == "cuda" else None
    skipped: list[dict[str, Any]] = []
    report: dict[str, Any] = {"rank": RANK, "gpu": gpu, "rates": gpu if gpu in costs.GPUS else None, "rows": []}
    # a graph with an empty kernel, which every time below holds
    one = torch.zeros(1, device=device)
    launch = rounded(timed(lambda: one.zero_(), device).ms) if device.type == "cuda" else None
    report |= {"skipped": skipped, "launch_ms": launch, "crossovers": []}
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


def ratios(report: Json) -> list[dict[str, Any]]:
    """Return ``auto`` over the better strategy, worst first. Points without all three times are left out."""
    chosen = {
        (row["op"], row["layer"], row["tasks"], row["rows"]): row["chosen"]
        for row in report["rows"]
        if row["variant"] == "auto"
    }
    entries = []
    for (op, layer, tasks), at in by_point(report["rows"]).items():
        for rows, ms in at.items():
            if {*CHOICES, "auto"} <= set(ms):
                best = min(CHOICES, key=lambda name: ms[name])
                entry = {"op": op, "layer": layer, "tasks": tasks, "rows": rows, "best": best}
                entries.append({**entry, "chosen": chosen[op, layer, tasks, rows], "ratio": ms["auto"] / ms[best]})
    return sorted(entries, key=lambda entry: -entry["ratio"])


def _times(ms: Mapping[str, float], variant: str) -> str:
    if variant not in ms:
        return "–"
    return f"{ms[variant] / ms[LIMIT]:.2f}×" if LIMIT in ms else f"{ms[variant] * 1e3:.1f}"


def markdown(report: Json) -> str:
    """Return the worst of ``auto``, the crossovers, and a few rows of each layer. The results file has all of them."""
    if not report["rows"]:
        return "No point of the grid fits in this GPU's memory.\n"
    complete = ratios(report)
    lines = [_introduction(report, len(complete)), ""]
    lines += [f"**`auto` over the better strategy** (goal: at most {GOAL} everywhere)", ""]
    columns = ["operation", "points", "within the goal", "worst", "where", "`auto` took", "best"]
    lines += table(columns, _worst(complete), "lrrrl")
    lines += ["", "**Rows from which on `streamed` is faster than `fused`**: measured (predicted)", ""]
    lines += table(["layer", "K", *OPERATIONS], _crossovers(report), "lr")
    times = by_point(report["rows"])
    for op in OPERATIONS:
        shown = [name for name in VARIANTS[1:] if op != "weight gradient" or name != "cached"]
        over = "dW alone" if op == "weight gradient" else "the library's product on a weight merged beforehand"
        rows = [
            [layer, str(tasks), str(count), f"{ms[LIMIT] * 1e3:.1f}" if LIMIT in ms else "–"]
            + [_times(ms, variant) for variant in shown]
            for (name, layer, tasks), by_rows in times.items()
            for count in (_shown(by_rows) if name == op else ())
            for ms in [by_rows[count]]
        ]
        lines += ["", f"**{op}**: time over the limit ({over})", ""]
        lines += table(["layer", "K", "rows", "limit µs", *shown], rows, "lr")
    return "\n".join(lines) + "\n"


def _introduction(report: Json, complete: int) -> str:
    rows = report["rows"]
    wrong = sum(not row["matched"] for row in rows)
    direct = sum(row["ms"] is not None and not row["graph"] for row in rows)
    parts = [
        f"One layer, {rows[0]['dtype']}, r = {report['rank']} (MLP: no low-rank term); median of one run, "
        f"cold L2 cache. {complete} points have every strategy",
        f", {len(report['skipped'])} do not fit in memory" if report["skipped"] else "",
        f", {wrong} outputs were wrong and have no time" if wrong else "",
        f"; {direct} times include launches from Python" if direct else "",
    ]
    if report.get("launch_ms"):
        parts.append(f"; launching a graph, {1e3 * report['launch_ms']:.1f} µs, is in every time")
    return "".join(parts) + "."


def _worst(complete: Sequence[Json]) -> Iterator[list[str]]:
    for op in OPERATIONS:
        of_op = [entry for entry in complete if entry["op"] == op]
        if of_op:
            worst, within = of_op[0], sum(entry["ratio"] <= GOAL for entry in of_op)
            where = f"{worst['layer']}, K = {worst['tasks']}, M = {worst['rows']}"
            over = f"{worst['ratio']:.2f}×"
            yield [op, str(len(of_op)), str(within), over, where, worst["chosen"], worst["best"]]


def _crossovers(report: Json) -> Iterator[list[str]]:
    at = {(e["layer"], e["tasks"], e["op"]): e for e in report["crossovers"]}
    for layer, tasks in dict.fromkeys((e["layer"], e["tasks"]) for e in report["crossovers"]):
        cells = [layer, str(tasks)]
        for op in OPERATIONS:
            entry = at[layer, tasks, op]
            predicted = (entry["predicted"] or "never") if report["rates"] else "–"
            cells.append(f"{entry['measured'] or 'never'} ({predicted})")
        yield cells


def _shown(rows: Mapping[int, Any]) -> list[int]:
    """Return some of a layer's rows: 1, 64, 512, and the model's own or most."""
    own = [m for m in rows if m & (m - 1)]
    return sorted({m for m in (1, 64, 512, *(own or [max(rows)])) if m in rows})


def draw(report: Json, folder: Path) -> list[Path]:
    """Draw a picture per operation, of time over the limit against rows. It has a panel per layer."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    times = by_point(report["rows"])
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
                    look = {"linewidth": 0.9, "marker": "."} if variant == "auto" else {"linewidth": 1.8}
                    if line:
                        label = f"{variant}, K = {tasks}"
                        panel.plot(list(line), list(line.values()), style, color=colour, label=label, **look)
        for panel in panels[len(layers) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"{op}: time over the limit (= 1)")
        path = folder / f"layers-{op.replace(' ', '-')}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
