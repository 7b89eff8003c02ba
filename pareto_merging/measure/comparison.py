"""Which merging method for these models? Every method on one workspace, under the same rules.

- No choice looks at a label. Every method gets the same number of tries at its own hyper-parameters, and the try is
  kept whose predictions agree most with the fine-tuned models' own on unlabelled images (:meth:`Comparison.score`).
- Everything is measured on held-out images: at the equal preference, at each task's priority and one-hot preference,
  and on a grid of preferences that is the same for all.
- Each (method, seed) is one file, written when it is done: a run that dies keeps what it had and goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pareto_merging.errors import Interrupted, UserError
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.evaluation import agreement, choose_for_unseen, evaluate_model, predict
from pareto_merging.measure.metrics import hypervolume, indicators, spread, union_front
from pareto_merging.methods import individual
from pareto_merging.methods.interface import Choice, Merged, Method, Problem, check_needs
from pareto_merging.methods.registry import METHODS
from pareto_merging.preferences import (
    equal_preference,
    one_hot_preferences,
    parse_preferences,
    priority_preferences,
)
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.environment import measured
from pareto_merging.system.files import write_json

FORMAT = "pareto-comparison-result"
EFFORT = 4
# what ends one method and not the comparison: NaN, a matrix that cannot be inverted, no memory
FAILURES = (ValueError, RuntimeError, MemoryError)


def default_grid(tasks: int) -> str:
    """The preferences of a comparison beside equal, priority and one-hot, as :func:`parse_preferences` takes them:
    eleven in a line for two tasks, the paper's 36 for three, 30 at random for more."""
    return {1: "equal", 2: "grid:11", 3: "lattice:7"}.get(tasks, "dirichlet:30")


def evaluated_preferences(names: Sequence[str], grid: str) -> list[tuple[list[str], Tensor]]:
    """Every γ once, with what it is: ``equal``, ``priority:TASK``, ``one-hot:TASK``, ``grid``."""
    tasks = len(names)
    listed = [("equal", equal_preference(tasks))]
    listed += [(f"priority:{n}", gamma) for n, gamma in zip(names, priority_preferences(tasks), strict=True)]
    listed += [(f"one-hot:{n}", gamma) for n, gamma in zip(names, one_hot_preferences(tasks), strict=True)]
    listed += [("grid", gamma) for gamma in parse_preferences(grid, names)]
    found: dict[tuple[float, ...], tuple[list[str], Tensor]] = {}
    for kind, gamma in listed:
        kinds, _ = found.setdefault(tuple(round(value, 6) for value in gamma.tolist()), ([], gamma))
        if kind not in kinds:
            kinds.append(kind)
    return list(found.values())


@dataclass
class Comparison:
    """The methods on one workspace, with one seed.

    Args:
        workspace: checkpoints, heads and images; ``config.method`` sets Pareto Merging, and the steps of the others.
        effort: how many values of its hyper-parameters each method may try; 1: its published ones.
        grid: preferences, see :func:`default_grid`. folder: where learning methods keep checkpoints while they run.
        choices: by method, what it may try instead of the registry's. keep: put what each method found into ``kept``.
    """

    workspace: Workspace
    effort: int = EFFORT
    grid: str | None = None
    folder: Path | None = None
    progress: bool = True
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    keep: bool = False
    kept: dict[str, Merged] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        names = self.workspace.task_names
        self.preferences = evaluated_preferences(names, self.grid or default_grid(len(names)))
        self.evaluation = self.workspace.evaluation_tasks()
        self.tasks = self.workspace.available_merging_tasks()
        self.unseen = self.workspace.unseen_tasks()

    @cached_property
    def problem(self) -> Problem:
        """The weights as they are stored, and the images, loaded once."""
        return Problem(
            self.workspace.pretrained(),
            # the methods read every tensor many times
            {name: dict(weights) for name, weights in self.workspace.finetuned().items()},
            self.tasks,
            self.workspace.training_tasks(),
            self.workspace.config.method,
            progress=self.progress,
        )

    @cached_property
    def _individuals(self) -> Merged:
        return individual.merge(self.problem.pretrained, self.problem.finetuned)

    @cached_property
    def _teachers(self) -> dict[str, Tensor]:
        """What each fine-tuned model predicts on its own task's unlabelled images: [n] class numbers by task."""
        names = self.workspace.task_names
        rows = dict(zip(names, one_hot_preferences(len(names)), strict=True))
        found, workers = {}, self.workspace.config.workers
        for name, task in self.tasks.items():
            with _named(name):
                found[name] = predict(self._individuals.at(rows[name]), task.images, task.head, workers=workers)
        return found

    @cached_property
    def reference_point(self) -> list[float]:
        """What hypervolumes count from: chance on each evaluated task, in percent."""
        return self.workspace.chance(list(self.evaluation))

    def score(self, merged: Merged, method: Method | None = None) -> float | None:
        """What a choice maximises: agreement in percent with the fine-tuned models on the unlabelled images.

        The mean over the tasks that have images. Where the preference matters, the mean of that at the equal preference
        and of each task's own agreement at its one-hot preference (not where each preference costs a run). None without
        images: then the published values stand.
        """
        if not self.tasks:
            return None
        names = self.workspace.task_names
        equal = self._agreement(merged.model(), list(self.tasks))
        if not merged.preference_aware or (method is not None and method.runs_per_preference):
            return equal
        own = [
            self._agreement(merged.at(gamma), [name])
            for name, gamma in zip(names, one_hot_preferences(len(names)), strict=True)
            if name in self.tasks
        ]
        return (equal + math.fsum(own) / len(own)) / 2

    def _agreement(self, model: nn.Module, names: Sequence[str]) -> float:
        workers = self.workspace.config.workers
        found = []
        for name in names:
            task, wanted = self.tasks[name], self._teachers[name]
            with _named(name):
                found.append(agreement(model, task.images, task.head, wanted, workers=workers))
        return math.fsum(found) / len(found)

    def run(self, key: str) -> dict[str, Any]:
        """Method ``key`` of METHODS: tuned, measured; plain JSON. What it lacks or how it failed is in ``reason``.

        Raises UserError for weights or images that cannot be opened. Interrupted: Ctrl-C while a method learns.
        """
        method, problem = METHODS[key], self.problem
        result: dict[str, Any] = {
            "format": FORMAT,
            "method": key,
            "title": method.title,
            "seed": self.workspace.config.method.seed,
            "is_bound": method.is_bound,
            "tasks": list(self.evaluation),
            "reference_point": self.reference_point,
        }
        try:
            check_needs(method, problem)
        except ValueError as error:
            return {**result, "status": "skipped", "reason": str(error)}
        start = time.perf_counter()
        tried, best = self._tune(key, method)
        result["candidates"] = tried
        result["tuning_seconds"] = round(time.perf_counter() - start, 2)
        if best is None:
            return {**result, "status": "failed", "reason": tried[-1]["error"]}
        merged, row = best
        if self.keep:
            self.kept[key] = merged
        try:
            points = self._points(merged, method)
            unseen = self._unseen(merged, method)
        except Interrupted:
            raise
        except FAILURES as error:
            return {**result, "status": "failed", "reason": _one_line(error)}
        return {
            **result,
            "status": "done",
            "preference_aware": merged.preference_aware,
            "choice": row["choice"],
            # a run for each preference was made when it was asked for
            "seconds": round(merged.facts.get("seconds", row["seconds"]), 2),
            "peak_bytes": row["peak_bytes"],
            "facts": {k: v for k, v in merged.facts.items() if k != "lambda"},
            "points": points,
            **({"unseen": unseen} if unseen else {}),
        }

    def _tune(self, key: str, method: Method) -> tuple[list[dict[str, Any]], tuple[Merged, dict[str, Any]] | None]:
        names = self.workspace.task_names
        choices = list(self.choices.get(key, method.choices(len(names), self.workspace.config.method)))
        choices = [choice for place, choice in enumerate(choices) if choice not in choices[:place]]
        choices = choices[: self.effort if self.tasks else 1]
        tried: list[dict[str, Any]] = []
        best: tuple[Merged, dict[str, Any]] | None = None
        for number, choice in enumerate(choices):
            row: dict[str, Any] = {"choice": choice}
            tried.append(row)
            problem = self.problem
            if self.folder is not None:
                problem = Problem(**{**vars(problem), "folder": self.folder / f"{number}"})
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    merged, seconds, peak = self._timed(number, lambda p=problem, c=choice: method.run(p, c))  # type: ignore[misc]
                said = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
                row |= {"warnings": said} if said else {}
                row |= {"seconds": round(seconds, 2), "peak_bytes": peak}
                row["score"] = self.score(merged, method) if len(choices) > 1 else None
            except Interrupted:
                raise
            except FAILURES as error:
                row["error"] = _one_line(error)
                continue
            if best is None or (row["score"] is not None and row["score"] > best[1]["score"]):
                best = (merged, row)
        return tried, best

    def _timed(self, number: int, work: Callable[[], Any]) -> tuple[Any, float, int]:
        """:func:`measured`; in a folder with the seconds of the same try before Ctrl-C (a kill's are lost)."""
        if self.folder is None:
            return measured(work)
        path = self.folder / f"{number}-seconds.json"
        before = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
        start = time.perf_counter()
        try:
            merged, seconds, peak = measured(work)
        finally:
            write_json(path, before + time.perf_counter() - start)
        return merged, before + seconds, peak

    def _preferences_of(self, merged: Merged, method: Method) -> list[tuple[list[str], Tensor]]:
        if not merged.preference_aware:
            return [(["equal"], equal_preference(len(self.workspace.task_names)))]
        kept = self.preferences
        if method.is_bound:
            kept = [(kinds, g) for kinds, g in kept if any(kind.startswith("one-hot") for kind in kinds)]
        elif method.runs_per_preference and len(self.workspace.task_names) > 2:
            # a run for each: not the whole grid
            kept = [(kinds, g) for kinds, g in kept if any(k == "equal" or k.startswith("one-hot") for k in kinds)]
        return kept

    def _points(self, merged: Merged, method: Method) -> list[dict[str, Any]]:
        points = []
        for kinds, gamma in self._preferences_of(merged, method):
            scores = evaluate_model(merged.at(gamma), self.evaluation, workers=self.workspace.config.workers)
            points.append(
                {
                    "kinds": kinds,
                    "gamma": [round(value, 6) for value in gamma.tolist()] if merged.preference_aware else None,
                    "accuracy": [round(scores.accuracy[name], 4) for name in self.evaluation],
                    "entropy": [round(scores.entropy[name], 4) for name in self.evaluation],
                }
            )
        return points

    def _unseen(self, merged: Merged, method: Method) -> dict[str, Any]:
        """Per task without a checkpoint: the front's model of least entropy there (section 4.3), its accuracy."""
        found = {}
        gammas = [gamma for _, gamma in self._preferences_of(merged, method)]
        workers = self.workspace.config.workers
        for name, (unlabelled, labelled) in self.unseen.items():
            choice = choose_for_unseen(
                merged.at, gammas, unlabelled.images, unlabelled.head, workers=workers, progress=False
            )
            scores = evaluate_model(merged.at(choice.gamma), {name: labelled}, workers=workers)
            found[name] = {
                "accuracy": round(scores.average, 4),
                "entropy": round(choice.entropies[choice.index], 4),
                "gamma": [round(value, 6) for value in choice.gamma.tolist()] if merged.preference_aware else None,
            }
        return found


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """Says which task's unlabelled images a UserError is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task {task}, unlabelled {error}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def compare(
    workspace: Workspace,
    folder: Path,
    methods: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    effort: int = EFFORT,
    grid: str | None = None,
    progress: bool = True,
    on_done: Callable[[dict[str, Any], int, int, float | None], None] | None = None,
    choices: Mapping[str, Sequence[Choice]] | None = None,
) -> list[dict[str, Any]]:
    """Run the methods that have no result in ``folder`` yet, each with every seed; all results, in order.

    A result is ``METHOD-seed-SEED.json``. A failed one is tried again. ``on_done`` is called with each new result, how
    many are done, how many there are, and the seconds that are probably left (None while nothing like the work that
    waits has been done).

    Raises:
        UserError: an unknown method, or files that cannot be read. Interrupted: Ctrl-C while a method learns.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError(f"methods: expected some of {', '.join(METHODS)}; got {', '.join(unknown)}")
    config = workspace.config
    seeds = [config.method.seed] if seeds is None else seeds
    jobs = [(seed, key) for seed in seeds for key in methods]
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for seed, key in jobs:
        done = _read_result(folder / result_name(key, seed))
        if done is not None and done["status"] != "failed":
            found[seed, key] = done
    waiting = [job for job in jobs if job not in found]
    preferences = evaluated_preferences(workspace.task_names, grid or default_grid(len(workspace.task_names)))
    left = _TimeLeft({key: _weight(METHODS[key], config.method, preferences, effort) for _, key in waiting}, waiting)
    current: tuple[int, Comparison] | None = None
    for seed, key in waiting:
        if current is None or current[0] != seed:
            method = config.method.model_copy(update={"seed": seed})
            seeded = Workspace(config.model_copy(update={"method": method}), workspace.suite_folder)
            current = seed, Comparison(seeded, effort, grid, progress=progress, choices=choices or {})
        working = folder / f".{key}-seed-{seed}"
        current[1].folder = working if METHODS[key].learns else None
        start = time.monotonic()
        result = current[1].run(key)
        write_json(folder / result_name(key, seed), result)
        # what a failed method had learned is gone on from
        if result["status"] != "failed":
            shutil.rmtree(working, ignore_errors=True)
        found[seed, key] = result
        left.done(key, None if result["status"] == "skipped" else time.monotonic() - start)
        if on_done is not None:
            on_done(result, len(found), len(jobs), left.seconds())
    return [found[job] for job in jobs]


def stored_results(folder: Path, first: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every result in a comparison's folder, by seed, then the methods ``first``, then in the order of METHODS."""
    found = [_read_result(path) for path in folder.glob("*-seed-*.json")]
    order = {key: place for place, key in enumerate(dict.fromkeys((*first, *METHODS)))}
    known = [result for result in found if result is not None and result["method"] in order]
    return sorted(known, key=lambda result: (result["seed"], order[result["method"]]))


def result_name(key: str, seed: int) -> str:
    """The file of one result."""
    return f"{key}-seed-{seed}.json"


def _read_result(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a result of a comparison, got {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or "status" not in result:
        raise UserError(f"{path}: expected a result of a comparison, got another file")
    return result


class _TimeLeft:
    """How long the methods that wait will take, from those that are done: the ones that learn, and the quick ones."""

    def __init__(self, weights: Mapping[str, float], waiting: Sequence[tuple[int, str]]) -> None:
        self._weights = weights
        self._waiting, self._done, self._spent = ({True: 0.0, False: 0.0} for _ in range(3))
        for _, key in waiting:
            self._waiting[METHODS[key].learns] += weights[key]

    def done(self, key: str, seconds: float | None) -> None:
        """One is done, after so many seconds; None: it was skipped, which says nothing."""
        learns = METHODS[key].learns
        self._waiting[learns] -= self._weights[key]
        if seconds is not None:
            self._done[learns] += self._weights[key]
            self._spent[learns] += seconds

    def seconds(self) -> float | None:
        left = 0.0
        for learns, weight in self._waiting.items():
            if weight < 1e-6:
                continue
            if self._done[learns]:
                left += weight * self._spent[learns] / self._done[learns]
            elif learns:
                return None
        return left


def _weight(
    method: Method, settings: MethodSettings, preferences: Sequence[tuple[list[str], Tensor]], effort: int
) -> float:
    """How long a method takes, roughly, in runs of it."""
    tasks = len(preferences[0][1])
    runs = min(effort, len(method.choices(tasks, settings)))
    if method.runs_per_preference:
        # the equal one was run when the setting was chosen
        runs += len(preferences) - 1 if tasks <= 2 else tasks
    return float(runs)


# summaries


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures per method, each with mean, standard deviation and the values over the seeds.

    Accuracies in percent: ``equal`` (average over the tasks), ``priority`` and ``one_hot`` (of the preferred task,
    averaged over the tasks). Hypervolume as a share of the box between the reference point and 100 % (None where a head
    of one class leaves no box); IGD+ (percent points) against the union of all methods' fronts of that seed, bounds
    left out.
    """
    unions: dict[int, Any] = {}
    for seed in {r["seed"] for r in results}:
        fronts = [accuracies(r) for r in results if r["seed"] == seed and r["status"] == "done" and not r["is_bound"]]
        unions[seed] = union_front(fronts) if fronts else None
    summary: dict[str, Any] = {}
    for key in dict.fromkeys(r["method"] for r in results):
        rows = [r for r in results if r["method"] == key]
        done = [r for r in rows if r["status"] == "done"]
        entry: dict[str, Any] = {"title": rows[0]["title"], "is_bound": rows[0]["is_bound"], "seeds": len(done)}
        problems = sorted({r["reason"] for r in rows if r["status"] != "done"})
        if problems:
            entry["reasons"] = problems
            entry["failed"] = any(r["status"] == "failed" for r in rows)
        if done:
            entry["preference_aware"] = done[0]["preference_aware"]
            figures = [_figures(r, unions[r["seed"]]) for r in done]
            entry |= {name: spread([f[name] for f in figures]) for name in figures[0]}
            entry["per_task"] = {
                name: spread([_at(r, "equal", name, "one-hot") for r in done]) for name in done[0]["tasks"]
            }
            for name in done[0].get("unseen", {}):
                entry.setdefault("unseen", {})[name] = spread([r["unseen"][name]["accuracy"] for r in done])
        summary[key] = entry
    return summary


def accuracies(result: Mapping[str, Any]) -> list[list[float]]:
    """The accuracies of a result's models, [n][tasks] in percent."""
    return [point["accuracy"] for point in result["points"]]


def gammas(result: Mapping[str, Any]) -> list[list[float]] | None:
    """The preferences of a result's models, [n][K]; None for a single model."""
    return [point["gamma"] for point in result["points"]] if result["preference_aware"] else None


def _at(result: Mapping[str, Any], kind: str, task: str, otherwise: str) -> float | None:
    """The accuracy on ``task`` at preference ``kind``, or at ``otherwise:TASK`` where that was not measured."""
    index = result["tasks"].index(task)
    for wanted in (kind, f"{otherwise}:{task}"):
        for point in result["points"]:
            if wanted in point["kinds"]:
                return float(point["accuracy"][index])
    return None


def _figures(result: Mapping[str, Any], union: Any) -> dict[str, float | None]:
    tasks, points = result["tasks"], accuracies(result)
    aware = result["preference_aware"]
    equal = next((p["accuracy"] for p in result["points"] if "equal" in p["kinds"]), None)
    average = None if equal is None else math.fsum(equal) / len(equal)

    def own(kind: str) -> float | None:
        if not aware:
            return average
        found = [
            p["accuracy"][i] for i, task in enumerate(tasks) for p in result["points"] if f"{kind}:{task}" in p["kinds"]
        ]
        return math.fsum(found) / len(found) if len(found) == len(tasks) else None

    figures: dict[str, float | None] = {
        "equal": average,
        "priority": own("priority"),
        "one_hot": own("one-hot"),
        "worst_task": None if equal is None else min(equal),
        "seconds": result["seconds"],
        "tuning_seconds": result["tuning_seconds"],
        "peak_bytes": result["peak_bytes"],
    }
    if result["is_bound"]:
        return figures
    reference = result["reference_point"]
    # a preference has an entry for each merged task, accuracies one for each that has held-out images
    wanted = gammas(result) if aware and all(len(p["gamma"]) == len(tasks) for p in result["points"]) else None
    found = indicators(points, reference, wanted, union)
    # 8 tasks: 90^8 says little; a share of the box does
    has_box = max(reference) < 100
    scaled = [[(a - r) / (100 - r) for a, r in zip(point, reference, strict=True)] for point in points if has_box]
    alignment = found["alignment"] or {"cosine": None, "spearman": [None]}
    correlations = [value for value in alignment["spearman"] if value is not None]
    return figures | {
        "hypervolume": hypervolume(scaled, [0.0] * len(tasks)) if has_box else None,
        "non_dominated": found["non_dominated_points"],
        "points": len(points),
        "spacing": found["spacing"],
        "igd_plus": found["igd_plus"],
        "cosine": alignment["cosine"],
        "spearman": math.fsum(correlations) / len(correlations) if correlations else None,
    }
