"""Accuracy and entropy of merged models on held-out images, per task and preference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pmkernels
from pareto_merging.data.sources import labelled_batches
from pareto_merging.errors import UserError
from pareto_merging.modes import eval_mode
from pareto_merging.parametrize import merge
from pareto_merging.preferences import pareto_state
from pareto_merging.progress import progress_bar


@dataclass
class EvaluationTask:
    """One task as the evaluation sees it: labelled images (image, label) and the head that reads the features."""

    images: Dataset[Any]
    head: nn.Module


@dataclass(frozen=True)
class Scores:
    """One model on several tasks: accuracy in percent and mean entropy in nats by task name, and their averages."""

    accuracy: dict[str, float]
    entropy: dict[str, float]
    mean_prediction_entropy: dict[str, float]

    @property
    def average(self) -> float:
        """The average accuracy over the tasks, in percent."""
        return math.fsum(self.accuracy.values()) / len(self.accuracy)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, accuracies rounded to 0.01."""
        return {
            **{key: {k: round(v, 4) for k, v in values.items()} for key, values in asdict(self).items()},
            "average": round(self.average, 4),
        }


@torch.no_grad()
def evaluate_model(
    encoder: nn.Module, tasks: Mapping[str, EvaluationTask], batch_size: int = 256, workers: int = 0
) -> Scores:
    """Accuracy and entropy of one encoder on each task, in eval mode (the mode is restored).

    Raises:
        UserError: images without a label, or a label beyond the head's classes.
    """
    tensor = next((p for p in encoder.parameters() if p.is_floating_point()), torch.zeros(()))
    accuracy, entropy, mean_entropy = {}, {}, {}
    for name, task in tasks.items():
        correct, total, nats, predictions = 0, 0, 0.0, torch.zeros(())
        for images, labels in labelled_batches(task.images, batch_size, workers):
            images = images.to(tensor.device, tensor.dtype if images.is_floating_point() else None)
            with eval_mode(encoder, task.head):
                logits = task.head(encoder(images))
            labels = labels.to(logits.device)
            if not bool(torch.isfinite(logits).all()):
                raise UserError(f"task {name}: expected finite logits, got NaN or inf (are the images finite?)")
            foreign = labels[(labels < 0) | (labels >= logits.shape[-1])]
            if len(foreign):
                raise UserError(
                    f"task {name}: expected a label in [0, {logits.shape[-1]}) for every evaluation image, got "
                    f"{int(foreign[0])} (a folder needs one sub-folder per class, a file `labels`)"
                )
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
    tasks: Mapping[str, EvaluationTask],
    preferences: Sequence[Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> list[Scores]:
    """The Pareto model at each preference [K], merged once per preference, on each task."""
    scores = []
    pareto_state(model)
    with progress_bar("evaluating", len(preferences), enabled=progress) as advance:
        for number, gamma in enumerate(preferences, start=1):
            scores.append(evaluate_model(merge(model, gamma), tasks, batch_size, workers))
            advance(number, f"average {scores[-1].average:.1f} %")
    return scores
