"""Which merging method for these models? Every method on them, under the same rules.

- No choice looks at a label. Every method gets the same number of tries at its own hyper-parameters, and the try is
  kept whose predictions agree most with the fine-tuned models' own on unlabelled images (:meth:`.Judge.score`).
- Everything is measured on held-out images: at the equal preference, at each task's priority and one-hot preference,
  and on a grid of preferences that is the same for all.
- Each (method, seed) is one file, written when it is done: a run that dies keeps what it had and goes on from there.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, UserError
from pareto_merging.learn.gradient import TasksAtOnce
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.choose import FAILURES, Judge, choose_for_unseen, one_line, tune
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.measure.results import Measured, Point, Result, UnseenScore, read_result, result_name
from pareto_merging.methods.interface import Choice, Merged, Method, Problem, check_needs
from pareto_merging.methods.registry import METHODS
from pareto_merging.preferences import equal_preference, one_hot_preferences, parse_preferences, priority_preferences
from pareto_merging.system.files import write_json

EFFORT = 4


class Compared(Protocol):
    """What a comparison is of: models, images and settings, such as :class:`pareto_merging.run.workspace.Workspace`.

    Images are by task, of the tasks that have them; of unseen tasks, those to choose a model by and those to judge it.
    """

    @property
    def task_names(self) -> list[str]: ...
    @property
    def method(self) -> MethodSettings: ...
    @property
    def workers(self) -> int: ...
    @property
    def tasks_at_once(self) -> TasksAtOnce: ...
    def with_seed(self, seed: int) -> "Compared": ...
    def pretrained(self) -> nn.Module: ...
    def finetuned(self) -> Mapping[str, Mapping[str, Tensor]]: ...
    def available_merging_tasks(self) -> Mapping[str, Task]: ...
    def training_tasks(self) -> Mapping[str, Task]: ...
    def evaluation_tasks(self) -> Mapping[str, Task]: ...
    def unseen_tasks(self) -> Mapping[str, tuple[Task, Task]]: ...
    def chance(self, names: Sequence[str]) -> list[float]: ...


def default_grid(tasks: int) -> str:
    """Return a comparison's further preferences. Two tasks: 11 in a line; three: the paper's 36; more: 30 at random."""
    return {1: "equal", 2: "grid:11", 3: "lattice:7"}.get(tasks, "dirichlet:30")


def evaluated_preferences(names: Sequence[str], grid: str) -> list[tuple[list[str], Tensor]]:
    """Return every γ once, with what it is: ``equal``, ``priority:TASK``, ``one-hot:TASK``, ``grid``."""
    tasks = len(names)
    listed = [("equal", equal_preference(tasks))]
    listed += [(f"priority:{n}", gamma) for n, gamma in zip(names, priority_preferences(tasks), strict=True)]
    listed += [(f"one-hot:{n}", gamma) for n, gamma in zip(names, one_hot_preferences(tasks), strict=True)]
    listed += [("grid", gamma) for gamma in parse_preferences(grid, names)]
    distinct: dict[tuple[float, ...], tuple[list[str], Tensor]] = {}
    for kind, gamma in listed:
        kinds, _ = distinct.setdefault(tuple(_rounded(gamma)), ([], gamma))
        if kind not in kinds:
            kinds.append(kind)
    return list(distinct.values())


def _rounded(gamma: Tensor) -> list[float]:
    return [round(value, 6) for value in gamma.tolist()]


@dataclass
class Comparison:
    """The methods on one set of models, with one seed.

    Args:
        models: checkpoints, heads and images; its ``method`` sets Pareto Merging, and the steps of the others.
        effort: how many values of its hyper-parameters each method may try; 1: its published ones.
        grid: preferences, see :func:`default_grid`. folder: where learning methods keep checkpoints while they run.
        choices: by method, what it may try instead of the registry's. keep: put what each method found into ``kept``.
    """

    models: Compared
    effort: int = EFFORT
    grid: str | None = None
    folder: Path | None = None
    progress: bool = True
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    keep: bool = False
    kept: dict[str, Merged] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        names = self.models.task_names
        self.preferences = evaluated_preferences(names, self.grid or default_grid(len(names)))
        self.evaluation = self.models.evaluation_tasks()
        self.tasks = self.models.available_merging_tasks()
        self.unseen = self.models.unseen_tasks()

    @cached_property
    def problem(self) -> Problem:
        """Return the weights as they are stored, and the images, loaded once."""
        return Problem(
            self.models.pretrained(),
            # the methods read every tensor many times
            {name: dict(weights) for name, weights in self.models.finetuned().items()},
            self.tasks,
            self.models.training_tasks(),
            self.models.method,
            progress=self.progress,
            tasks_at_once=self.models.tasks_at_once,
        )

    @cached_property
    def judge(self) -> Judge:
        """Return what scores a method's settings."""
        return Judge(self.problem, self.models.workers)

    @cached_property
    def reference_point(self) -> list[float]:
        """Return what hypervolumes count from: chance on each evaluated task, in percent."""
        return self.models.chance(list(self.evaluation))

    def run(self, key: str) -> Result:
        """Tune and measure method ``key`` of METHODS. What it lacks or how it failed is the result's ``reason``.

        Raises UserError for weights or images that cannot be opened, Interrupted for Ctrl-C while a method learns.
        """
        method, problem = METHODS[key], replace(self.problem, folder=self.folder)
        about: dict[str, Any] = {"method": key, "title": method.title, "is_bound": method.is_bound}
        about |= {"seed": problem.method.seed, "tasks": list(self.evaluation), "reference_point": self.reference_point}
        try:
            check_needs(method, problem)
        except ValueError as error:
            return Result(**about, status="skipped", reason=str(error))
        start = time.perf_counter()
        tries, best = tune(method, problem, self._choices(key, method), self.judge.score)
        about |= {"candidates": tries, "tuning_seconds": round(time.perf_counter() - start, 2)}
        if best is None:
            return Result(**about, status="failed", reason=str(tries[-1].error))
        merged, tried = best
        if self.keep:
            self.kept[key] = merged
        try:
            points = self._points(merged, method)
            if unseen := self._unseen(merged, method):
                about["unseen"] = unseen
        except Interrupted:
            raise
        except FAILURES as error:
            return Result(**about, status="failed", reason=one_line(error))
        return Measured(
            **about,
            status="done",
            preference_aware=merged.preference_aware,
            choice=tried.choice,
            # a run for each preference was made when it was asked for
            seconds=round(merged.facts.get("seconds", tried.seconds or 0.0), 2),
            peak_bytes=tried.peak_bytes or 0,
            facts={name: fact for name, fact in merged.facts.items() if name != "lambda"},
            points=points,
        )

    def _choices(self, key: str, method: Method) -> list[Choice]:
        """Return the settings that a method may try; one without images to choose by."""
        names = self.models.task_names
        choices = list(self.choices.get(key, method.choices(len(names), self.models.method)))
        choices = [choice for place, choice in enumerate(choices) if choice not in choices[:place]]
        return choices[: self.effort if self.tasks else 1]

    def _preferences_of(self, merged: Merged, method: Method) -> list[tuple[list[str], Tensor]]:
        """Return the preferences that a method is measured at."""
        if not merged.preference_aware:
            return [(["equal"], equal_preference(len(self.models.task_names)))]
        wanted: tuple[str, ...] = ("",)
        if method.is_bound:
            wanted = ("one-hot",)
        elif method.runs_per_preference and len(self.models.task_names) > 2:
            # a run for each: not the whole grid
            wanted = ("equal", "one-hot")
        return [(kinds, gamma) for kinds, gamma in self.preferences if any(kind.startswith(wanted) for kind in kinds)]

    def _points(self, merged: Merged, method: Method) -> list[Point]:
        points = []
        for kinds, gamma in self._preferences_of(merged, method):
            scores = evaluate_model(merged.at(gamma), self.evaluation, workers=self.models.workers)
            rounded = _rounded(gamma) if merged.preference_aware else None
            accuracy = [round(value, 4) for value in scores.accuracy.values()]
            entropy = [round(value, 4) for value in scores.entropy.values()]
            points.append(Point(kinds=kinds, gamma=rounded, accuracy=accuracy, entropy=entropy))
        return points

    def _unseen(self, merged: Merged, method: Method) -> dict[str, UnseenScore]:
        """Measure, per task without a checkpoint, the front's model of least entropy there (section 4.3)."""
        scored = {}
        gammas = [gamma for _, gamma in self._preferences_of(merged, method)]
        workers = self.models.workers
        for name, (unlabelled, labelled) in self.unseen.items():
            images, head = unlabelled.images, unlabelled.head
            index, entropies = choose_for_unseen(merged.at, gammas, images, head, workers=workers, progress=False)
            scores = evaluate_model(merged.at(gammas[index]), {name: labelled}, workers=workers)
            scored[name] = UnseenScore(
                accuracy=round(scores.average, 4),
                entropy=round(entropies[index], 4),
                gamma=_rounded(gammas[index]) if merged.preference_aware else None,
            )
        return scored


def seconds_left(runs: Mapping[str, float], waiting: Sequence[str], done: Sequence[tuple[str, float]]) -> float | None:
    """Return the seconds that waiting methods will probably take, judged by those done.

    Quick ones apart; None while nothing like what waits was done. ``runs``: of each method, see :func:`count_runs`.
    ``done``: methods and their seconds.
    """
    left = 0.0
    for learns in (True, False):
        weight = sum(runs[key] for key in waiting if METHODS[key].learns == learns)
        alike = [(runs[key], seconds) for key, seconds in done if METHODS[key].learns == learns]
        if weight and alike:
            left += weight * sum(seconds for _, seconds in alike) / sum(count for count, _ in alike)
        elif weight and learns:
            return None
    return left


def count_runs(
    method: Method, settings: MethodSettings, preferences: Sequence[tuple[list[str], Tensor]], effort: int
) -> float:
    """Return how many runs of itself a method takes, roughly."""
    tasks = len(preferences[0][1])
    runs = min(effort, len(method.choices(tasks, settings)))
    if method.runs_per_preference:
        # the equal one was run when the setting was chosen
        runs += len(preferences) - 1 if tasks <= 2 else tasks
    return float(runs)


def compare(
    models: Compared,
    folder: Path,
    methods: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    effort: int = EFFORT,
    grid: str | None = None,
    progress: bool = True,
    on_done: Callable[[Result, int, int, float | None], None] | None = None,
    choices: Mapping[str, Sequence[Choice]] | None = None,
) -> list[Result]:
    """Run the methods that have no result yet, each with every seed; return all results.

    A result is ``METHOD-seed-SEED.json``. A failed one is tried again. ``on_done`` is called with each new result, how
    many are done, how many there are, and the seconds that are probably left (None while nothing like the work that
    waits has been done). Raises as :meth:`Comparison.run`, and UserError for an unknown method.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError(f"methods: expected some of {', '.join(METHODS)}; got {', '.join(unknown)}")
    jobs = [(seed, key) for seed in ([models.method.seed] if seeds is None else seeds) for key in methods]
    results = {(seed, key): read_result(folder / result_name(key, seed)) for seed, key in jobs}
    finished = {job: result for job, result in results.items() if result is not None and result.status != "failed"}
    waiting = [job for job in jobs if job not in finished]
    preferences = evaluated_preferences(models.task_names, grid or default_grid(len(models.task_names)))
    runs = {key: count_runs(METHODS[key], models.method, preferences, effort) for _, key in waiting}
    done: list[tuple[str, float]] = []
    comparison: Comparison | None = None
    for number, (seed, key) in enumerate(waiting, start=1):
        if comparison is None or comparison.models.method.seed != seed:
            comparison = Comparison(models.with_seed(seed), effort, grid, progress=progress, choices=choices or {})
        working = folder / f".{key}-seed-{seed}"
        comparison.folder = working if METHODS[key].learns else None
        start = time.monotonic()
        result = comparison.run(key)
        write_json(folder / result_name(key, seed), result.to_json())
        # what a failed method had learned is gone on from
        if result.status != "failed":
            shutil.rmtree(working, ignore_errors=True)
        finished[seed, key] = result
        if result.status != "skipped":
            done.append((key, time.monotonic() - start))
        if on_done is not None:
            left = seconds_left(runs, [later for _, later in waiting[number:]], done)
            on_done(result, len(finished), len(jobs), left)
    return [finished[job] for job in jobs]
