"""Accuracy and entropy against a plain loop."""

from __future__ import annotations

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import nn

from pareto_merging.data.heads import ZeroShotHead
from pareto_merging.data.sources import TensorImages
from pareto_merging.errors import UserError
from pareto_merging.evaluation import EvaluationTask, evaluate_model, evaluate_preferences
from pareto_merging.parametrize import merge, parametrize


def tasks(labels: bool = True) -> dict[str, EvaluationTask]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: EvaluationTask(
            TensorImages(
                torch.randn(17, 3, 8, 8, generator=generator),
                torch.randint(5, (17,), generator=generator) if labels else None,
            ),
            ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0),
        )
        for name in ("a", "b")
    }


def test_scores(tiny_vit: nn.Module) -> None:
    tiny_vit.train()
    scores = evaluate_model(tiny_vit, tasks(), batch_size=5)
    assert tiny_vit.training
    for name, task in tasks().items():
        with torch.no_grad():
            p = torch.softmax(task.head(tiny_vit(task.images.images)), dim=-1).double()
        right = sum(int(row.argmax()) == int(label) for row, label in zip(p, task.images.labels, strict=True))
        assert scores.accuracy[name] == pytest.approx(100 * right / 17)
        assert scores.entropy[name] == pytest.approx(float(-(p * p.log()).sum(dim=1).mean()), rel=1e-4)
        mean = p.mean(dim=0)
        assert scores.mean_prediction_entropy[name] == pytest.approx(float(-(mean * mean.log()).sum()), rel=1e-4)
    assert scores.average == pytest.approx(sum(scores.accuracy.values()) / 2)


def test_each_preference_is_its_merged_model(tiny_vit: nn.Module) -> None:
    model = randomize(parametrize(tiny_vit, {"a": noisy_copy(tiny_vit, 1), "b": noisy_copy(tiny_vit, 2)}, rank=2))
    gammas = torch.tensor([[0.0, 1.0], [0.7, 0.3]])
    found = evaluate_preferences(model, tasks(), list(gammas), progress=False)
    for gamma, scores in zip(gammas, found, strict=True):
        assert scores == evaluate_model(merge(model, gamma), tasks())


def test_images_without_labels_are_an_error(tiny_vit: nn.Module) -> None:
    with pytest.raises(UserError, match=r"task a: expected a label in \[0, 5\) for every evaluation image, got -1"):
        evaluate_model(tiny_vit, tasks(labels=False))
