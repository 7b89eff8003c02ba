"""Choices without labels: of a method's setting, and of a model for an unseen task."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.errors import Interrupted, UserError
from pareto_merging.measure.evaluation import Unlabelled, agreement, mean_entropy, predict
from pareto_merging.measure.results import Try
from pareto_merging.methods import individual
from pareto_merging.methods.interface import Choice, Merged, Method, Problem
from pareto_merging.preferences import one_hot_preferences
from pareto_merging.system.environment import measured
from pareto_merging.system.files import write_json
from pareto_merging.system.progress import progress_bar

# what ends one method and not the comparison: NaN, a matrix that cannot be inverted, no memory
FAILURES = (ValueError, RuntimeError, MemoryError)


@dataclass
class Judge:
    """The measure by which settings are chosen: agreement with the fine-tuned models on unlabelled images."""

    problem: Problem
    workers: int = 0

    @cached_property
    def teachers(self) -> dict[str, Tensor]:
        """Return what each fine-tuned model predicts on its own task's unlabelled images: [n] class numbers."""
        models = individual.merge(self.problem.pretrained, self.problem.finetuned)
        return {name: self._on_task(name, predict, models.at(gamma)) for name, gamma in self._own_preferences()}

    def _on_task(self, name: str, function: Callable[..., Any], model: nn.Module, *more: Any) -> Any:
        """Call a function on a task's unlabelled images and head. A UserError says which task's they are."""
        task = (self.problem.tasks or {})[name]
        try:
            return function(model, task.images, task.head, *more, workers=self.workers)
        except UserError as error:
            raise UserError(f"task {name}, unlabelled {error}") from error

    def _own_preferences(self) -> list[tuple[str, Tensor]]:
        """Return the tasks that have images, each with its one-hot preference."""
        names = self.problem.task_names
        rows = zip(names, one_hot_preferences(len(names)), strict=True)
        return [(name, gamma) for name, gamma in rows if name in (self.problem.tasks or {})]

    def score(self, merged: Merged, method: Method | None = None) -> float | None:
        """Return what a choice maximises: agreement in percent with the fine-tuned models.

        On the unlabelled images; the mean over the tasks that have some. Where the preference matters, the mean of that
        at the equal preference and of each task's own agreement at its one-hot preference (not where each preference
        costs a run). None without images: then the published values stand.
        """
        own_preferences = self._own_preferences()
        if not own_preferences:
            return None
        equal = self.agreement(merged.model(), [name for name, _ in own_preferences])
        if not merged.preference_aware or (method is not None and method.runs_per_preference):
            return equal
        own = [self.agreement(merged.at(gamma), [name]) for name, gamma in own_preferences]
        return (equal + math.fsum(own) / len(own)) / 2

    def agreement(self, model: nn.Module, names: Sequence[str]) -> float:
        """Return the mean agreement over these tasks, in percent."""
        return math.fsum(self._on_task(name, agreement, model, self.teachers[name]) for name in names) / len(names)


def tune(
    method: Method, problem: Problem, choices: Sequence[Choice], score: Callable[[Merged, Method], float | None]
) -> tuple[list[Try], tuple[Merged, Try] | None]:
    """Try a method's settings; return all tries, and the best with its model.

    The first of equals is the best, None where all failed. Each keeps its checkpoints in a folder of its own in the
    problem's. Raises Interrupted for Ctrl-C while a method learns.
    """
    tries: list[Try] = []
    best: tuple[Merged, Try] | None = None
    for number, choice in enumerate(choices):
        tried = Try(choice=choice)
        tries.append(tried)
        inside = problem if problem.folder is None else replace(problem, folder=problem.folder / f"{number}")
        try:
            merged = _run(method, inside, tried)
            tried.score = score(merged, method) if len(choices) > 1 else None
        except Interrupted:
            raise
        except FAILURES as error:
            tried.error = one_line(error)
            continue
        if best is None or (tried.score is not None and tried.score > (best[1].score or 0.0)):
            best = (merged, tried)
    return tries, best


def _run(method: Method, problem: Problem, tried: Try) -> Merged:
    """Run a method with one setting; note its warnings, seconds and memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged, seconds, peak_bytes = _timed(problem.folder, lambda: method.run(problem, tried.choice))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if messages:
        tried.warnings = list(dict.fromkeys(messages))
    tried.seconds, tried.peak_bytes = round(seconds, 2), peak_bytes
    return merged


def _timed(folder: Path | None, work: Callable[[], Merged]) -> tuple[Merged, float, int]:
    """Measure the work; in a folder, add the seconds of the same try before Ctrl-C. Those before a kill are lost."""
    if folder is None:
        return measured(work)
    path = folder.with_name(f"{folder.name}-seconds.json")
    before = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
    start = time.perf_counter()
    try:
        merged, seconds, peak_bytes = measured(work)
    finally:
        write_json(path, before + time.perf_counter() - start)
    return merged, before + seconds, peak_bytes


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def choose_for_unseen(
    models: Callable[[Tensor], nn.Module],
    preferences: Sequence[Tensor],
    images: Dataset[Any],
    head: nn.Module,
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> tuple[int, list[float]]:
    """Choose the model of a front with the least mean entropy on some images. Of equal entropies the first wins.

    Return its index and the mean entropy (nats) of every model. The images are of a task that none of the models was
    merged for: section 4.3 of arXiv 2408.12105. Labels are never looked at. Raises ValueError for no preferences or no
    images, UserError for logits that are not finite.

    Args:
        models: ``models(gamma)`` is the plain merged encoder at gamma, such as ``lambda gamma: merge(model, gamma)``;
            called once per preference, and one encoder is held at a time.
        preferences: the candidates, [K] each.
        images: the target's images, or pairs whose first is the image. head: the target's head.
    """
    if not len(preferences):
        raise ValueError("preferences: expected at least one, got none")
    unlabelled = Unlabelled(images)
    entropies = []
    with progress_bar("choosing", len(preferences), enabled=progress) as advance:
        for number, gamma in enumerate(preferences, start=1):
            entropies.append(mean_entropy(models(gamma), unlabelled, head, batch_size, workers))
            advance(number, f"entropy {entropies[-1]:.3f}")
    return entropies.index(min(entropies)), entropies
