"""What each part of expert-guided Pareto Merging gives, on the embedded digits suite. `benchmarks.run --suite expert`.

One change at a time, nothing chosen: every run has the preset ``expert`` with as many steps as the study gives the
published method. Beside the ablations: ranks, few images, whether a preference is needed at all (also in a suite with
more conflict), and teachers that are wrong. Results are kept in a work folder, run by run: an interrupted suite goes on
from there.
"""

import hashlib
import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from benchmarks.common.parallel import in_parallel
from benchmarks.suites import digits as study
from pareto_merging.data import digits
from pareto_merging.data.tasks import Task
from pareto_merging.learn.distillation import Distillation, Outputs
from pareto_merging.learn.objectives import OBJECTIVES, ObjectiveKind, TaskTerms, register
from pareto_merging.measure.comparison import Comparison
from pareto_merging.measure.metrics import Spread
from pareto_merging.measure.reports import markdown_table
from pareto_merging.measure.results import Measured, Result, read_result
from pareto_merging.measure.summary import cell, summarize
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.config import RunConfig
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.devices import one_thread
from pareto_merging.system.files import write_json

# half and a quarter of the width, and crowded heads: more is asked of one encoder than it holds
SUITES: dict[str, dict[str, Any]] = {
    "digits": digits.ENCODER,
    "width 48": {**digits.ENCODER, "width": 48, "output_dim": 8},
    "width 24": {**digits.ENCODER, "width": 24, "output_dim": 8},
}
DIVERGENCES = ("reverse-kl", "hard-labels")
CHANCE, FOREIGN = "a teacher at chance", "another task's images"
WRONG_TASK, OTHER_TASK = "upright", "inverted"


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        part, name: the table, and the line. method, changes: what is run, and its settings beside the preset's.
        tasks: how many models. images: unlabelled ones of each task. suite: of :data:`SUITES`.
        wrong: which teacher or images are wrong. whole: measured on the grid of preferences too, for hypervolumes.
    """

    part: str
    name: str
    method: str = "pareto-expert"
    changes: Mapping[str, Any] = field(default_factory=dict)
    tasks: int = 8
    images: int = digits.SPLIT_SIZES["merging"]
    suite: str = "digits"
    wrong: str = ""
    whole: bool = False

    @property
    def file(self) -> str:
        """Return the name of its result. Lines that are the same run have the same."""
        run = {name: value for name, value in asdict(self).items() if name not in ("part", "name")}
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        return f"{self.method}-{digest[:16]}.json"


class _Divergence(Distillation):
    """Other distances between two predictions, by the objective's name: what did not work."""

    def terms(self, task: int, outputs: Outputs, targets: Tensor | None) -> TaskTerms:
        kind, logits = self.loss.objective, outputs.logits
        if kind not in DIVERGENCES or logits is None or targets is None:
            return super().terms(task, outputs, targets)
        agreement, *watched = super().terms(task, outputs, targets).watched
        targets = targets.to(logits)
        if kind == "hard-labels":
            return TaskTerms(F.cross_entropy(logits, targets.argmax(dim=-1)), (agreement, *watched))
        temperature = self.loss.temperature
        own, teacher = (torch.log_softmax(t / temperature, dim=-1) for t in (logits, targets))
        divergence = temperature**2 * F.kl_div(teacher, own, reduction="batchmean", log_target=True)
        return TaskTerms(divergence, (agreement, *watched))


def _register() -> None:
    for name in DIVERGENCES:
        if name not in OBJECTIVES:
            register(ObjectiveKind(name, _Divergence, has_teachers=True))


_ONE_GAMMA: dict[str, Any] = {"preference": "dirichlet", "preferences_per_step": 4}
_PUBLISHED = {"start": "pretrained", "constant_rank": 0, **_ONE_GAMMA, "preferences_per_step": 1, "concentration": 0.1}
_PUBLISHED |= {"scalarization": "smooth-tchebycheff", "tensor_norm": 0.1, "schedule": "constant", "temperature": 1.0}
_PUBLISHED |= {"warm_up": 0}
_PER_ITEM = {"preference": "per-item", "scalarization": "linear", "tensor_norm": 0.0, "concentration": 0.3}
_RATES: dict[str, Any] = {"temperature": 4.0, "schedule": "cosine", "warm_up": 10}
_LADDER = {
    "published: entropy, one γ a step": {**_PUBLISHED, "objective": "entropy"},
    "+ the fine-tuned models teach": _PUBLISHED,
    "+ a preference for each image": {**_PUBLISHED, **_PER_ITEM},
    "+ temperature 4, warm-up, cosine": {**_PUBLISHED, **_PER_ITEM, **_RATES},
    "+ constant term of rank 32": {**_PUBLISHED, **_PER_ITEM, **_RATES, "constant_rank": 32},
    "+ start from the closed form: expert": {},
}
_CHANGES: dict[str, dict[str, Any]] = {
    "closed form alone": {"steps": 0},
    "start: RegMean": {"start": "regmean"},
    "start: pretrained": {"start": "pretrained"},
    "no constant term": {"constant_rank": 0},
    "no term that depends on γ": {"low_rank": "none"},
    "entropy instead of KL": {"objective": "entropy"},
    "features' cosine, no head": {"objective": "features"},
    "KL and features": {"features_weight": 10.0},
    "reverse KL": {"objective": "reverse-kl"},
    "hard labels of the teachers": {"objective": "hard-labels"},
    "four γ a step, linear": _ONE_GAMMA,
    "four γ a step, smooth Tchebycheff": {**_ONE_GAMMA, "scalarization": "smooth-tchebycheff"},
    "T 1": {"temperature": 1.0},
    "T 8": {"temperature": 8.0},
    "p 0.1": {"concentration": 0.1},
    "p 1": {"concentration": 1.0},
    "50 steps": {"steps": 50},
    "200 steps": {"steps": 200},
    "three times the rates": {"learning_rate": 3e-3, "lambda_learning_rate": 3e-2},
    "no warm-up": {"warm_up": 0},
}
_NEEDED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("individual models", "individual", {}),
    ("RegMean", "regmean", {}),
    ("published", "pareto", {}),
    ("expert-guided, no term of γ", "pareto-expert", {"low_rank": "none"}),
    ("expert-guided", "pareto-expert", {}),
)
_METHODS_OF_IMAGES = ("pareto-expert", "pareto-closed-form", "pareto", "regmean")
CASES = (
    *(Case("ladder", name, changes=changes) for name, changes in _LADDER.items()),
    *(Case("ranks", f"rank {rank}", changes={"rank": rank}, whole=True) for rank in (2, 4, 8, 16)),
    *(Case("ablations", name, changes=changes) for name, changes in _CHANGES.items()),
    *(
        Case("images", f"{images}: {METHODS[key].title}", key, images=images)
        for images in (16, 64, 400)
        for key in _METHODS_OF_IMAGES
    ),
    *(
        Case("need", f"{tasks} models, {what}", key, changes, tasks)
        for tasks in (2, 3, 8)
        for what, key, changes in _NEEDED[-2:]
    ),
    *(
        Case("need", f"8 models of {suite}, {what}", key, changes, suite=suite)
        for suite in SUITES
        if suite != "digits"
        for what, key, changes in _NEEDED
    ),
    *(Case("wrong", name, wrong=name) for name in ("none", CHANCE, FOREIGN)),
)


class Altered:
    """A workspace with fewer images, or with something wrong."""

    def __init__(self, workspace: Workspace, case: Case) -> None:
        self._workspace, self._case = workspace, case

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workspace, name)

    def available_merging_tasks(self) -> dict[str, Task]:
        """Return the unlabelled images that the case allows."""
        tasks = self._workspace.available_merging_tasks()
        if self._case.wrong == FOREIGN:
            tasks[WRONG_TASK] = Task(tasks[OTHER_TASK].images, tasks[WRONG_TASK].head)
        few = range(self._case.images)
        return {name: Task(Subset(task.images, few), task.head) for name, task in tasks.items()}

    def finetuned(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the fine-tuned weights; one whose projection is shuffled answers by chance."""
        weights: dict[str, Mapping[str, Tensor]] = dict(self._workspace.finetuned())
        if self._case.wrong == CHANCE:
            own = dict(weights[WRONG_TASK])
            order = torch.randperm(own["proj"].numel(), generator=torch.Generator().manual_seed(0))
            own["proj"] = own["proj"].flatten()[order].view_as(own["proj"])
            weights[WRONG_TASK] = own
        return weights


def _workspace(folder: Path, seed: int, case: Case, quick: bool) -> Altered:
    method = {**study.METHOD, "steps": study.STEPS[case.tasks], "seed": seed}
    if quick:
        method |= {"steps": 2, "batch_size": 8}
        case = replace(case, images=min(case.images, 16), tasks=2)
    values = {"suite": "digits", "tasks": study.TASKS[case.tasks], "method": method, "tasks_at_once": "all"}
    return Altered(Workspace(RunConfig.model_validate(values), folder), case)


def _suite(folder: Path, seed: int, case: Case) -> Path:
    """Return the folder of a case's encoders; they are trained where they are not there."""
    path = folder / f"seed-{seed}" / ("suite" if case.suite == "digits" else case.suite.replace(" ", "-"))
    study.make_encoders(path, seed, SUITES[case.suite])
    return path


def measure(case: Case, seed: int, folder: Path, quick: bool = False) -> Result:
    """Run one case with one seed, or read what is there."""
    path = folder / f"seed-{seed}" / ("quick-expert" if quick else "expert") / case.file
    before = read_result(path)
    if before is not None and before.status != "failed":
        return _named(before, case)
    _register()
    with one_thread(), warnings.catch_warnings(record=True):
        models = _workspace(_suite(folder, seed, case), seed, case, quick)
        grid = None if case.whole and not quick else "equal"
        changes = dict(case.changes)
        if quick and changes.get("steps"):
            changes["steps"] = 3
        choices = {case.method: [changes]}
        comparison = Comparison(models, effort=1, grid=grid, progress=False, choices=choices, keep=True)
        result = comparison.run(case.method)
        if isinstance(result, Measured) and (merged := comparison.kept.get(case.method)) is not None:
            result = result.model_copy(update={"facts": {"folded": folded_size(merged.pareto), **_found(result.facts)}})
    write_json(path, result.to_json())
    return _named(result, case)


def _named(result: Result, case: Case) -> Result:
    return result.model_copy(update={"method": case.name, "title": case.name})


def _found(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a method's facts says what was chosen."""
    return {name: facts[name] for name in ("chosen", "start") if name in facts}


def folded_size(model: nn.Module | None) -> float:
    """Return the numbers of a folded model over those of the plain one."""
    from pareto_merging.model.fold import fold, merge
    from pareto_merging.model.state import pareto_state
    from pareto_merging.preferences import equal_preference

    if model is None:
        return 1.0
    plain = merge(model, equal_preference(len(pareto_state(model).task_names)))
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (fold(model), plain)]
    return round(sizes[0] / sizes[1], 4)


def run(
    seeds: Sequence[int], quick: bool = False, progress: bool = True, work: Path | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Measure every case with every seed. Arguments as of the study (:mod:`.digits`), whose work folder will do."""
    cases = [case for case in CASES if not quick or case.name in ("rank 2", "closed form alone", "16: RegMean")]
    jobs_wanted = [(case, seed) for seed in seeds for case in cases]
    # of lines that are the same run one is measured, and the others read it
    measured = {(case.file, seed): (case, seed) for case, seed in reversed(jobs_wanted)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        for case in {case.suite: case for case in cases}.values():
            for seed in seeds:
                _suite(folder, seed, case)
        calls = [(case, seed, folder, quick) for case, seed in reversed(measured.values())]
        for number, (case, seed, *_) in enumerate(in_parallel(measure, calls, jobs), start=1):
            if progress:
                seconds = time.perf_counter() - start
                print(f"[{number}/{len(calls)}] seed {seed}: {case.part}, {case.name} ({seconds:.0f} s)", flush=True)
        parts: dict[str, dict[str, Any]] = {}
        for case in cases:
            own = [measure(case, seed, folder, quick) for seed in seeds]
            parts.setdefault(case.part, {})[case.name] = _summary(own)
    return {"seeds": list(seeds), "steps": study.STEPS, "parts": parts}


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return a case's figures over its seeds, tasks and warnings too."""
    entry = summarize(results)[results[0].method]
    wanted = ("equal", "priority", "one_hot", "hypervolume", "spearman", "seconds")
    figures: dict[str, Any] = {name: asdict(entry.figures[name]) for name in wanted if name in entry.figures}
    done = [result for result in results if isinstance(result, Measured)]
    if done:
        figures["per_task"] = {name: asdict(spread) for name, spread in entry.per_task.items()}
        figures["folded"] = max(float(result.facts.get("folded", 1.0)) for result in done)
        figures["warnings"] = sorted(
            {w for result in done for tried in result.candidates for w in tried.warnings or ()}
        )
        figures["chosen"] = [result.facts.get("chosen", {}).get("step") for result in done]
    if entry.reasons:
        figures["reasons"] = entry.reasons
    return figures


def _cells(figures: Mapping[str, Any], *names: str) -> list[str]:
    looks = {"hypervolume": (100, 1), "spearman": (1, 2)}
    spreads = {name: Spread(**figures[name]) for name in names if name in figures}
    return [cell(spreads.get(name), *looks.get(name, (1, 1))) for name in names]


def _table(report: Mapping[str, Any], part: str, columns: Sequence[str], names: Sequence[str], first: str) -> str:
    entries = report["parts"].get(part, {})
    return markdown_table([first, *columns], [[name, *_cells(own, *names)] for name, own in entries.items()])


def markdown(report: Mapping[str, Any]) -> str:
    """Return the ladder from the published method to ours."""
    seeds = ", ".join(str(seed) for seed in report["seeds"])
    columns, names = ("equal", "priority", "one-hot", "Spearman"), ("equal", "priority", "one_hot", "spearman")
    table = _table(report, "ladder", columns, names, "eight models, 100 steps")
    return f"Held-out accuracy in percent, mean ± standard deviation over suite seeds {seeds}:\n\n{table}"


def ablations_markdown(report: Mapping[str, Any]) -> str:
    """Return the preset with one change at a time."""
    names = ("equal", "priority", "one_hot", "spearman")
    return _table(report, "ablations", ("equal", "priority", "one-hot", "Spearman"), names, "change")


def ranks_markdown(report: Mapping[str, Any]) -> str:
    """Return ranks, and how large a folded model is."""
    columns = ["rank", "equal", "priority", "one-hot", "hypervolume", "folded"]
    rows = [
        [name, *_cells(own, "equal", "priority", "one_hot", "hypervolume"), f"{own.get('folded', math.nan):.3f} models"]
        for name, own in report["parts"].get("ranks", {}).items()
    ]
    return markdown_table(columns, rows)


def images_markdown(report: Mapping[str, Any]) -> str:
    """Return methods with few images."""
    names = ("equal", "priority", "one_hot")
    return _table(report, "images", ("equal", "priority", "one-hot"), names, "images of each task: method")


def need_markdown(report: Mapping[str, Any]) -> str:
    """Return what a preference gives beside one model learned in the same way."""
    names = ("equal", "priority", "one_hot", "spearman")
    return _table(report, "need", ("equal", "priority", "one-hot", "Spearman"), names, "models")


def wrong_markdown(report: Mapping[str, Any]) -> str:
    """Return what wrong teachers do, to their own task and to the others."""
    rows = []
    for name, own in report["parts"].get("wrong", {}).items():
        tasks = own.get("per_task", {})
        others = [entry["mean"] for task, entry in tasks.items() if task != WRONG_TASK]
        mean = f"{math.fsum(others) / len(others):.1f}" if others else "–"
        affected = f"{tasks[WRONG_TASK]['mean']:.1f}" if WRONG_TASK in tasks else "–"
        warned = "; ".join(own.get("warnings", ())) or "nothing"
        rows.append([name, affected, mean, warned])
    return markdown_table([f"wrong with {WRONG_TASK}", WRONG_TASK, "the other seven", "what the log says"], rows)
