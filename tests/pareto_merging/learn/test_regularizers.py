"""The cosine and the norm against plain loops."""

import math

import torch
from helpers import randomize
from learn_cases import small_model
from torch import nn

from pareto_merging.learn.regularizers import cosine_alignment, low_rank_square, tensor_norm
from pareto_merging.model.learned import learned_parameters

S = torch.tensor([1.2, 0.4, 0.9], dtype=torch.float64)
GAMMA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


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


def test_tensor_norm_and_its_gradient_at_zero() -> None:
    model, _, _ = small_model()
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
