"""Multi-task training against a plain AdamW loop, and its errors."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, conv_net, image_tasks, labelled_tasks, state_of
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.data.sources import TensorImages, batch_indices
from pareto_merging.data.tasks import Task
from pareto_merging.errors import TrainingError, UserError
from pareto_merging.methods import multitask


def problem(net: nn.Module, count: int = 2) -> tuple[dict[str, nn.Module], dict[str, Task]]:
    return {f"t{k}": noisy_copy(net, k + 1) for k in range(count)}, labelled_tasks(image_tasks(count, 13))


def by_hand(
    net: nn.Module, training: dict[str, Task], gamma: list[float], steps: int, rate: float, decay: float
) -> dict[str, Tensor]:
    """AdamW from its definition, warm-up over a tenth of the steps, cosine decay; batch norm and dropout as in use."""
    net = copy.deepcopy(net).float().eval()
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in values.items()}
    for step in range(1, steps + 1):
        variables = {name: value.clone().requires_grad_() for name, value in values.items()}
        loss = torch.zeros(())
        for index, (weight, task) in enumerate(zip(gamma, training.values(), strict=True)):
            chosen = batch_indices(len(task.images), 4, step - 1, (5, 3, index))
            logits = task.head(torch.func.functional_call(net, variables, (task.images.images[chosen],)))
            loss = loss + weight * F.cross_entropy(logits, task.images.labels[chosen])
        lr = rate * min(1.0, step / max(1.0, steps / 10)) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for name, gradient in zip(values, torch.autograd.grad(loss, list(variables.values())), strict=True):
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.999 * moments[name][1] + 0.001 * gradient**2
            moments[name] = m, v
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            values[name] = values[name] * (1 - lr * decay) - lr * update
    return values


@pytest.mark.parametrize(
    ("gamma", "weights"), [(None, [0.5, 0.5]), ([0.9, 0.1], [0.9, 0.1]), ({"t1": 1.0}, [0.0, 1.0])]
)
def test_against_a_plain_loop(gamma: Any, weights: list[float]) -> None:
    # twenty steps, two of them warm-up
    net = conv_net()
    net.train()
    finetuned, training = problem(net)
    before = state_of(net)
    result = multitask.merge(
        net,
        finetuned,
        training=training,
        steps=20,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.1,
        gamma=gamma,
        seed=5,
        progress=False,
    )
    expected = by_hand(net, training, weights, 20, 3e-3, 0.1)
    assert_state(result.model(), expected, rtol=1e-3, atol=1e-4)
    # neither what came in nor the statistics have moved, and modes are as they were
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(before[name], b) for name, b in result.model().named_buffers())
    assert result.model().training
    assert all(p.grad is None for p in result.model().parameters())


def test_the_loss_falls_and_seeds_matter(tiny_vit: nn.Module) -> None:
    finetuned, training = problem(tiny_vit)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(
                F.cross_entropy(task.head(model(task.images.images)), task.images.labels).item()
                for task in training.values()
            )

    def run(**changes: Any) -> nn.Module:
        arguments = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "progress": False, **changes}
        return multitask.merge(tiny_vit, finetuned, training=training, **arguments).model()

    trained = run()
    assert loss(trained) < 0.7 * loss(tiny_vit)
    same = state_of(run())
    assert all(torch.equal(value, same[name]) for name, value in trained.state_dict().items())
    assert not torch.equal(run(seed=1).proj, trained.proj)
    start = run(steps=0)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in tiny_vit.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_trained_in_float32(dtype: torch.dtype) -> None:
    """Every tensor comes back in its own type: the norm stays float32 in a model that is 16-bit otherwise."""
    net = conv_net()
    net[0].to(dtype)
    net[5].to(dtype)
    finetuned, training = problem(net)
    how: dict[str, Any] = {"steps": 20, "batch_size": 4, "learning_rate": 1e-3, "seed": 5, "progress": False}
    model = multitask.merge(net, finetuned, training=training, weight_decay=0.1, **how).model()
    assert [t.dtype for t in model.state_dict().values()] == [t.dtype for t in net.state_dict().values()]
    expected = by_hand(net, training, [0.5, 0.5], 20, 1e-3, 0.1)
    assert_state(model, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-4)


def test_frozen_parameters_and_heads_of_ones_own() -> None:
    """All weights are trained, whatever they require; a head keeps its own, without a gradient."""
    net = conv_net().requires_grad_(False)
    finetuned, training = problem(net)
    heads = {name: nn.Linear(8, 5) for name in training}
    before = {name: state_of(head) for name, head in heads.items()}
    training = {name: Task(task.images, heads[name]) for name, task in training.items()}
    model = multitask.merge(net, finetuned, training=training, steps=3, batch_size=4, progress=False).model()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, net.get_parameter(name)), name
    for name, head in heads.items():
        assert all(torch.equal(before[name][key], value) for key, value in head.state_dict().items())
        assert all(p.grad is None for p in head.parameters())
    assert not any(p.requires_grad for p in net.parameters())


def test_errors() -> None:
    net = conv_net()
    finetuned, training = problem(net)
    how: dict[str, Any] = {"steps": 2, "batch_size": 4, "progress": False}
    with pytest.raises(ValueError, match="training: expected labelled images of every task, got none of t1"):
        multitask.merge(net, finetuned, training={"t0": training["t0"]}, **how)
    images = training["t1"].images.images
    for labels, got in ((torch.full((13,), 7), 7), (None, -1)):
        wrong = {**training, "t1": Task(TensorImages(images, labels), training["t1"].head)}
        with pytest.raises(UserError, match=rf"task t1: expected a label in \[0, 5\) .* got {got}"):
            multitask.merge(net, finetuned, training=wrong, **how)
    broken = {**training, "t1": Task(TensorImages(images * torch.nan, torch.zeros(13)), training["t1"].head)}
    with pytest.raises(TrainingError, match="step 1, task t1: the loss of multi-task training is nan") as caught:
        multitask.merge(net, finetuned, training=broken, **how)
    assert (caught.value.task, caught.value.step) == ("t1", 1)
    # float32 can hold what float16 cannot
    half, copies = conv_net().half(), {name: other.half() for name, other in problem(net)[0].items()}
    with pytest.raises(TrainingError, match=r"step 1: \S+ is not finite after multi-task training"):
        multitask.merge(half, copies, training=training, **{**how, "steps": 1}, learning_rate=1e6)
    with pytest.raises(ValueError, match="preference: expected a sum of 1"):
        multitask.merge(net, finetuned, training=training, gamma=[0.5, 0.6], **how)
