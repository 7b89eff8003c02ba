"""Strategies compared over rows, and where one overtakes the other."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import pmkernels
from benchmarks.common import layer_case, timing
from benchmarks.common.errors import TOLERANCE, relative_error
from benchmarks.common.session import FAILED
from benchmarks.common.towers import Layer
from benchmarks.suites import layers
from benchmarks.tune.cases import Case
from benchmarks.tune.choosing import TIE, Bench, microseconds
from pmkernels import strategies

TASKS = (8, 2, 4)
# rows -> microseconds of fused and streamed
Times = Mapping[int, tuple[float, float]]
# a call by its strategy's name, and what is wrong with its results
Variants = Callable[[str], layer_case.Variant]
Judge = Callable[[Sequence[Tensor]], str | None]


@dataclass(frozen=True)
class Point:
    """One operation of one layer, whose strategies are compared over rows."""

    op: str
    n: int
    d: int
    tasks: int
    rank: int

    def choose(self, rows: int, like: Tensor) -> str:
        """Return what ``auto`` takes with the configuration file in use, for tensors like that."""
        return strategies.choose(self.op, "auto", like, rows=rows, n=self.n, d=self.d, tasks=self.tasks, rank=self.rank)


def decided(times: Times) -> dict[int, str]:
    """Return rows -> the faster strategy.

    A tie goes with the next smaller number of rows that is decided, else the next larger one: noise must not make
    crossovers. Nothing decided at all: nothing.
    """
    labels: dict[int, str | None] = {}
    last: str | None = None
    for rows in sorted(times):
        fused, streamed = times[rows]
        if max(fused, streamed) > TIE * min(fused, streamed):
            last = "fused" if fused < streamed else "streamed"
        labels[rows] = last
    first = next((label for label in labels.values() if label is not None), None)
    return {} if first is None else {rows: label or first for rows, label in labels.items()}


def boundaries(best: Mapping[int, str], predicted: Mapping[int, str]) -> dict[int, str]:
    """Return the rows that a file must name to say everywhere what was measured. The nearest row is what says it.

    None where the cost model is right everywhere; else both sides of each crossover, or one line if there is none.
    """
    if all(predicted[rows] == label for rows, label in best.items()):
        return {}
    ordered = sorted(best)
    labels: dict[int, str] = {}
    for before, after in itertools.pairwise(ordered):
        if best[before] != best[after]:
            labels |= {before: best[before], after: best[after]}
    return labels or {ordered[0]: best[ordered[0]]}


@dataclass
class Strategies:
    """Microseconds (fused, streamed) of each operation over rows, and what is missing or wrong."""

    times: dict[Point, dict[int, tuple[float, float]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def measure(self, bench: Bench, layer: Layer, tasks: int, powers: Sequence[int], until: float) -> None:
        """Measure one layer with K task vectors; an operation counts only with all its rows."""
        device, title = bench.device, f"strategies of {layer.name}, K = {tasks}"
        # the interpreter cuts bfloat16 off where a GPU rounds
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        free = timing.free_memory(device)
        rows = [m for m in all_rows(layer, powers) if layer_case.needed_memory(layer, tasks, m) <= free]
        if not rows or time.monotonic() > until:
            self.missing.append(title)
            return
        case = layer_case.Case.make(layer, tasks, rows[-1], dtype, device)
        for name, op in layer_case.OPERATIONS.items():
            times: dict[int, tuple[float, float]] = {}
            for m in rows:
                if time.monotonic() > until:
                    self.missing.append(f"{title}, {name}")
                    return
                with torch.no_grad():
                    variants = layer_case.variants(case, name, m)
                    fault = functools.partial(_fault, *layer_case.truth(case, name, m))
                    what = f"{name} of {layer.name}, K = {tasks}, M = {m}"
                    times[m] = self._compared(bench, variants.__getitem__, fault, what)
            self.times[Point(op, layer.n, layer.d, tasks, layer.rank)] = times

    def measure_preference(self, bench: Bench, layer: Layer, powers: Sequence[int], until: float) -> None:
        """Measure a served layer with a preference for each image. It counts only with all its rows."""
        title, times = f"preference of {layer.name}", dict[int, tuple[float, float]]()
        for case in preference_cases(layer, powers):
            # the interpreter cuts bfloat16 off where a GPU rounds
            case = case if bench.device.type == "cuda" else replace(case, dtype="float16")
            prepared = None if time.monotonic() > until else bench.prepare(case)
            if prepared is None:
                self.missing.append(title)
                return
            v, x, gamma = prepared.values, prepared.values["x"], prepared.values["gamma"][0]
            if case.groups > 1:
                x, gamma = x.view(case.groups, -1, case.d), v["gamma"].view(case.groups, 1, -1)
            served = (x, v["wide"], v["G"], v["right"], gamma, v["bias"])

            def variant(strategy: str, served: tuple[Any, ...] = served, rows: int = case.rows) -> layer_case.Variant:
                return lambda: [pmkernels.preference_linear(*served, strategy=strategy).view(rows, -1)]

            with torch.no_grad():
                times[case.rows] = self._compared(bench, variant, prepared.fault, f"{title}, M = {case.rows}")
        self.times[Point("preference", layer.n, layer.d, 0, layer.rank)] = times

    def _compared(self, bench: Bench, variant: Variants, fault_of: Judge, what: str) -> tuple[float, float]:
        """Return microseconds of fused and streamed. A strategy that is wrong counts as slower than anything."""
        medians = []
        for strategy in ("fused", "streamed"):
            us = FAILED
            try:
                fault = fault_of(variant(strategy)())
                if fault is None:
                    us = microseconds(variant(strategy), bench.device)
            except Exception as error:
                fault = bench.survived(error)
            if fault is not None:
                self.wrong.append(f"{what}, {strategy}: {fault}")
            medians.append(us)
        return medians[0], medians[1]


def _fault(truth: Sequence[Tensor], plain: float, results: Sequence[Tensor]) -> str | None:
    error = relative_error(results, truth)
    return None if error <= TOLERANCE * plain + 1e-6 else f"error {error:.2e}, plain PyTorch {plain:.2e}"


def all_rows(layer: Layer, powers: Sequence[int]) -> list[int]:
    """Return the rows that a layer is measured at: these, one image's and a batch's."""
    return sorted({*powers, *({layer.tokens, layer.rows} if layer.tokens > 1 else ())})


def strategy_cases(layer: Layer, tasks: int, powers: Sequence[int]) -> Iterator[Case]:
    """Yield what measuring the strategies of a layer launches, to be compiled before."""
    shape: dict[str, Any] = {"n": layer.n, "d": layer.d, "tasks": tasks, "rank": layer.rank}
    yield from (Case("merge", **shape), Case("merge_grad", **shape))
    for rows in all_rows(layer, powers):
        yield Case("forward", **shape, rows=rows, bias=True)
        yield Case("dx", **shape, rows=rows)
        yield Case("weight_grad", **shape, rows=rows)


def preference_cases(layer: Layer, powers: Sequence[int]) -> Iterator[Case]:
    """Yield what measuring a served layer launches. Each image has a preference where rows are images."""
    for rows in all_rows(layer, powers):
        groups = layer.items if rows == layer.rows else 1
        yield Case("preference", layer.n, layer.d, rows, rank=layer.rank, groups=groups, bias=True)


def choices(measured: Mapping[Point, Times], like: Tensor) -> tuple[list[dict[str, Any]], dict[Point, dict[int, str]]]:
    """Return the lines where the cost model in use would choose otherwise, and all labels."""
    written, labels = [], {}
    for point, times in measured.items():
        best = labels[point] = decided(times)
        predicted = {rows: point.choose(rows, like) for rows in best}
        for rows, label in boundaries(best, predicted).items():
            line = {"op": point.op, "dtype": "16-bit", "n": point.n, "d": point.d, "tasks": point.tasks}
            written.append({**line, "rank": point.rank, "rows": rows, "best": label})
    return written, labels


def measure_strategies(
    strategies: Strategies, bench: Bench, among: Sequence[Layer], quick: bool, until: float, say: Callable[[str], None]
) -> None:
    """Measure every one of these layers with every K, all of their kernels compiled ahead."""
    powers, tasks = ((1,), (2,)) if quick else (layers.POWERS, TASKS)
    plain, served = [], []
    for count, layer in itertools.product(tasks, among):
        measure = functools.partial(strategies.measure, bench, layer, count, powers)
        plain.append((list(strategy_cases(layer, count, powers)), measure, f"{layer.name}, K = {count}"))
    for layer in [layer for layer in among if layer.rank]:
        cases = list(preference_cases(layer, powers))
        cases += [replace(case, call="widen", bias=False) for case in cases]
        measure = functools.partial(strategies.measure_preference, bench, layer, powers)
        served.append((cases, measure, f"{layer.name} with a preference per image"))
    for todo in (plain, served):
        for cases, _, _ in todo:
            bench.compiler.submit(None, cases)
        for cases, measure, title in todo:
            for case in cases:
                bench.compiler.fault(None, case, until)
            measure(until)
            say(f"strategies of {title}")
