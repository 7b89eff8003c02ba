"""One tower at one batch with P distinct preferences: every variant judged and timed."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.errors import item_error
from benchmarks.common.rows import Row, dtype_name
from benchmarks.common.session import FAILED
from benchmarks.common.timing import Effort, free, in_turn, quantiles, rounded
from benchmarks.serving import variants
from benchmarks.serving.folded import SETS, Case, Request
from benchmarks.serving.names import COPIES, GRAPH, LIMIT, LIMIT_LINEAR, LOOP, OP, REMERGE
from benchmarks.serving.variants import Unavailable, Variant, tensor_bytes
from pareto_merging import merge

GRAPHED = (LIMIT, LIMIT_LINEAR, REMERGE, COPIES, LOOP)


@dataclass(kw_only=True)
class CellRow(Row):
    """One variant at one batch with P distinct preferences.

    ``p99``: the slowest call where there are fewer than a hundred ``calls``. ``weight_bytes``: every tensor that the
    variant keeps; ``peak_bytes``: with what a call needs besides (GPU only). ``models``: weight_bytes in plain models.
    ``to_limit``: ms over the fastest plain merged model of the same run.
    """

    model: str
    batch: int = 0
    preferences: int = 0
    p99: float | None = None
    calls: int = 0
    images_per_second: float | None = None
    to_limit: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    models: float | None = None
    peak_models: float | None = None


@dataclass(frozen=True)
class Truth:
    """Features in float64 by number of distinct preferences, and plain PyTorch's error. They are [items, dim]."""

    features: dict[int, Tensor]
    plain_error: float

    @classmethod
    def of(cls, case: Case, images: Tensor, drawn: Tensor, counts: Sequence[int]) -> "Truth":
        """Return the truth of plain models merged at ``drawn`` [P, K], for all ``counts``."""
        wide, plain_error = copy.deepcopy(case.folded).double(), 0.0
        features: dict[int, Tensor] = {}
        for count in counts:
            for index in range(min(count, len(images))):
                own = images[index::count]
                exact = merge(wide, drawn[index])(own.double())
                plain = merge(case.folded, drawn[index])(own)
                plain_error = max(plain_error, item_error(plain, exact))
                rows = features.setdefault(count, exact.new_zeros(len(images), exact.shape[1]))
                rows[index::count] = exact
        return cls(features, plain_error)

    def error(self, output: Tensor, items: int, count: int) -> float:
        """Return the error of the features of the first ``items``, with ``count`` preferences among them."""
        # 8 images with 8 preferences have the first 8 of 32
        exact = self.features[min(known for known in self.features if known >= count)][:items]
        return item_error(output, exact) if output.shape == exact.shape else FAILED


class Cell:
    """One tower at one batch with the first ``count`` preferences of each of ``drawn`` [SETS, P, K].

    ``truth``: of the first set. ``rows``: one for each variant. ``ready``: the variants that were right.
    """

    def __init__(self, case: Case, images: Tensor, drawn: Tensor, truth: Truth, count: int) -> None:
        self.case, self.images, self.truth, self.count = case, images, truth, count
        self.requests = [Request.make(some[:count], len(images), case.device) for some in drawn]
        self.rows: dict[str, CellRow] = {}
        self.ready: dict[str, Variant] = {}

    def add(self, name: str, make: Callable[[], Variant], captures: bool = False) -> None:
        """Make a variant, warm it up, and note its memory. ``captures``: it runs while it is made."""
        case, batch, count, device = self.case, len(self.images), self.count, self.images.device
        title = f"{case.name}, batch {batch}, {count} preference{'s' if count > 1 else ''}"
        about: dict[str, Any] = {"layer": title, "dtype": dtype_name(case.dtype), "model": case.name}
        row = self.rows[name] = CellRow(op=OP, variant=name, batch=batch, preferences=count, **about)
        if device.type == "cuda":
            free(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        others = [self.case.folded, *(variant.holds for variant in self.ready.values())]
        try:
            _forget_peak(device)
            variant = make()
            if not captures:
                _forget_peak(device)
            for _ in range(3 if device.type == "cuda" else 1):
                self.judge(row, variant, variant.run(self.images, self.requests[0]))
            row.weight_bytes = variant.weight_bytes()
            if device.type == "cuda":
                # weights that others hold as well were there before
                shared = tensor_bytes(*variant.holds) + tensor_bytes(*others) - tensor_bytes(*variant.holds, *others)
                row.peak_bytes = shared + torch.cuda.max_memory_allocated() - before
            if row.matched:
                self.ready[name] = variant
        except Unavailable as error:
            row.reason = str(error)
        except Exception as error:
            row.fail(error)

    def judge(self, row: CellRow, variant: Variant, output: Tensor) -> None:
        """Judge whether every item has the features of its own preference of the first set. The worst error stays."""
        error = self.truth.error(output, len(self.images), 1 if variant.single else self.count)
        error = max(row.error, error)
        row.judge(error, self.truth.plain_error, wrong="wrong features")

    def measure(self, effort: Effort) -> None:
        """Fill in the times of what was right, and stays right while it is measured."""

        def call(variant: Variant) -> Callable[[int], Tensor]:
            return lambda number: variant.run(self.images, self.requests[0 if variant.set_up else number % SETS])

        def look(name: str, number: int, output: Tensor) -> None:
            if self.ready[name].set_up or number % SETS == 0:
                self.judge(self.rows[name], self.ready[name], output)

        calls = {name: call(variant) for name, variant in self.ready.items()}
        for name, times in in_turn(calls, effort, self.images.device, look).items():
            row = self.rows[name]
            # an engine keeps merged weights once a preference has come twice
            row.weight_bytes = self.ready[name].weight_bytes()
            if row.matched:
                row.note(quantiles(times))
                assert row.ms is not None
                row.images_per_second = rounded(1e3 * len(self.images) / row.ms)
        compare(list(self.rows.values()))


def compare(rows: Sequence[CellRow]) -> None:
    """Divide times by the fastest limit's, and bytes by the plain model's."""
    fastest = min((row.ms for row in rows if row.variant.startswith("limit") and row.ms), default=None)
    plain = next((row.weight_bytes for row in rows if row.variant == LIMIT), None)
    for row in rows:
        row.to_limit, row.models, row.peak_models = (
            round(figure / of, 4) if figure and of else None
            for figure, of in ((row.ms, fastest), (row.weight_bytes, plain), (row.peak_bytes, plain))
        )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def counts_for(batch: int, preferences: Sequence[int]) -> list[int]:
    """Return how many distinct preferences a batch can have of those asked for. 8 images at most 8."""
    return sorted({min(count, batch) for count in preferences})


def cell_rows(
    case: Case, images: Tensor, drawn: Tensor, truth: Truth, count: int, effort: Effort, names: Iterable[str]
) -> list[CellRow]:
    """Return a row per variant of ``names``, at one batch with ``count`` of the preferences."""
    cell = Cell(case, images, drawn, truth, count)
    for name in names:
        cell.add(name, functools.partial(variants.VARIANTS[name], case, cell.requests[0]))
    if images.device.type == "cuda":
        for name in GRAPHED:
            if name in cell.ready:
                graph = functools.partial(variants.graphed, cell.ready[name], images, cell.requests[0])
                cell.add(f"{name}{GRAPH}", graph, captures=True)
    cell.measure(effort)
    return list(cell.rows.values())
