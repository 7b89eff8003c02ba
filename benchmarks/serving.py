"""The serving suite: a batch of requests, each with a preference of its own, from one folded model.

Whole towers: the engine beside the plain merged model (the limit) and beside other ways to serve P preferences from one
batch (:mod:`benchmarks.serving_baselines`), on the same images and preferences, called in turn. Every call brings
preferences other than the one before, except where a variant can only have known them beforehand. A time is from the
call to the last result on the device; images are there already, and nothing is decoded. Layers: preference_linear
beside F.linear, with a cold and a warm cache.

A time is reported only if the outputs matched: every item, the worst of them, against the plain model merged at that
item's own preference in a wider type; the errors of plain PyTorch in the served type are what is allowed twice over.
On a CUDA GPU everything is bfloat16; the CPU runs the same code in float32 on fewer batches.
"""

from __future__ import annotations

import copy
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import serving_baselines as baselines
from benchmarks import serving_layers as layers
from benchmarks.common.suites import Save, nowhere
from benchmarks.kernels import TOLERANCE, ceilings
from benchmarks.layers import rounded
from benchmarks.serving_baselines import (
    COPIES,
    ENGINE,
    ENGINE_AGAIN,
    ENGINE_DEVICE,
    GRAPH,
    LIMIT,
    LIMIT_LINEAR,
    LOOP,
    PEFT,
    RANK,
    REMERGE,
    SETS,
    TASKS,
    Case,
    Request,
    Unavailable,
    Variant,
    tensor_bytes,
)
from benchmarks.serving_layers import FAILED, Effort, quantiles
from benchmarks.training import Clock
from pareto_merging import merge
from pareto_merging.checkpoints import encoders

OP = "serving"
PREFERENCES = (1, 4, 32)
ENCODERS: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"architecture": "ViT-B-32"},
    "ViT-L/14": {"architecture": "ViT-L-14"},
}
TINY = layers.TINY.name
TINY_ENCODER: dict[str, Any] = {
    "arguments": {
        "image_size": 8,
        "patch_size": 4,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 4.0,
        "output_dim": 8,
    }
}
# tower -> batches
GPU_BATCHES = dict.fromkeys(ENCODERS, (1, 8, 32, 128))
CPU_BATCHES: dict[str, tuple[int, ...]] = {"ViT-B/32": (1, 8, 32), "ViT-L/14": (1,)}
TINY_BATCHES: dict[str, tuple[int, ...]] = {TINY: (1, 4)}
GRAPHED = (LIMIT, LIMIT_LINEAR, REMERGE, COPIES, LOOP)
# a 99th percentile wants a hundred calls; a call on the CPU takes seconds
GPU_EFFORT, GPU_LAYERS = Effort(100, 400, 1.0), Effort(100, 100, 0.0)
CPU_EFFORT, CPU_LAYERS = Effort(5, 20, 3.0), Effort(5, 20, 0.2)
QUICK_EFFORT = Effort(2, 2, 0.0, flushed=0)


@dataclass
class Row:
    """One variant at one batch with P distinct preferences; milliseconds, or ``reason`` for there being none.

    ``p99``: the slowest call where there are fewer than a hundred ``calls``. ``weight_bytes``: every tensor that the
    variant keeps; ``peak_bytes``: with what a call needs besides (GPU only). ``models``: weight_bytes in plain models.
    ``to_limit``: ms over the fastest plain merged model of the same run.
    """

    op: str
    layer: str
    dtype: str
    variant: str
    error: float
    plain_error: float
    matched: bool
    model: str
    batch: int
    preferences: int
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    p99: float | None = None
    calls: int = 0
    images_per_second: float | None = None
    to_limit: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    models: float | None = None
    peak_models: float | None = None
    reason: str | None = None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_turn(
    functions: Mapping[str, Callable[[int], Any]],
    effort: Effort,
    device: torch.device,
    look: Callable[[str, int, Any], None],
) -> dict[str, list[float]]:
    """Milliseconds of every call, by name: one call of each function per round, each round beginning with another, so
    that a machine that slows down slows all of them down.

    A function is given the number of the round; what it returns goes to ``look`` after the clock has stopped.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    left, number = list(functions), 0
    while left:
        first = number % len(left)
        for name in left[first:] + left[:first]:
            _synchronize(device)
            start = time.perf_counter()
            result = functions[name](number)
            _synchronize(device)
            found[name].append(1e3 * (time.perf_counter() - start))
            look(name, number, result)
        left = [name for name in left if not effort.suffices(found[name])]
        number += 1
    return found


@dataclass(frozen=True)
class Truth:
    """Features in float64 by number of distinct preferences, [items, dim], and the error of plain PyTorch."""

    features: dict[int, Tensor]
    plain_error: float

    @classmethod
    def of(cls, case: Case, images: Tensor, drawn: Tensor, counts: Sequence[int]) -> Truth:
        """Of plain models merged at ``drawn`` [P, K], for each number of ``counts``."""
        wide, plain_error = copy.deepcopy(case.folded).double(), 0.0
        features: dict[int, Tensor] = {}
        for count in counts:
            for index in range(min(count, len(images))):
                own = images[index::count]
                exact = merge(wide, drawn[index])(own.double())
                plain = merge(case.folded, drawn[index])(own)
                plain_error = max(plain_error, item_error(plain, exact))
                found = features.setdefault(count, exact.new_zeros(len(images), exact.shape[1]))
                found[index::count] = exact
        return cls(features, plain_error)

    def error(self, found: Tensor, items: int, count: int) -> float:
        """Of the features of the first ``items``, with ``count`` preferences among them."""
        # 8 images with 8 preferences have the first 8 of 32
        exact = self.features[min(known for known in self.features if known >= count)][:items]
        return item_error(found, exact) if found.shape == exact.shape else FAILED


def item_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ of the worst item of [n, dim]; 1e30 where it is not finite."""
    errors = (found.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-30)
    return float(errors.nan_to_num(FAILED, FAILED).max().clamp(max=FAILED))


def blank(case: Case, batch: int, count: int, variant: str) -> Row:
    """A row without figures."""
    title = f"{case.name}, batch {batch}, {count} preference{'s' if count > 1 else ''}"
    name = str(case.dtype).removeprefix("torch.")
    return Row(OP, title, name, variant, 0.0, 0.0, True, model=case.name, batch=batch, preferences=count)


@dataclass
class Cell:
    """One tower at one batch with P distinct preferences: images, requests with one set of preferences each, the truth
    of the first set, and a row for each variant."""

    case: Case
    images: Tensor
    requests: list[Request]
    truth: Truth
    rows: dict[str, Row]
    ready: dict[str, Variant]

    @classmethod
    def make(cls, case: Case, images: Tensor, drawn: Tensor, truth: Truth, count: int) -> Cell:
        """With the first ``count`` preferences of ``drawn`` [SETS, P, K]."""
        requests = [Request.make(some[:count], len(images), case.device) for some in drawn]
        return cls(case, images, requests, truth, {}, {})

    def add(self, name: str, make: Callable[[], Variant], captures: bool = False) -> None:
        """Make a variant, call it until it is warm, and note its memory; ``captures``: it runs while it is made."""
        row = self.rows[name] = blank(self.case, len(self.images), len(self.requests[0].distinct), name)
        device = self.images.device
        if device.type == "cuda":
            _free(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        there = [self.case.folded, *(variant.holds for variant in self.ready.values())]
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
                shared = tensor_bytes(*variant.holds) + tensor_bytes(*there) - tensor_bytes(*variant.holds, *there)
                row.peak_bytes = shared + torch.cuda.max_memory_allocated() - before
            if row.matched:
                self.ready[name] = variant
        except Unavailable as error:
            row.reason = str(error)
        except torch.cuda.OutOfMemoryError:
            row.reason = "out of memory"
        except Exception as error:
            row.matched, row.error, row.reason = False, FAILED, f"{type(error).__name__}: {error}"[:300]

    def judge(self, row: Row, variant: Variant, found: Tensor) -> None:
        """Whether every item has the features of its own preference of the first set; the worst error stays."""
        count = 1 if variant.single else len(self.requests[0].distinct)
        row.error = max(row.error, self.truth.error(found, len(self.images), count))
        row.plain_error = self.truth.plain_error
        row.matched = row.error <= TOLERANCE * row.plain_error + 1e-6
        row.reason = None if row.matched else "wrong features"

    def measure(self, effort: Effort) -> None:
        """Fill in the times of what was right, and stays right while it is measured."""

        def call(variant: Variant) -> Callable[[int], Tensor]:
            return lambda number: variant.run(self.images, self.requests[0 if variant.set_up else number % SETS])

        def look(name: str, number: int, found: Tensor) -> None:
            if self.ready[name].set_up or number % SETS == 0:
                self.judge(self.rows[name], self.ready[name], found)

        calls = {name: call(variant) for name, variant in self.ready.items()}
        for name, times in in_turn(calls, effort, self.images.device, look).items():
            row = self.rows[name]
            # an engine keeps merged weights once a preference has come twice
            row.weight_bytes = self.ready[name].weight_bytes()
            if row.matched:
                for figure, value in quantiles(times).items():
                    setattr(row, figure, value)
                assert row.ms is not None
                row.images_per_second = rounded(1e3 * len(self.images) / row.ms)
        compare(list(self.rows.values()))


def compare(rows: Sequence[Row]) -> None:
    """Times over the fastest limit of the same rows, and bytes over those of the plain model."""
    fastest = min((row.ms for row in rows if row.variant.startswith("limit") and row.ms), default=None)
    plain = next((row.weight_bytes for row in rows if row.variant == LIMIT), None)
    for row in rows:
        row.error, row.plain_error = rounded(row.error), rounded(row.plain_error)
        if row.ms and fastest:
            row.to_limit = round(row.ms / fastest, 4)
        if plain and row.weight_bytes:
            row.models = round(row.weight_bytes / plain, 4)
        if plain and row.peak_bytes:
            row.peak_models = round(row.peak_bytes / plain, 4)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def counts_for(batch: int, preferences: Sequence[int]) -> list[int]:
    """How many distinct preferences a batch can have of those asked for: 8 images at most 8."""
    return sorted({min(count, batch) for count in preferences})


def cell_rows(
    case: Case, images: Tensor, drawn: Tensor, truth: Truth, count: int, effort: Effort, skip: Sequence[str] = ()
) -> list[Row]:
    """A row per variant, but those of ``skip``, at one batch with ``count`` of the preferences ``drawn``."""
    cell = Cell.make(case, images, drawn, truth, count)
    for name, make in baselines.VARIANTS.items():
        if name not in skip:
            cell.add(name, functools.partial(make, case, cell.requests[0]))
    if images.device.type == "cuda":
        for name in GRAPHED:
            if name in cell.ready:
                graph = functools.partial(baselines.graphed, cell.ready[name], images, cell.requests[0])
                cell.add(f"{name}{GRAPH}", graph, captures=True)
    cell.measure(effort)
    return list(cell.rows.values())


def case_rows(
    case: Case, size: int, batches: Sequence[int], preferences: Sequence[int], effort: Effort, clock: Clock
) -> Iterator[list[Row]]:
    """All rows of one tower, a batch with a number of preferences at a time; ``size``: of its images in pixels."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(max(batches), 3, size, size, generator=generator).to(case.device, case.dtype)
    drawn = baselines.preferences(max(preferences))
    truth = Truth.of(case, images, drawn[0], preferences)
    clock.say(f"{case.name}: plain PyTorch is {truth.plain_error:.1e} from float64")
    for batch in batches:
        for count in counts_for(batch, preferences):
            skip = [ENGINE_AGAIN] if count > 1 else []
            skip += [] if case.device.type == "cuda" else [ENGINE_DEVICE]
            rows = cell_rows(case, images[:batch], drawn, truth, count, effort, skip)
            for row in rows:
                figures = row.reason if row.ms is None else f"{row.ms:.2f} ms, {row.to_limit or 0:.2f}×"
                clock.say(f"{row.layer}: {row.variant}: {figures}")
            yield rows
            _free(case.device)


def left_out(batches: Mapping[str, Sequence[int]]) -> list[str]:
    """What of the whole grid a run on the CPU does without, in words."""
    missing = {
        name: [batch for batch in every if batch not in batches.get(name, ())] for name, every in GPU_BATCHES.items()
    }
    return [f"{name}, batch {', '.join(map(str, some))}" for name, some in missing.items() if some]


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """All rows, on a GPU if there is one. ``quick``: a tiny tower, which proves that it runs and measures nothing.

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
    report: dict[str, Any] = {
        "quick": quick,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "tasks": TASKS,
        "rank": RANK,
        "peft": baselines.peft_version(),
        "effort": asdict(effort),
        "left_out": [] if quick or on_gpu else left_out(batches),
        "ceilings": rates,
        "rows": [],
        "progress": clock.lines,
    }
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="serving-suite-") as folder:
        for model, layer in layers.projections(quick):
            for row in layers.layer_rows(model, layer, dtype, device, layer_effort, rates):
                report["rows"].append(asdict(row))
                save(report)
        clock.say("layers are measured")
        for name, its_batches in batches.items():
            encoder = TINY_ENCODER if quick else ENCODERS[name]
            counts = (1, 4) if quick else PREFERENCES
            try:
                case = baselines.build_case(name, encoder, Path(folder), dtype, device)
                size = encoders.image_size(encoder)
                for cell in case_rows(case, size, its_batches, counts, effort, clock):
                    report["rows"] += [asdict(row) for row in cell]
                    save(report)
                case.file.unlink()
                del case
            except Exception as error:
                # what was measured is not lost to another tower's failure
                reason = f"{type(error).__name__}: {error}"[:300]
                clock.say(f"{name}: {reason}")
                failed = Row(OP, name, str(dtype).removeprefix("torch."), "all", FAILED, 0.0, False, name, 0, 0)
                report["rows"].append(asdict(replace(failed, reason=reason)))
            _free(device)
    clock.say("done")
    return report


def _batches(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == OP]


def _layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == layers.OP]


def _row(report: Mapping[str, Any], model: str, batch: int, count: int, *variants: str) -> dict[str, Any]:
    """The fastest of ``variants``; a row without figures if none was measured, with the reason of one."""
    rows = [
        row
        for row in _batches(report)
        if (row["model"], row["batch"], row["preferences"]) == (model, batch, count) and row["variant"] in variants
    ]
    timed = [row for row in rows if row["ms"] and row["matched"]]
    empty = {"ms": None, "to_limit": None, "models": None, "reason": next((row["reason"] for row in rows), None)}
    return min(timed, key=lambda row: row["ms"], default=empty)


def goals(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was aimed at on the device of the report, ``cuda`` or ``cpu`` (without one: on both): where, goal, measured,
    and ``met``, ``not met`` or ``not measured``."""
    found: list[dict[str, str]] = []

    def add(where: str, goal: str, measured: str | None, met: bool, reason: str | None = None) -> None:
        status = "not measured" if measured is None else "met" if met else "not met"
        found.append({"where": where, "goal": goal, "measured": measured or reason or "", "status": status})

    device = report.get("device")
    if device in (None, "cuda"):
        model, where = "ViT-L/14", "GPU, ViT-L/14, batch 32, 32 preferences"
        ours = _row(report, model, 32, 32, ENGINE)
        ratio = ours["to_limit"]
        text = None if ratio is None else f"{ratio:.3f}×"
        add(where, "at most 1.03× the plain merged model", text, (ratio or 0) <= 1.03, ours["reason"])
        again = _row(report, model, 32, 32, REMERGE, f"{REMERGE}{GRAPH}")
        faster = again["ms"] / ours["ms"] if again["ms"] and ours["ms"] else None
        text = None if faster is None else f"{faster:.1f}×"
        add(where, "10× as fast as merging again for each request", text, (faster or 0) >= 10, again["reason"])
        held = ours["models"]
        text = None if held is None else f"{held:.4f} models"
        add(where, "at most 1.01 models of memory for weights", text, (held or 0) <= 1.01, ours["reason"])
    if device in (None, "cpu"):
        ours = _row(report, "ViT-B/32", 32, 32, ENGINE)
        ratio = ours["to_limit"]
        text = None if ratio is None else f"{ratio:.3f}×"
        where = "CPU, ViT-B/32, batch 32, 32 preferences"
        add(where, "at most 1.15× the plain merged model", text, (ratio or 0) <= 1.15, ours["reason"])
    return found


def goals_markdown(report: Mapping[str, Any]) -> str:
    """The table of the goals."""
    lines = ["| where | goal | measured | |", "|---|---|---|---|"]
    lines += [f"| {g['where']} | {g['goal']} | {g['measured']} | {g['status']} |" for g in goals(report)]
    return "\n".join(lines) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The goals, a table for each tower and batch, and the layers."""
    effort = report["effort"]
    lines = ["A rehearsal: these figures measure nothing.", ""] if report["quick"] else []
    fewest = f"at least {effort['fewest']} calls of each variant, in turn"
    few = (
        " (fewer than a hundred: the 99th percentile is then about the slowest call)" if effort["fewest"] < 100 else ""
    )
    lines += [
        f"One batch of images, {report['dtype']}, K = {report['tasks']}, r = {report['rank']}; {fewest}{few}. Item i "
        "has preference i mod P, and every call brings new preferences, except where a variant can only know them "
        "beforehand: merged copies, PEFT's adapters. The limit is the faster of the plain models of the same rows. "
        "Memory is that of weights, in plain models"
        + (", and all of it at the peak of a call." if report["device"] == "cuda" else ".")
        + (f" PEFT {report['peft']}." if report["peft"] else " PEFT was not installed."),
        "",
    ]
    if report["left_out"]:
        lines += [f"Left out on the CPU: {'; '.join(report['left_out'])}.", ""]
    lines += [goals_markdown(report).rstrip()]
    rows = _batches(report)
    columns = ["preferences", "variant", "ms", "p20–p80", "p99", "images/s", "to the limit", "models"]
    columns += ["models at the peak"] if report["device"] == "cuda" else []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        lines += ["", f"**{model}, batch {batch}**", "", f"| {' | '.join(columns)} |"]
        lines.append("|---:|---|" + "---:|" * (len(columns) - 2))
        own = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        lines += [f"| {row['preferences']} | {row['variant']} | {_cells(row, len(columns) - 2)} |" for row in own]
    of_layers = _layers(report)
    if of_layers:
        lines += ["", "**One projection, a preference per image**", "", layers.markdown(of_layers).rstrip()]
    return "\n".join(lines) + "\n"


def summary_markdown(report: Mapping[str, Any]) -> str:
    """A line for each tower, batch and number of preferences: the time of the plain merged model, and over it those of
    the engine and of the others; of what was also captured as a CUDA graph, the faster. And the memory of copies."""
    shown = {
        "engine": (ENGINE,),
        "merging again": (REMERGE, f"{REMERGE}{GRAPH}"),
        "merged copies": (COPIES, f"{COPIES}{GRAPH}"),
        "a loop": (LOOP, f"{LOOP}{GRAPH}"),
        "PEFT": (PEFT,),
    }
    limits = [name + graph for name in (LIMIT, LIMIT_LINEAR) for graph in ("", GRAPH)]
    lines = [
        f"| | preferences | plain model, ms | {' | '.join(shown)} | memory: engine | merged copies |",
        f"|---|{'---:|' * (4 + len(shown))}",
    ]
    for model, batch, count in dict.fromkeys((r["model"], r["batch"], r["preferences"]) for r in _batches(report)):
        plain = _row(report, model, batch, count, *limits)["ms"]
        found = [_row(report, model, batch, count, *variants) for variants in shown.values()]
        cells = ["–" if plain is None else f"{plain:.1f}"]
        cells += ["–" if row["to_limit"] is None else f"{row['to_limit']:.2f}×" for row in found]
        cells += ["–" if row["models"] is None else f"{row['models']:.2f} models" for row in (found[0], found[2])]
        lines.append(f"| {model}, batch {batch} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], number: int) -> str:
    if row["ms"] is None:
        why = row["reason"] or "not measured"
        why = why if row["matched"] else f"wrong ({why}): error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}"
        return " | ".join([why.replace("|", "\\|"), *[""] * (number - 1)])
    cells = [
        f"{row['ms']:.2f}",
        f"{row['p20']:.2f}–{row['p80']:.2f}",
        f"{row['p99']:.2f}",
        f"{row['images_per_second']:.4g}",
        f"{row['to_limit']:.2f}×" if row["to_limit"] else "",
        *("" if row[name] is None else f"{row[name]:.3f}" for name in ("models", "peak_models")),
    ]
    return " | ".join(cells[:number])


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture for each tower, time over distinct preferences with a panel per batch, and one of layers at one image
    with a cold and a warm cache."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in _batches(report) if row["ms"]]
    markers, styles, written = "osD^vPX*<>", ("-", "--", ":"), []
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        batches = list(dict.fromkeys(row["batch"] for row in own))
        if len({(row["batch"], row["preferences"]) for row in own}) < 2:
            # one point makes no curve
            continue
        with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(max(4.5, 2.4 * len(batches)), 3.6), dpi=200, layout="constrained")
            panels = figure.subplots(1, len(batches), squeeze=False).flatten()
            handles = {}
            for panel, batch in zip(panels, batches, strict=True):
                here = [row for row in own if row["batch"] == batch]
                for number, name in enumerate(names):
                    line = sorted((row for row in here if row["variant"] == name), key=lambda row: row["preferences"])
                    style: dict[str, Any] = {"marker": markers[number % len(markers)], "markersize": 4, "linewidth": 1}
                    style |= {"linestyle": styles[number % len(styles)], "color": f"C{number % 10}"}
                    if line:
                        times = [row["ms"] for row in line]
                        (handles[name],) = panel.plot([row["preferences"] for row in line], times, **style)
                counts = sorted({row["preferences"] for row in here})
                panel.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="distinct preferences")
                panel.set_xticks(counts, [str(count) for count in counts])
                panel.xaxis.set_minor_locator(NullLocator())
                # milliseconds as numbers, not as powers of ten
                for of in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                    of(FuncFormatter(lambda value, _: f"{value:g}"))
                panel.grid(alpha=0.3, linewidth=0.6)
            panels[0].set_ylabel("ms")
            figure.suptitle(f"{model}, {report['dtype']}, on the {'GPU' if report['device'] == 'cuda' else 'CPU'}")
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
            path = folder / f"serving-{report['device']}-{model.lower().replace('/', '-').replace(' ', '-')}.png"
            figure.savefig(path)
        written.append(path)
    return written + layers.draw(_layers(report), folder / f"serving-{report['device']}-layers.png")
