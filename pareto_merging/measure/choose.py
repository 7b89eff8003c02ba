"""Choices without labels: of a method's setting, and of a model for an unseen task."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.errors import UserError
from pareto_merging.measure.evaluation import Unlabelled, agreement, mean_entropy, predict
from pareto_merging.methods import individual
from pareto_merging.methods.interface import Merged, Method, Problem
from pareto_merging.preferences import one_hot_preferences
from pareto_merging.system.progress import progress_bar


@dataclass
class Judge:
    """The measure by which settings are chosen: agreement with the fine-tuned models on unlabelled images."""

    problem: Problem
    workers: int = 0

    @cached_property
    def individuals(self) -> Merged:
        """Return the fine-tuned models, each at its one-hot preference."""
        return individual.merge(self.problem.pretrained, self.problem.finetuned)

    @cached_property
    def teachers(self) -> dict[str, Tensor]:
        """Return what each fine-tuned model predicts on its own task's unlabelled images: [n] class numbers."""
        predictions = {}
        for name, gamma in self._own_preferences():
            task = (self.problem.tasks or {})[name]
            with _named(name):
                predictions[name] = predict(self.individuals.at(gamma), task.images, task.head, workers=self.workers)
        return predictions

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
        shares = []
        for name in names:
            task, wanted = (self.problem.tasks or {})[name], self.teachers[name]
            with _named(name):
                shares.append(agreement(model, task.images, task.head, wanted, workers=self.workers))
        return math.fsum(shares) / len(shares)


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """Say which task's unlabelled images a UserError is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task {task}, unlabelled {error}") from error


@dataclass(frozen=True, eq=False)
class UnseenChoice:
    """The model chosen for an unseen task.

    Its index and preference [K], and the mean entropy (nats) of every model.
    """

    index: int
    gamma: Tensor
    entropies: list[float]


def choose_for_unseen(
    models: Callable[[Tensor], nn.Module],
    preferences: Sequence[Tensor],
    images: Dataset[Any],
    head: nn.Module,
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> UnseenChoice:
    """Choose the model of a front with the least mean entropy on some images.

    They are of a task that none of the models was merged for: section 4.3 of arXiv 2408.12105. Labels are never looked
    at. Of equal entropies the first wins.

    Args:
        models: ``models(gamma)`` is the plain merged encoder at gamma, such as ``lambda gamma: merge(model, gamma)``;
            called once per preference, and one encoder is held at a time.
        preferences: the candidates, [K] each.
        images: the target's images, or pairs whose first is the image. head: the target's head.

    Raises:
        ValueError: no preferences or no images.
        UserError: logits that are not finite.
    """
    if not len(preferences):
        raise ValueError("preferences: expected at least one, got none")
    unlabelled = Unlabelled(images)
    entropies = []
    with progress_bar("choosing", len(preferences), enabled=progress) as advance:
        for number, gamma in enumerate(preferences, start=1):
            entropies.append(mean_entropy(models(gamma), unlabelled, head, batch_size, workers))
            advance(number, f"entropy {entropies[-1]:.3f}")
    index = min(range(len(entropies)), key=entropies.__getitem__)
    return UnseenChoice(index, preferences[index].detach().clone(), entropies)
