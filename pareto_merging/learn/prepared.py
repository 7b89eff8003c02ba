"""What a run begins with: settings for its images, teachers, and what is held back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.held_back import split
from pareto_merging.learn.learner import checked_tasks
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.teachers import TEACHERS_NAME, describe_teachers, with_teachers
from pareto_merging.model.copies import Weights
from pareto_merging.model.state import pareto_state


@dataclass
class Prepared:
    """Settings, tasks to learn from, tasks held back. And what the log says of all that: one entry an event."""

    settings: MethodSettings
    tasks: Mapping[str, Task] | None
    held: dict[str, Task] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


def learned_from(
    tasks: Mapping[str, Task], settings: MethodSettings
) -> tuple[MethodSettings, dict[str, Task], dict[str, Task]]:
    """Return the settings for these tasks' images, and what is learned from and held back."""
    settings = settings.for_images(min(len(task.images) for task in tasks.values()))  # type: ignore[arg-type]
    return settings, *split(tasks, settings.optimiser.held_back, settings.sampling.seed)


def prepare(
    model: nn.Module,
    tasks: Mapping[str, Task] | None,
    settings: MethodSettings,
    finetuned: Sequence[Weights] | Mapping[str, Weights] | None,
    *,
    folder: Path | None,
    resume: bool,
    progress: bool,
    warn: Callable[[str], None],
) -> Prepared:
    """Return what a run begins with. Raises as :func:`learn_pareto_set` for what is missing or does not fit."""
    kind = OBJECTIVES[settings.loss.objective]
    if kind.needs == "weights":
        return Prepared(settings, tasks)
    given = checked_tasks(tasks, pareto_state(model).task_names, settings)
    events: list[dict[str, Any]] = []
    if not settings.steps_for(len(given)):
        # the start is all there is
        return Prepared(settings, given)
    if kind.has_teachers:
        if folder is not None and not resume:
            (folder / TEACHERS_NAME).unlink(missing_ok=True)
        given = with_teachers(model, given, settings, finetuned, folder=folder, progress=progress)
        events = describe_teachers(given, settings, warn)
    if facts := pareto_state(model).start_facts:
        events.append({"event": "start", **facts})
    fitting, learned, held = learned_from(given, settings)
    if fitting is not settings:
        names = ("learning_rate", "lambda_learning_rate", "held_back")
        chosen = {name: getattr(fitting, name) for name in names}
        images = {name: len(task.images) for name, task in given.items()}  # type: ignore[arg-type]
        events.append({"event": "few images", "images": images, "chosen": chosen})
    return Prepared(fitting, learned, held, events)
