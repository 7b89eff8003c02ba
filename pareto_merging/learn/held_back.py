"""Images held back from learning choose the state to keep: by agreement with the teachers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from pareto_merging.data.sources import images_in_order
from pareto_merging.data.tasks import Task
from pareto_merging.learn.distillation import ask, cosine_distance, outputs_of
from pareto_merging.learn.settings import LossSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state, preference
from pareto_merging.preferences import equal_preference, one_hot_preferences

# how often the agreement is measured in a run, beside its beginning
LOOKS = 10


def split(tasks: Mapping[str, Task], share: float, seed: int) -> tuple[dict[str, Task], dict[str, Task]]:
    """Return the tasks with images to learn from, and with a seeded ``share`` held back.

    At least one image of each task is on either side, where it has two. Kept outputs of teachers are divided with them.
    """
    learned, held = {}, {}
    for number, (name, task) in enumerate(tasks.items()):
        size = len(task.images)  # type: ignore[arg-type]
        count = min(max(1, round(share * size)), size - 1) if share and size > 1 else 0
        order = np.random.default_rng([seed, 5, number]).permutation(size)
        learned[name] = _part(task, sorted(order[count:].tolist())) if count else task
        if count:
            held[name] = _part(task, sorted(order[:count].tolist()))
    return learned, held


def _part(task: Task, indices: list[int]) -> Task:
    teacher = task.teacher[torch.tensor(indices)] if isinstance(task.teacher, Tensor) else task.teacher
    return replace(task, images=Subset(task.images, indices), teacher=teacher)


@dataclass
class BestState:
    """What was learned when the agreement on the images held back was highest. The first of equals.

    Attributes:
        step, score: when, and the agreement in percent (or 100·cosine without heads): the mean of that at the equal
            preference and of each task's own at its one-hot preference. looks: every step that was looked at, with its.
        tensors: what was learned then, by name.
    """

    model: nn.Module
    tasks: Mapping[str, Task]
    loss: LossSettings
    step: int = -1
    score: float = -1.0
    looks: dict[int, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def look(self, step: int) -> None:
        """Measure the model as it is after ``step``. Remember it if it is the best."""
        self.looks[step] = score = self._agreement()
        # a cosine may be below any score to begin with, and NaN is above none
        if not self.tensors or score > self.score or math.isnan(self.score):
            self.step, self.score = step, score
            self.tensors = {name: p.detach().clone() for name, p in learned_parameters(self.model).items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the best state."""
        for name, parameter in learned_parameters(self.model).items():
            parameter.copy_(self.tensors[name])

    @torch.no_grad()
    def _agreement(self) -> float:
        first = next(p for p in self.model.parameters() if p.is_floating_point())
        scores = []
        names = pareto_state(self.model).task_names
        for name, own in zip(names, one_hot_preferences(len(names)), strict=True):
            for gamma in (equal_preference(len(names)), own) if name in self.tasks else ():
                task = self.tasks[name]
                right, count = 0.0, 0
                for images in images_in_order(task.images, 256):
                    images = images.to(first.device, first.dtype if images.is_floating_point() else None)
                    with preference(self.model, gamma):
                        features = self.model(images)
                    right += self._right(features, task, count, images)
                    count += len(images)
                scores.append(100.0 * right / count)
        return round(sum(scores) / len(scores), 4) if scores else 0.0

    def _right(self, features: Tensor, task: Task, start: int, images: Tensor) -> float:
        teacher = task.teacher
        if isinstance(teacher, Tensor):
            wanted = teacher[start : start + len(images)].to(features.device)
        else:
            assert teacher is not None
            wanted = ask(teacher, images, task.head, self.loss)
        logits, own = outputs_of(features, task.head, self.loss)
        if logits is None:
            assert own is not None
            return float((1 - cosine_distance(own, wanted)).sum())
        return float((logits.argmax(dim=-1) == wanted[:, : logits.shape[1]].argmax(dim=-1)).sum())
