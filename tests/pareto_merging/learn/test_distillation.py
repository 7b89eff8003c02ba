"""The distance to the fine-tuned models' predictions: against plain loops, and its gradient against autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import NoHead, Task
from pareto_merging.learn.distillation import (
    Distillation,
    Outputs,
    ask,
    cosine_distance,
    needs_head,
    outputs_of,
    temperature_kl,
)
from pareto_merging.learn.settings import LossSettings, MethodSettings


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp((value - max(row)) / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def kl_in_loops(logits: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    rows = []
    for ours, theirs in zip(logits.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(ours, temperature), softmax(theirs, temperature)
        rows.append(temperature**2 * math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    return rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 5)])
def test_kl_is_that_of_plain_loops(temperature: float, shape: tuple[int, int]) -> None:
    logits, teacher = random(*shape).requires_grad_(), random(*shape, seed=1)
    value = temperature_kl(logits, teacher, temperature)
    expected = torch.tensor(kl_in_loops(logits.detach(), teacher, temperature), dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=1e-9)
    assert bool((value >= -1e-12).all())
    # d/dℓ of T²·KL is T·(p − q)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    p, q = torch.softmax(logits.detach() / temperature, 1), torch.softmax(teacher / temperature, 1)
    torch.testing.assert_close(gradient, temperature * (p - q), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: temperature_kl(x, teacher, temperature), (logits,))


def test_kl_to_oneself_is_nothing_and_temperature_keeps_gradients_of_one_size() -> None:
    logits = random(6, 5).requires_grad_()
    torch.testing.assert_close(temperature_kl(logits, logits.detach(), 4.0).detach(), torch.zeros(6).double())
    sizes = [
        float(torch.autograd.grad(temperature_kl(logits, random(6, 5, seed=1), T).sum(), logits)[0].norm())
        for T in (20.0, 40.0, 80.0)
    ]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_teachers_in_float16_and_logits_in_any_type(dtype: torch.dtype) -> None:
    """Exactly as if both had been widened first."""
    logits, teacher = random(6, 5, scale=20).to(dtype), random(6, 5, seed=1, scale=20).half()
    value = temperature_kl(logits, teacher, 4.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, temperature_kl(logits.float(), teacher.float(), 4.0), rtol=0, atol=0)
    expected = torch.tensor(kl_in_loops(logits.double(), teacher.double(), 4.0))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_confident_teachers_give_finite_numbers() -> None:
    logits = torch.tensor([[6e4, -6e4, 0.0]], requires_grad=True)
    value = temperature_kl(logits, torch.tensor([[-6e4, 6e4, 0.0]]).half(), 0.5)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())


def test_cosine_distance() -> None:
    features, teacher = random(5, 3, 4).requires_grad_(), random(5, 12, seed=2)
    expected = []
    for ours, theirs in zip(features.detach().flatten(1).tolist(), teacher.tolist(), strict=True):
        inner = math.fsum(a * b for a, b in zip(ours, theirs, strict=True))
        expected.append(1 - inner / (math.hypot(*ours) * math.hypot(*theirs)))
    torch.testing.assert_close(cosine_distance(features, teacher).detach(), torch.tensor(expected).double())
    assert torch.autograd.gradcheck(lambda x: cosine_distance(x, teacher), (features,))
    torch.testing.assert_close(cosine_distance(teacher, 3 * teacher), torch.zeros(5).double())
    torch.testing.assert_close(cosine_distance(teacher, -teacher), torch.full((5,), 2.0).double())


def head_of(classes: int = 4, width: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(width, classes).double().requires_grad_(False)


def entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits, 1)
    return -(p * p.log()).sum(1)


@pytest.mark.parametrize("objective", ["distillation", "features"])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("features_weight", [0.0, 0.7])
@pytest.mark.parametrize("maximisation", [0.0, 0.5])
def test_mixes(objective: str, entropy_weight: float, features_weight: float, maximisation: float) -> None:
    settings = MethodSettings(
        objective=objective,
        entropy_weight=entropy_weight,
        features_weight=features_weight,
        information_maximisation=maximisation,
        temperature=2.0,
    )
    head, own, teachers = head_of(), random(5, 6).requires_grad_(), random(5, 6, seed=4)
    loss = settings.loss
    targets = outputs_of(teachers, head, loss).joined()
    # a model: the features themselves
    kind = Distillation(nn.Identity(), {"t0": Task(TensorImages(teachers), head, targets)}, settings)
    terms = kind.terms(0, kind.outputs(own, head), kind.targets_of(0, range(5), own))
    logits, wanted = head(own), head(teachers)
    expected = torch.zeros(()).double()
    if objective == "distillation":
        q, p = torch.softmax(wanted / 2, 1), torch.softmax(logits / 2, 1)
        expected = expected + 4 * (q * (q / p).log()).sum(1).mean()
    weight = 1.0 if objective == "features" else features_weight
    expected = expected + weight * (1 - torch.cosine_similarity(own, teachers)).mean()
    if entropy_weight:
        mean = torch.softmax(logits, 1).mean(0)
        bonus = math.log(4) + (mean * mean.log()).sum()
        expected = expected + entropy_weight * (entropy(logits).mean() + maximisation * bonus)
    torch.testing.assert_close(terms.objective, expected)
    for one, two in zip(torch.autograd.grad(terms.objective, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(one, two)
    has_head = objective == "distillation" or entropy_weight > 0
    assert needs_head(loss) == has_head
    assert kind.watches == (("agreement", "entropy", "mean_prediction_entropy") if has_head else ())
    assert len(terms.watched) == len(kind.watches)
    if has_head:
        share = (logits.argmax(1) == wanted.argmax(1)).double().mean()
        torch.testing.assert_close(terms.watched[0].double(), share)
        torch.testing.assert_close(terms.watched[1].double(), entropy(logits).mean().detach())
    assert not any(value.requires_grad for value in terms.watched)
    assert targets.shape == (5, 4 * has_head + 6 * (objective == "features" or features_weight > 0))


def test_targets_are_those_of_the_images_in_hand() -> None:
    settings, images = MethodSettings(objective="distillation"), random(7, 6)
    head, kept = head_of(), random(7, 4, seed=3).half()

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.ones(()).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x * self.scale)

    asked = Teacher()
    tasks = {
        "kept": Task(TensorImages(images), head, kept),
        "asked": Task(TensorImages(images), head, asked),
        "function": Task(TensorImages(images), head, lambda x: 2 * x),
        "none": Task(TensorImages(images), head),
    }
    kind = Distillation(nn.Identity(), tasks, settings)
    assert torch.equal(kind.targets_of(0, [5, 0, 5], images[:3]), kept[[5, 0, 5]])
    found = kind.targets_of(1, [1], images[2:4])
    torch.testing.assert_close(found, head(images[2:4]))
    assert asked.training and not found.requires_grad, "in eval mode, put back, and without a graph"
    torch.testing.assert_close(kind.targets_of(2, [1], images[:2]), head(2 * images[:2]))
    with pytest.raises(ValueError, match="tasks: expected a teacher for every task"):
        kind.targets_of(3, [0], images[:1])


def test_features_alone_want_no_head() -> None:
    loss: LossSettings = MethodSettings(objective="features").loss
    features = random(2, 6)
    outputs: Any = outputs_of(features, NoHead(), loss)
    assert outputs.logits is None and torch.equal(outputs.joined(), features)
    assert torch.equal(ask(lambda x: x, features, NoHead(), loss), features)
    both = Outputs(torch.ones(2, 3), features).joined()
    assert both.shape == (2, 9) and both.dtype == torch.float32
