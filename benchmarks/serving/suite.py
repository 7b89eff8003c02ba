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

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.ceilings import ceilings
from benchmarks.common.rows import Row, dtype_name
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import Clock, Effort, free
from benchmarks.common.towers import RANK, TASKS, TINY
from benchmarks.serving import folded, layers, variants
from benchmarks.serving.cells import CellRow, Truth, cell_rows, counts_for
from benchmarks.serving.folded import Case
from benchmarks.serving.names import ENGINE_AGAIN, ENGINE_DEVICE, OP
from pareto_merging.checkpoints import encoders

PREFERENCES = (1, 4, 32)
ENCODERS: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"architecture": "ViT-B-32"},
    "ViT-L/14": {"architecture": "ViT-L-14"},
}
TINY_ENCODER: dict[str, Any] = {"arguments": TINY.arguments}
# tower -> batches
GPU_BATCHES = dict.fromkeys(ENCODERS, (1, 8, 32, 128))
CPU_BATCHES: dict[str, tuple[int, ...]] = {"ViT-B/32": (1, 8, 32), "ViT-L/14": (1,)}
TINY_BATCHES: dict[str, tuple[int, ...]] = {TINY.name: (1, 4)}
# a 99th percentile wants a hundred calls; a call on the CPU takes seconds
GPU_EFFORT, GPU_LAYERS = Effort(100, 400, 1.0), Effort(100, 100, 0.0)
CPU_EFFORT, CPU_LAYERS = Effort(5, 20, 3.0), Effort(5, 20, 0.2)
QUICK_EFFORT = Effort(2, 2, 0.0, flushed=0)


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
    truth = Truth.of(case, images, drawn[0], preferences)
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
    missing = {
        name: [batch for batch in every if batch not in batches.get(name, ())] for name, every in GPU_BATCHES.items()
    }
    return [f"{name}, batch {', '.join(map(str, some))}" for name, some in missing.items() if some]


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
    report: dict[str, Any] = {
        "quick": quick,
        "device": device.type,
        "dtype": dtype_name(dtype),
        "tasks": TASKS,
        "rank": RANK,
        "peft": variants.peft_version(),
        "effort": asdict(effort),
        "left_out": [] if quick or on_gpu else left_out(batches),
        "ceilings": rates,
        "rows": [],
        "progress": clock.lines,
    }

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
