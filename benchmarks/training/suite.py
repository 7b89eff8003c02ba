"""The training suite: one optimiser step of a vision transformer, beside other ways.

Everything is measured side by side in one run, on the same models, images and heads, at the same preference: ours in
every strategy; the model merged once per step with autograd; the usual layer-wise AdaMerging computation in float32 and
in the model's type; and the limit, the same forwards and backwards of a plain model that was merged beforehand. Each
variant ends in the gradient of all learned parameters and an Adam step, and has a time only if that gradient is as near
to the same computation in a wider type as plain PyTorch's is. Weights, task vectors, images and heads are made up: time
does not depend on their values. Images are on the GPU already: nothing is read or decoded.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common.ceilings import ceilings
from benchmarks.common.goals import NOT_MET
from benchmarks.common.rows import dtype_name
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import Clock, free, suite_device
from benchmarks.common.towers import BATCH, RANK, TINY, TOWERS, VIT_B, Tower, vision_transformer
from benchmarks.training.models import CLASSES
from benchmarks.training.names import STEP
from benchmarks.training.steps import VARIANTS, StepRow, Steps, case_rows
from benchmarks.training.summary import goals
from pmkernels import dispatch


def _variants(device: torch.device, tasks: int) -> list[str]:
    """Return what can run here: kernels need a GPU, or to be interpreted."""
    kernels = dispatch.runs_kernels(device)
    return [variant for variant in VARIANTS[tasks] if kernels or variant not in ("streamed", "fused")]


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """Return all rows. ``quick``: a tiny model on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    device = suite_device("training", quick)
    clock = Clock()
    if quick:
        clock.say("a rehearsal with a tiny model: it measures nothing")
    rates = ceilings(device, quick)
    profiles: dict[str, list[dict[str, Any]]] = {}
    sources: dict[str, str] = {}
    report: dict[str, Any] = {"quick": quick, "batch": BATCH, "classes": CLASSES, "rank": RANK, "ceilings": rates}
    report |= {"sources": sources, "rows": [], "profiles": {}, "progress": clock.lines}

    def keep(row: StepRow) -> None:
        report["rows"].append(asdict(row))
        save(report)

    def add(
        tower: Tower, tasks: int, dtype: torch.dtype, variants: Sequence[str], data_free: bool, **options: Any
    ) -> None:
        sources[tower.name] = vision_transformer(TINY)[1]
        run_steps = options.pop("run_steps", None)
        steps = Steps(tower, tasks, device, dtype, lambda: rates, say=clock.say, **options)
        try:
            for row in case_rows(steps, variants, data_free=data_free, run_steps=run_steps):
                keep(row)
        except Exception as error:
            title = f"{tower.name}, K = {tasks}"
            row = StepRow(op=STEP, layer=title, dtype=dtype_name(dtype), variant="all", model=tower.name, tasks=tasks)
            row.fail(error)
            clock.say(f"{title}: {row.reason}")
            keep(row)
        steps.close()
        free(device)

    # float32 against float64: a mistake that the rounding of bfloat16 could hide
    every = [v for v in _variants(device, 8) if quick or not v.startswith("limit")]
    # three tasks are more than an interpreter can do in time
    tasks = 3 if device.type == "cuda" else 2
    add(TINY, tasks, torch.float32, every, True, batch=2, seconds=0.05, run_steps=3)
    for tower in () if quick else TOWERS:
        # plain PyTorch and a step without graphs say nothing new with fewer tasks
        for tasks in VARIANTS:
            kept = profiles if tasks == 8 else None
            add(tower, tasks, torch.bfloat16, _variants(device, tasks), tower is VIT_B and tasks == 8, profiles=kept)
    missed = {goal.where for goal in goals(report) if goal.status == NOT_MET}
    report["profiles"] = {model: profile for model, profile in profiles.items() if model in missed}
    clock.say("done")
    return report
