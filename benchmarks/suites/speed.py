"""What a step of the expert-guided method costs beside a published one.

In one run on one core of the CPU.

Eight models of the embedded digits suite, 32 images a task. All four kinds of step take turns, so that a machine that
slows down slows all of them down. Beside their times: how many operators a step dispatches, and the bytes that these
read and write; and once, what comes before the first step.
"""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.timing import Effort, in_turn, quantiles
from benchmarks.suites import digits as study
from benchmarks.training.operators import Count
from pareto_merging.data import digits
from pareto_merging.learn.gradient import Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.prepared import prepare
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.reports import markdown_table
from pareto_merging.methods import start
from pareto_merging.model.parametrize import parametrize
from pareto_merging.run.config import RunConfig
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.devices import one_thread

TASKS = 8
PRESETS = ("icml2025", "expert")
AT_ONCE: tuple[TasksAtOnce, ...] = ("one", "all")


def run(
    seeds: Sequence[int], quick: bool = False, progress: bool = True, work: Path | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Measure with the first seed. Arguments as of the study (:mod:`.digits`), whose work folder has its encoders."""
    effort, tasks = (Effort(2, 2, 0), 2) if quick else (Effort(20, 60, 20.0), TASKS)
    with tempfile.TemporaryDirectory() as temporary, one_thread():
        suite = (Path(temporary) if work is None else work) / f"seed-{seeds[0]}" / "suite"
        study.make_encoders(suite, seeds[0])
        learners, before = {}, {}
        for preset, at_once in itertools.product(PRESETS, AT_ONCE):
            learners[preset, at_once], before[preset] = _learner(suite, seeds[0], preset, at_once, tasks, quick)
            if progress:
                print(f"{preset}, tasks at once: {at_once}; {before[preset]}", flush=True)
        steps = {key: _Steps(learner) for key, learner in learners.items()}
        counted = {key: step.count() for key, step in steps.items()}
        cpu = torch.device("cpu")
        names = {f"{preset}, {at_once}": steps[preset, at_once] for preset, at_once in steps}
        times = in_turn(names, effort, cpu, lambda name, number, result: None)
    rows = [
        {
            "preset": preset,
            "tasks_at_once": at_once,
            **quantiles(times[f"{preset}, {at_once}"]),
            **counted[preset, at_once],
        }
        for preset, at_once in steps
    ]
    return {"seeds": [seeds[0]], "tasks": tasks, "rows": [{**row, "matched": True} for row in rows], "before": before}


class _Steps:
    """A learner's steps, one a call, with the reading of their images."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.done, self.batches = learner, 0, learner.batches(0, 0)

    def __call__(self, number: int) -> None:
        self.done += 1
        self.learner.step(self.done, next(self.batches))

    def count(self) -> dict[str, int]:
        """Return operators of a step and their bytes. After steps that make what is kept."""
        for number in range(2):
            self(number)
        with Count() as counted:
            self(2)
        return {"operators": counted.counts.total(), "bytes": counted.bytes}


def _learner(
    suite: Path, seed: int, preset: str, at_once: TasksAtOnce, count: int, quick: bool
) -> tuple[Learner, dict[str, float]]:
    """Return what learns, and the seconds of the start and of asking the experts."""
    method = MethodSettings.model_validate({**study.METHOD, "preset": preset, "steps": 1000, "seed": seed})
    images = 16 if quick else digits.SPLIT_SIZES["merging"]
    method = method.model_copy(update={"start_images": images, "batch_size": min(32, images)})
    values: dict[str, Any] = {"suite": "digits", "tasks": study.TASKS[count], "method": {"preset": preset}}
    workspace = Workspace(RunConfig.model_validate(values), suite)
    pretrained, finetuned, tasks = workspace.pretrained(), workspace.finetuned(), workspace.merging_tasks()
    model = parametrize(pretrained, finetuned, **method.model_arguments())
    began = time.perf_counter()
    start.begin(model, pretrained, finetuned, tasks, method, progress=False)
    started = time.perf_counter()
    copies = finetuned if preset == "expert" else None
    prepared = prepare(model, tasks, method, copies, folder=None, resume=False, progress=False, warn=lambda text: None)
    learner = Learner(model, prepared.tasks, prepared.settings, Execution(tasks_at_once=at_once))
    seconds = {"start": started - began, "experts": time.perf_counter() - started}
    return learner, {name: round(value, 2) for name, value in seconds.items()}


def markdown(report: Mapping[str, Any]) -> str:
    """Return times of a step, and what they are beside the published one."""
    columns = [
        "preset",
        "tasks at once",
        "ms a step",
        "20 % to 80 %",
        "÷ published",
        "operators",
        "MB read and written",
    ]
    published = {row["tasks_at_once"]: row["ms"] for row in report["rows"] if row["preset"] == PRESETS[0]}
    rows = [
        [
            row["preset"],
            row["tasks_at_once"],
            f"{row['ms']:.0f}",
            f"{row['p20']:.0f} to {row['p80']:.0f}",
            f"{row['ms'] / published[row['tasks_at_once']]:.2f}",
            f"{row['operators']}",
            f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in report["rows"]
    ]
    once = report["before"]["expert"]
    note = f"Before the first step of `expert`: {once['start']:.1f} s of the closed form, {once['experts']:.1f} s of"
    return f"{markdown_table(columns, rows)}\n{note} asking the experts.\n"
