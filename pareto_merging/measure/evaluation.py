"""Accuracy and entropy of merged models on held-out images, per task and preference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pmkernels
from pareto_merging.data.sources import labelled_batches
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.methods.per_task import image_of, to_model
from pareto_merging.model.fold import merge
from pareto_merging.model.state import pareto_state
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar


@dataclass(frozen=True)
class Scores:
    """One model on several tasks: accuracy (%) and mean entropy (nats) by task name."""

    accuracy: dict[str, float]
    entropy: dict[str, float]
    mean_prediction_entropy: dict[str, float]

    @property
    def average(self) -> float:
        """Return the average accuracy over the tasks, in percent."""
        return math.fsum(self.accuracy.values()) / len(self.accuracy)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, rounded to four decimals."""
        figures = {key: {k: round(v, 4) for k, v in values.items()} for key, values in asdict(self).items()}
        return {**figures, "average": round(self.average, 4)}


@torch.no_grad()
def evaluate_model(encoder: nn.Module, tasks: Mapping[str, Task], batch_size: int = 256, workers: int = 0) -> Scores:
    """Measure one encoder on each task, in eval mode (the mode is restored).

    Raises UserError for images without a label, or a label beyond the head's classes.
    """
    accuracy, entropy, mean_entropy = {}, {}, {}
    for name, task in tasks.items():
        correct, total, nats, predictions = 0, 0, 0.0, torch.zeros(())
        for images, labels in labelled_batches(task.images, batch_size, workers):
            logits = _logits(encoder, images, task.head, f"task {name}")
            labels = labels.to(logits.device)
            foreign = labels[(labels < 0) | (labels >= logits.shape[-1])]
            if len(foreign):
                wanted = f"a label in [0, {logits.shape[-1]}) for every evaluation image"
                hint = "a folder needs one sub-folder per class, a file `labels`"
                raise UserError(f"task {name}: expected {wanted}, got {int(foreign[0])} ({hint})")
            correct += int((logits.argmax(dim=-1) == labels).sum())
            total += len(labels)
            nats += float(pmkernels.softmax_entropy(logits).double().sum())
            predictions = predictions.to(logits.device) + torch.softmax(logits.double(), dim=-1).sum(dim=0)
        if not total:
            raise ValueError(f"tasks: expected images for {name}, got none")
        accuracy[name] = 100.0 * correct / total
        entropy[name] = nats / total
        mean_entropy[name] = float(torch.special.entr(predictions / total).sum())
    return Scores(accuracy, entropy, mean_entropy)


def evaluate_preferences(
    model: nn.Module,
    tasks: Mapping[str, Task],
    preferences: Sequence[Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> list[Scores]:
    """Measure the Pareto model at each preference [K], merged once for each, on each task."""
    scores = []
    pareto_state(model)
    with progress_bar("evaluating", len(preferences), enabled=progress) as advance:
        for number, gamma in enumerate(preferences, start=1):
            scores.append(evaluate_model(merge(model, gamma), tasks, batch_size, workers))
            advance(number, f"average {scores[-1].average:.1f} %")
    return scores


@torch.no_grad()
def mean_entropy(
    encoder: nn.Module, images: Dataset[Any], head: nn.Module, batch_size: int = 256, workers: int = 0
) -> float:
    """Return the mean entropy (nats) of encoder and head's predictions on ``images``; otherwise as :func:`predict`."""
    nats, total = 0.0, 0
    for logits in _unlabelled_logits(encoder, images, head, batch_size, workers):
        nats += float(pmkernels.softmax_entropy(logits).double().sum())
        total += len(logits)
    return nats / total


@torch.no_grad()
def predict(
    encoder: nn.Module, images: Dataset[Any], head: nn.Module, batch_size: int = 256, workers: int = 0
) -> Tensor:
    """Return the class of each image by encoder and head: int64 [n] on the CPU.

    In eval mode. Labels are not looked at. Raises ValueError for no images, UserError for logits that are not finite.
    """
    batches = _unlabelled_logits(encoder, images, head, batch_size, workers)
    return torch.cat([logits.argmax(dim=-1).cpu() for logits in batches])


def agreement(
    encoder: nn.Module,
    images: Dataset[Any],
    head: nn.Module,
    predictions: Tensor,
    batch_size: int = 256,
    workers: int = 0,
) -> float:
    """Return the percentage of images that encoder and head put into the classes ``predictions`` [n].

    Raises ValueError for other predictions and as :func:`predict`.
    """
    unlabelled = Unlabelled(images)
    numbers = not (predictions.is_floating_point() or predictions.is_complex() or predictions.dtype == torch.bool)
    if predictions.shape != (len(unlabelled),) or not numbers:
        what = f"{list(predictions.shape)} {predictions.dtype}"
        raise ValueError(f"predictions: expected whole numbers [{len(unlabelled)}], got {what}")
    same = predict(encoder, unlabelled, head, batch_size, workers) == predictions.cpu()
    return 100.0 * int(same.sum()) / len(same)


class Unlabelled(Dataset[Tensor]):
    """Images alone, whether items are images or (image, label) pairs; ValueError for none."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images
        if not len(self):
            raise ValueError("images: expected at least one, got none")

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return image_of(self.images[index])


def _unlabelled_logits(
    encoder: nn.Module, images: Dataset[Any], head: nn.Module, batch_size: int, workers: int
) -> Iterator[Tensor]:
    for batch, _ in labelled_batches(Unlabelled(images), batch_size, workers):
        yield _logits(encoder, batch, head, "images")


def _logits(encoder: nn.Module, images: Tensor, head: nn.Module, what: str) -> Tensor:
    """Return one batch's logits in eval mode, on the encoder's device. UserError if they are not finite."""
    with eval_mode(encoder, head):
        logits: Tensor = head(encoder(to_model(images, encoder)))
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"{what}: expected finite logits, got NaN or inf (are the images finite?)")
    return logits
