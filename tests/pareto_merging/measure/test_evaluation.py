"""Accuracy and entropy against a plain loop."""

import math
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.errors import UserError
from pareto_merging.measure.choose import choose_for_unseen
from pareto_merging.measure.evaluation import agreement, evaluate_model, evaluate_preferences, mean_entropy, predict
from pareto_merging.model.fold import merge
from pareto_merging.model.parametrize import parametrize


def tasks(labels: bool = True) -> dict[str, Task]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Task(
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


class Unreadable:
    """A label that cannot be made a number, compared or stacked."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the label was looked at: {name}")


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def plain_probabilities(encoder: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return torch.softmax(task.head(encoder(task.images.images)).double(), dim=-1)


def plain_entropy(encoder: nn.Module, task: Task) -> float:
    rows = plain_probabilities(encoder, task).tolist()
    return sum(-sum(p * math.log(p) for p in row if p > 0) for row in rows) / len(rows)


def test_mean_entropy_and_predict(tiny_vit: nn.Module) -> None:
    task = tasks()["a"]
    probabilities = plain_probabilities(tiny_vit, task)
    tiny_vit.train()
    entropy = mean_entropy(tiny_vit, task.images, task.head, batch_size=5)
    predictions = predict(tiny_vit, task.images, task.head, batch_size=5)
    assert tiny_vit.training
    tiny_vit.eval()
    assert entropy == pytest.approx(plain_entropy(tiny_vit, task), rel=1e-5)
    assert entropy == pytest.approx(evaluate_model(tiny_vit, {"a": task}).entropy["a"])
    assert predictions.dtype == torch.int64 and predictions.device.type == "cpu" and not predictions.requires_grad
    assert predictions.tolist() == [max(range(5), key=row.__getitem__) for row in probabilities.tolist()]
    assert torch.equal(predict(tiny_vit, task.images, task.head, batch_size=17), predictions)


def test_agreement(tiny_vit: nn.Module) -> None:
    task = tasks()["a"]
    own = predict(tiny_vit, task.images, task.head)
    assert agreement(tiny_vit, task.images, task.head, own) == 100
    other = own.clone().to(torch.int32)
    other[:3] = (other[:3] + 1) % 5
    assert agreement(tiny_vit, task.images, task.head, other, batch_size=4) == pytest.approx(100 * 14 / 17)
    # with the labels for predictions it is the accuracy
    accuracy = evaluate_model(tiny_vit, {"a": task}).accuracy["a"]
    assert agreement(tiny_vit, task.images, task.head, task.images.labels) == pytest.approx(accuracy)
    for bad in (own[:-1], own[:, None], own.float(), own > 0):
        with pytest.raises(ValueError, match=r"predictions: expected whole numbers \[17\], got"):
            agreement(tiny_vit, task.images, task.head, bad)


def test_the_least_entropy_is_chosen_for_an_unseen_task(tiny_vit: nn.Module) -> None:
    model = randomize(parametrize(tiny_vit, {"a": noisy_copy(tiny_vit, 1), "b": noisy_copy(tiny_vit, 2)}, rank=2))
    gammas = torch.tensor([[0.0, 1.0], [0.3, 0.7], [0.7, 0.3], [1.0, 0.0]])
    seen = tasks()
    expected = {name: [plain_entropy(merge(model, gamma), task) for gamma in gammas] for name, task in seen.items()}
    for name, task in seen.items():
        for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
            index, entropies = choose_for_unseen(
                lambda gamma: merge(model, gamma), list(gammas[order]), task.images, task.head, batch_size=6
            )
            assert entropies == pytest.approx([expected[name][i] for i in order], rel=1e-5)
            assert expected[name][int(order[index])] == min(expected[name])
    assert max(expected["a"]) > min(expected["a"]) * 1.001


def constant(logit: float) -> nn.Module:
    """Two classes, logits 0 and ``logit`` for every image."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, logit]))
    return layer


def test_equal_entropies_go_to_the_first() -> None:
    gammas = [torch.tensor([i / 4, 1 - i / 4]) for i in range(5)]
    # the second and the fourth are equally sure, one of either class
    models = dict(zip([0.0, 0.25, 0.5, 0.75, 1.0], map(constant, [0.0, 3.0, 1.0, -3.0, 2.9]), strict=True))
    asked = []

    def model(gamma: Tensor) -> nn.Module:
        asked.append(float(gamma[0]))
        return models[asked[-1]]

    index, entropies = choose_for_unseen(model, gammas, Items(list(torch.ones(4, 3))), nn.Identity(), progress=False)
    p = 1 / (1 + math.exp(3))
    assert entropies[0] == pytest.approx(math.log(2))
    assert entropies[1] == entropies[3] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert index == 1 and asked == list(models)


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_are_never_looked_at(workers: int) -> None:
    torch.manual_seed(0)
    encoder, head, inputs = nn.Linear(3, 4), nn.Linear(4, 5), torch.randn(7, 3)
    own = predict(encoder, TensorImages(inputs), head)
    assert own.unique().numel() > 1
    kinds: list[Dataset[Any]] = [
        Items(list(inputs)),
        Items([(row, Unreadable()) for row in inputs]),
        Items([[row, None] for row in inputs]),
        TensorImages(inputs, torch.full((7,), 999)),
        Subset(TensorImages(inputs), range(7)),
    ]
    for images in kinds:
        assert torch.equal(predict(encoder, images, head, 3, workers), own)
        assert agreement(encoder, images, head, own, 3, workers) == 100
        entropy = mean_entropy(encoder, images, head, 3, workers)
        found = choose_for_unseen(
            lambda gamma: encoder, [torch.ones(1)], images, head, batch_size=3, workers=workers, progress=False
        )
        assert found == (0, [entropy])


def test_nothing_to_choose_from_is_an_error() -> None:
    layer, gammas = nn.Linear(3, 2), [torch.ones(1)]

    def model(gamma: Tensor) -> nn.Module:
        pytest.fail("a model was made")

    with pytest.raises(ValueError, match="preferences: expected at least one, got none"):
        choose_for_unseen(model, [], Items([torch.ones(3)]), layer)
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        choose_for_unseen(model, gammas, Items([]), layer)
    for function in (mean_entropy, predict):
        with pytest.raises(ValueError, match="images: expected at least one, got none"):
            function(layer, Items([]), nn.Identity())
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        agreement(layer, Items([]), nn.Identity(), torch.zeros(0, dtype=torch.int64))


def test_dropout_is_off() -> None:
    encoder, head, images = nn.Dropout(0.5), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), Items([torch.ones(3)] * 9)
    task = Task(Items([(torch.ones(3), 0)] * 9), head)
    sure = torch.softmax(head[0](torch.ones(3)), dim=0).detach()
    assert mean_entropy(encoder, images, head) == pytest.approx(float(torch.special.entr(sure).sum()))
    assert predict(encoder, images, head).tolist() == [int(sure.argmax())] * 9
    assert evaluate_model(encoder, {"a": task}).entropy["a"] == pytest.approx(float(torch.special.entr(sure).sum()))
    assert encoder.training and head[1].training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    layer = nn.Linear(3, 2)
    images = Items([torch.ones(3), torch.ones(3), torch.full((3,), value)])
    for call in (
        lambda: mean_entropy(layer, images, nn.Identity(), 2),
        lambda: predict(layer, images, nn.Identity(), 2),
        lambda: choose_for_unseen(lambda gamma: layer, [torch.ones(1)], images, nn.Identity(), progress=False),
    ):
        with pytest.raises(UserError, match="images: expected finite logits, got NaN or inf"):
            call()
    task = Task(Items([(row, 0) for row in images.items]), nn.Identity())
    with pytest.raises(UserError, match="task a: expected finite logits, got NaN or inf"):
        evaluate_model(layer, {"a": task})
