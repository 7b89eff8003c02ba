"""What methods share that run each fine-tuned model on its own task's images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.data.sources import batch_indices
from pareto_merging.data.tasks import Task
from pareto_merging.methods.interface import Copies, task_names
from pareto_merging.model.copies import check_copies
from pareto_merging.model.stored import copy_of


def each_finetuned(
    pretrained: nn.Module, finetuned: Copies, tasks: Mapping[str, Task]
) -> Iterator[tuple[str, nn.Module, list[tuple[list[str], Tensor]]]]:
    """Yield each task, a model with its fine-tuned weights, and (names of a tensor, tensor).

    One working copy for all: it holds a task's weights, rounded to the dtype of ``pretrained``, until the next is asked
    for. Raises ValueError as :func:`parametrize`, and for tasks other than those of the copies or without images.
    """
    model = copy_of(pretrained)
    copies, tensors = check_copies(model, finetuned)
    check_tasks(tasks, task_names(finetuned))
    for task, weights in copies.items():
        with torch.no_grad():
            for names, tensor in tensors:
                tensor.copy_(next(weights[name] for name in names if name in weights))
        yield task, model, tensors


def check_tasks(tasks: Mapping[str, Task], names: Sequence[str]) -> None:
    """Raise ValueError unless ``tasks`` has images and a head for ``names`` and nothing else."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks: expected a mapping from task name to Task, got {type(tasks).__name__}")
    for name in names:
        if name not in tasks:
            raise ValueError(f"tasks: expected images and a head for {name}, got {', '.join(tasks) or 'none'}")
    for name, task in tasks.items():
        if name not in names:
            raise ValueError(f"tasks: expected only {', '.join(names)}, got {name}")
        if not isinstance(task, Task):
            raise TypeError(f"tasks: expected a Task for {name}, got {type(task).__name__}")
        if not len(task.images):  # type: ignore[arg-type]
            raise ValueError(f"tasks: expected images for {name}, got none")


def chosen_images(dataset: Dataset[Any], images: int, seed: int, name: str) -> list[int]:
    """Return the indices of the first ``images`` (or all) of a seeded permutation."""
    check_count("images", images)
    check_count("seed", seed, least=0)
    size = len(dataset)  # type: ignore[arg-type]
    if not size:
        raise ValueError(f"{name}: expected images, got none")
    return batch_indices(size, min(images, size), 0, (seed, 3))


def image_of(item: Any) -> Tensor:
    """Return the image of a dataset's item, an image or an (image, anything) pair."""
    image: Tensor = item[0] if isinstance(item, tuple | list) else item
    return image


def to_model(images: Tensor, model: nn.Module) -> Tensor:
    """Put images on the model's device and, if floating-point, in its dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return images.to(first.device, first.dtype if images.is_floating_point() else None)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: Any, highest: float = math.inf) -> float:
    """Return ``value`` as a finite number in [0, highest]; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest or value == math.inf:
        expected = f"in [0, {highest:g}]" if highest < math.inf else "that is finite and at least 0"
        raise ValueError(f"{name}: expected a number {expected}, got {value!r}")
    return float(value)
