"""Objectives, scalarisations and regularisers against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import nn

from pareto_merging.learn.objectives import (
    WeightDistance,
    cosine_alignment,
    entropy_terms,
    linear,
    low_rank_square,
    scalarize,
    smooth_tchebycheff,
    tchebycheff,
    tensor_norm,
)
from pareto_merging.model.fold import fold
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize

S = torch.tensor([1.2, 0.4, 0.9], dtype=torch.float64)
GAMMA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_scalarisations_by_hand() -> None:
    smooth = 0.1 * math.log(sum(math.exp(g * s / 0.1) for g, s in zip(GAMMA.tolist(), S.tolist(), strict=True)))
    assert float(smooth_tchebycheff(S, GAMMA, 0.1)) == pytest.approx(smooth)
    assert float(tchebycheff(S, GAMMA)) == pytest.approx(max(0.24, 0.2, 0.27))
    assert float(linear(S, GAMMA)) == pytest.approx(0.24 + 0.2 + 0.27)
    assert float(smooth_tchebycheff(S, GAMMA, 1e-6)) == pytest.approx(0.27)
    assert math.isfinite(float(smooth_tchebycheff(1e4 * S, GAMMA, 1e-3)))
    for kind in ("smooth-tchebycheff", "tchebycheff", "linear"):
        assert bool(torch.isfinite(scalarize(S, GAMMA, kind, 0.1)))
    with pytest.raises(ValueError, match="scalarization: expected"):
        scalarize(S, GAMMA, "sum", 0.1)  # type: ignore[arg-type]


def test_cosine_is_that_of_one_over_gamma_and_survives_extremes() -> None:
    expected = torch.cosine_similarity(S, 1 / GAMMA, dim=0)
    torch.testing.assert_close(cosine_alignment(S, GAMMA), expected)
    for gamma in ([1.0, 0.0, 0.0], [1 - 1e-38, 1e-38, 0.0], [0.5, 0.5, 1e-45]):
        values = S.float().requires_grad_()
        cosine = cosine_alignment(values, torch.tensor(gamma))
        (grad,) = torch.autograd.grad(cosine, values)
        assert math.isfinite(float(cosine))
        assert bool(torch.isfinite(grad).all())


def test_low_rank_square() -> None:
    generator = torch.Generator().manual_seed(0)
    A, C, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 3), (5, 3)))
    torch.testing.assert_close(low_rank_square(A, C, B), (A @ C @ B.T).square().sum())


def model_and_copies() -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
    finetuned = [noisy_copy(plain, seed) for seed in (1, 2, 3)]
    return parametrize(plain, finetuned, rank=2, low_rank="all"), plain, finetuned


def test_tensor_norm_and_its_gradient_at_zero() -> None:
    model, _, _ = model_and_copies()
    parameters = [p for n, p in learned_parameters(model).items() if not n.startswith("lam.")]
    norm = tensor_norm(model, GAMMA)
    assert float(norm) == 0
    assert all(not bool(g.any()) for g in torch.autograd.grad(norm, parameters))
    randomize(model)
    total = 0.0
    for layer in (model[0], model[2]):
        core = sum(g * layer.G[:, :, k] for k, g in enumerate(GAMMA))
        total += (layer.A @ core @ layer.B.T).square().sum()
    torch.testing.assert_close(tensor_norm(model, GAMMA), total.sqrt())
    ours = torch.autograd.grad(tensor_norm(model, GAMMA), parameters)
    theirs = torch.autograd.grad(total.sqrt(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert float(tensor_norm(nn.Linear(2, 2), GAMMA)) == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_weight_distance_is_the_distance_of_the_merged_weights(normalize: bool) -> None:
    model, plain, finetuned = model_and_copies()
    randomize(model)
    parameters = list(learned_parameters(model).values())
    distance = WeightDistance(model, normalize)(GAMMA)
    weights = {
        name: model.get_submodule(name.rpartition(".")[0]).pareto_merged(name.rpartition(".")[2], GAMMA)
        for name, _ in plain.named_parameters()
    }
    expected = []
    for copy in finetuned:
        square = sum((weights[name] - value).square().sum() for name, value in copy.named_parameters())
        size = sum((p - value).square().sum() for p, value in zip(plain.parameters(), copy.parameters(), strict=True))
        expected.append(square / size if normalize else square)
    torch.testing.assert_close(distance, torch.stack(expected))
    for k in range(3):
        ours = torch.autograd.grad(distance[k], parameters, retain_graph=True)
        theirs = torch.autograd.grad(expected[k], parameters, retain_graph=True)
        for name, a, b in zip(learned_parameters(model), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_weight_distance_wants_task_vectors_and_starts_at_one_when_normalised() -> None:
    model, _, _ = model_and_copies()
    with pytest.raises(ValueError, match="expected task vectors"):
        WeightDistance(fold(model))
    for parameter in learned_parameters(model).values():
        parameter.data.zero_()
    torch.testing.assert_close(WeightDistance(model, True)(GAMMA), torch.ones(3, dtype=torch.float64))


def test_entropy_terms_and_information_maximisation() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, dim=-1)
    mean_entropy = float(-(p * p.log()).sum(dim=-1).mean())
    mean_prediction = p.mean(dim=0)
    entropy_of_mean = float(-(mean_prediction * mean_prediction.log()).sum())
    terms = entropy_terms(logits)
    assert float(terms.objective) == float(terms.entropy) == pytest.approx(mean_entropy)
    assert float(terms.mean_prediction_entropy) == pytest.approx(entropy_of_mean)
    rewarded = entropy_terms(logits, 0.5)
    assert float(rewarded.objective) == pytest.approx(mean_entropy + 0.5 * (math.log(4) - entropy_of_mean))
    # every image in one class: no entropy, but the reward is lost
    collapsed = torch.zeros(6, 4)
    collapsed[:, 2] = 1e4
    collapsed.requires_grad_()
    terms = entropy_terms(collapsed, 1.0)
    assert float(terms.entropy) == 0
    assert float(terms.objective.detach()) == pytest.approx(math.log(4))
    assert bool(torch.isfinite(torch.autograd.grad(terms.objective, collapsed)[0]).all())
