"""The layer grid: each strategy beside the limit, over layers, rows and K.

A time is reported only if its output matched float64 in that run. Calls are captured in CUDA graphs and replayed with a
cold L2 cache: what is compared is the work on the GPU, also at one row, where a launch from Python takes longer than
the kernel. ``auto`` should be within :data:`GOAL` of the better of ``fused`` and ``streamed`` at every point.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.common import towers
from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import CHOICES, LIMIT, OPERATIONS, Case, needed_memory, product_error, truth, variants
from benchmarks.common.rows import LayerRow, dtype_name
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
    """Return the rows from which on streamed is faster than fused. It is so at every larger number too; None: at none.

    ``times``: rows -> fused, streamed.
    """
    first = None
    for rows in sorted(times, reverse=True):
        fused, streamed = times[rows]
        if streamed >= fused:
            break
        first = rows
    return first


Point = tuple[str, str, int]


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
    """Return the whole grid. ``quick``: tiny shapes on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    device = suite_device("layers", quick)
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
    """Return milliseconds of a graph with an empty kernel. Every time below holds them."""
    if device.type != "cuda":
        return None
    one = torch.zeros(1, device=device)
    return rounded(timed(lambda: one.zero_(), device).ms)
