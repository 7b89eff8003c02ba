"""The serving suite: requests with preferences of their own, answered from one folded model.

Whole towers: the engine beside the plain merged model (the limit) and beside other ways to serve P preferences from one
batch (:mod:`benchmarks.serving.variants`), on the same images and preferences, called in turn. Every call brings
preferences other than the one before, except where a variant can only have known them beforehand. A time is from the
call to the last result on the device; images are there already, and nothing is decoded. Layers: preference_linear
beside F.linear, with a cold and a warm cache.

A time is reported only if the outputs matched: every item, the worst of them, against the plain model merged at that
item's own preference in a wider type; the errors of plain PyTorch in the served type are what is allowed twice over.
On a CUDA GPU everything is bfloat16; the CPU runs the same code in float32 on fewer batches.
"""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.ceilings import ceilings
from benchmarks.common.errors import item_error
from benchmarks.common.rows import Row, dtype_name
from benchmarks.common.session import FAILED
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import Clock, Effort, free, in_turn, quantiles, rounded
from benchmarks.common.towers import RANK, TASKS, TINY, TOWERS
from benchmarks.serving import folded, layers, variants
from benchmarks.serving.folded import SETS, Case, Request
from benchmarks.serving.names import COPIES, ENGINE_AGAIN, ENGINE_DEVICE, GRAPH, LIMIT, LIMIT_LINEAR, LOOP, OP, REMERGE
from benchmarks.serving.variants import Unavailable, Variant, tensor_bytes
from pareto_merging import merge
from pareto_merging.checkpoints import encoders

PREFERENCES = (1, 4, 32)
ENCODERS: dict[str, dict[str, Any]] = {t.name: {"architecture": t.name.replace("/", "-")} for t in TOWERS}
TINY_ENCODER: dict[str, Any] = {"arguments": TINY.arguments}
# tower -> batches
GPU_BATCHES = dict.fromkeys(ENCODERS, (1, 8, 32, 128))
CPU_BATCHES: dict[str, tuple[int, ...]] = {"ViT-B/32": (1, 8, 32), "ViT-L/14": (1,)}
TINY_BATCHES: dict[str, tuple[int, ...]] = {TINY.name: (1, 4)}
# a 99th percentile wants a hundred calls; a call on the CPU takes seconds
GPU_EFFORT, GPU_LAYERS = Effort(100, 400, 1.0), Effort(100, 100, 0.0)
CPU_EFFORT, CPU_LAYERS = Effort(5, 20, 3.0), Effort(5, 20, 0.2)
QUICK_EFFORT = Effort(2, 2, 0.0, flushed=0)


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


class Truth:
    """Features [items, dim] in float64 by number of distinct preferences, and plain PyTorch's error.

    They are those of plain models merged at ``drawn`` [P, K], for all ``counts``.
    """

    def __init__(self, case: Case, images: Tensor, drawn: Tensor, counts: Sequence[int]) -> None:
        wide, self.plain_error = copy.deepcopy(case.folded).double(), 0.0
        self.features: dict[int, Tensor] = {}
        for count in counts:
            for index in range(min(count, len(images))):
                own = images[index::count]
                exact = merge(wide, drawn[index])(own.double())
                plain = merge(case.folded, drawn[index])(own)
                self.plain_error = max(self.plain_error, item_error(plain, exact))
                rows = self.features.setdefault(count, exact.new_zeros(len(images), exact.shape[1]))
                rows[index::count] = exact

    def error(self, output: Tensor, items: int, count: int) -> float:
        """Return the error of the features of the first ``items``, with ``count`` preferences among them."""
        # 8 images with 8 preferences have the first 8 of 32
        exact = self.features[min(known for known in self.features if known >= count)][:items]
        return item_error(output, exact) if output.shape == exact.shape else FAILED


class Cell:
    """One tower at one batch with ``count`` distinct preferences. They are the first of each of ``drawn`` [SETS, P, K].

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
        """Fill in the times of what was right, and stays right while it is measured.

        Then times are divided by the fastest limit's, and bytes by the plain model's.
        """

        def call(name: str, number: int) -> Tensor:
            variant = self.ready[name]
            return variant.run(self.images, self.requests[0 if variant.set_up else number % SETS])

        def look(name: str, number: int, output: Tensor) -> None:
            if self.ready[name].set_up or number % SETS == 0:
                self.judge(self.rows[name], self.ready[name], output)

        calls = {name: functools.partial(call, name) for name in self.ready}
        for name, times in in_turn(calls, effort, self.images.device, look).items():
            row = self.rows[name]
            # an engine keeps merged weights once a preference has come twice
            row.weight_bytes = self.ready[name].weight_bytes()
            if row.matched:
                row.note(quantiles(times))
                assert row.ms is not None
                row.images_per_second = rounded(1e3 * len(self.images) / row.ms)
        rows = self.rows.values()
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


def make_images(count: int, size: int, case: Case) -> Tensor:
    """Return random images [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, size, size, generator=generator).to(case.device, case.dtype)


def case_rows(
    case: Case, size: int, batches: Sequence[int], preferences: Sequence[int], effort: Effort, clock: Clock
) -> Iterator[list[CellRow]]:
    """Yield all rows of one tower, a batch at a time. ``size``: of its images in pixels."""
    images = make_images(max(batches), size, case)
    drawn = folded.preferences(max(preferences))
    truth = Truth(case, images, drawn[0], preferences)
    clock.say(f"{case.name}: plain PyTorch is {truth.plain_error:.1e} from float64")
    for batch in batches:
        for count in counts_for(batch, preferences):
            skip = [ENGINE_AGAIN] if count > 1 else []
            skip += [] if case.device.type == "cuda" else [ENGINE_DEVICE]
            names = [name for name in variants.VARIANTS if name not in skip]
            rows = cell_rows(case, images[:batch], drawn, truth, count, effort, names)
            for row in rows:
                figures = row.reason if row.ms is None else f"{row.ms:.2f} ms, {row.to_limit or 0:.2f}×"
                clock.say(f"{row.layer}: {row.variant}: {figures}")
            yield rows
            free(case.device)


def left_out(batches: Mapping[str, Sequence[int]]) -> list[str]:
    """Return what of the whole grid a run on the CPU does without, in words."""
    missing = {name: [str(n) for n in every if n not in batches.get(name, ())] for name, every in GPU_BATCHES.items()}
    return [f"{name}, batch {', '.join(some)}" for name, some in missing.items() if some]


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """Return all rows, on a GPU if there is one. ``quick``: a tiny tower, which proves that it runs and measures
    nothing.

    ``save`` gets the report after every layer and every batch of a tower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batches = TINY_BATCHES if quick else GPU_BATCHES if on_gpu else CPU_BATCHES
    effort, layer_effort = (GPU_EFFORT, GPU_LAYERS) if on_gpu else (CPU_EFFORT, CPU_LAYERS)
    if quick:
        effort = layer_effort = QUICK_EFFORT
    clock = Clock()
    clock.say("a rehearsal with a tiny tower: it measures nothing" if quick else f"{device.type}, {dtype}")
    rates = ceilings(device, quick) if on_gpu else None
    report: dict[str, Any] = {"quick": quick, "device": device.type, "dtype": dtype_name(dtype), "tasks": TASKS}
    report |= {"rank": RANK, "peft": variants.peft_version(), "effort": asdict(effort)}
    report |= {"left_out": [] if quick or on_gpu else left_out(batches), "ceilings": rates}
    report |= {"rows": [], "progress": clock.lines}

    def keep(rows: Sequence[Row]) -> None:
        report["rows"] += [asdict(row) for row in rows]
        save(report)

    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="serving-suite-") as folder:
        for model, layer in layers.projections(quick):
            for row in layers.layer_rows(model, layer, dtype, device, layer_effort, rates):
                keep([row])
        clock.say("layers are measured")
        for name, its_batches in batches.items():
            encoder, counts = (TINY_ENCODER, (1, 4)) if quick else (ENCODERS[name], PREFERENCES)
            try:
                case = folded.build_case(name, encoder, Path(folder), dtype, device)
                for rows in case_rows(case, encoders.image_size(encoder), its_batches, counts, effort, clock):
                    keep(rows)
                case.file.unlink()
                del case
            except Exception as error:
                # what was measured is not lost to another tower's failure
                failed = CellRow(op=OP, layer=name, dtype=dtype_name(dtype), variant="all", model=name)
                failed.fail(error)
                clock.say(f"{name}: {failed.reason}")
                keep([failed])
            free(device)
    clock.say("done")
    return report
