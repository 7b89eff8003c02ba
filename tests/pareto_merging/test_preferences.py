"""What a preference may be, how it is set, sampled and laid out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import noisy_copy, randomize
from torch import nn

from pareto_merging.parametrize import merge, parametrize
from pareto_merging.preferences import (
    check_preference,
    get_preference,
    lattice,
    one_hot_preferences,
    parse_preference,
    preference,
    sample_dirichlet,
    set_preference,
    two_task_grid,
)

NAMES = ("MNIST", "DTD", "Cars")


def small_model() -> nn.Module:
    plain = nn.Linear(4, 3)
    copies = {name: noisy_copy(plain, k) for k, name in enumerate(NAMES)}
    return randomize(parametrize(plain, copies, rank=2, low_rank="all"))


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([0.5, 0.5], r"expected shape \[3\] or \[batch, 3\], one weight for each of MNIST, DTD, Cars; got \[2\]"),
        ([0.5, 0.6, 0.0], "expected a sum of 1, got 1.1"),
        ([0.5, 0.5, 0.0002], "expected a sum of 1"),
        ([1.5, -0.5, 0.0], "expected non-negative numbers"),
        ([math.nan, 0.5, 0.5], "expected finite numbers"),
        ([math.inf, 0.5, 0.5], "expected finite numbers"),
        ([[0.2, 0.3, 0.5], [0.2, 0.3, 0.4]], "expected a sum of 1, got 0.9"),
        (torch.zeros(2, 2, 3), "expected shape"),
        ({"MNIST": 0.5, "SVHN": 0.5}, "expected task names among MNIST, DTD, Cars; got SVHN"),
        ({"MNIST": 0.9, "DTD": 0.2}, "expected a sum of at most 1, got 1.1"),
        ({"MNIST": 0.2, "DTD": 0.2, "Cars": 0.2}, "expected a sum of 1, got 0.6"),
        ({"MNIST": -0.5}, "expected non-negative numbers"),
        ("equal", "expected 3 numbers"),
        (0.5, "expected shape"),
    ],
)
def test_what_is_off_the_simplex_is_refused_and_nothing_changes(gamma: object, message: str) -> None:
    model = small_model()
    set_preference(model, [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=message):
        set_preference(model, gamma)  # type: ignore[arg-type]
    assert get_preference(model) == pytest.approx({"MNIST": 0.2, "DTD": 0.3, "Cars": 0.5})


def test_nothing_is_normalised() -> None:
    within = torch.tensor([0.5, 0.5, 0.00005])
    assert torch.equal(check_preference(within, NAMES), within)


def test_by_name_the_rest_is_shared_out() -> None:
    assert check_preference({"DTD": 1}, NAMES).tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(check_preference({"DTD": 0.6}, NAMES), torch.tensor([0.2, 0.6, 0.2]))
    torch.testing.assert_close(check_preference({"Cars": 0.5, "MNIST": 0.25, "DTD": 0.25}, NAMES)[2], torch.tensor(0.5))


def test_parse() -> None:
    assert parse_preference(" 0.2, 0.3,0.5 ", NAMES).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert parse_preference("DTD=0.6", NAMES).tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert parse_preference("equal", NAMES).tolist() == pytest.approx([1 / 3] * 3)
    for text in ("", "a,b,c", "0.2,0.8", "DTD=x", "DTD=0.2,DTD=0.8", "DTD=0.5,0.5,0"):
        with pytest.raises(ValueError, match="preference: expected"):
            parse_preference(text, NAMES)


def test_default_is_equal_and_the_context_manager_restores() -> None:
    model = small_model()
    x = torch.randn(2, 4)
    assert get_preference(model) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    y = model(x)
    with preference(model, {"MNIST": 1}):
        torch.testing.assert_close(model(x), merge(model, [1, 0, 0])(x))
        with preference(model, [0, 0, 1]):
            torch.testing.assert_close(model(x), merge(model, [0, 0, 1])(x))
        torch.testing.assert_close(model(x), merge(model, [1, 0, 0])(x))
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="inside"), preference(model, [0, 1, 0]):
        raise RuntimeError("inside")
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="preference: expected"), preference(model, [0, 1]):
        pass
    assert torch.equal(model(x), y)


def test_set_preference_copies_and_leaves_earlier_graphs_alone() -> None:
    model = small_model()
    gamma = torch.tensor([0.2, 0.3, 0.5])
    set_preference(model, gamma)
    y = model(torch.ones(1, 4)).sum()
    gamma.zero_()
    assert get_preference(model)["Cars"] == 0.5
    set_preference(model, [1, 0, 0])
    y.backward()


def test_gradient_of_the_preference() -> None:
    model = small_model()
    gamma = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    set_preference(model, gamma)
    x = torch.randn(2, 4)
    (grad,) = torch.autograd.grad(model(x).sum(), gamma)
    expected = [float((x @ model.B @ model.G[:, :, k].T @ model.A.T).detach().sum()) for k in range(3)]
    assert grad.tolist() == pytest.approx(expected, rel=1e-4)
    merge(model, gamma)


def test_a_plain_model_is_refused() -> None:
    for function in (lambda m: set_preference(m, [1.0]), get_preference, lambda m: merge(m, [1.0])):
        with pytest.raises(ValueError, match="model: expected"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("concentration", [0.01, 0.1, 1.0, 10.0])
def test_dirichlet_has_the_right_moments_and_never_fails(concentration: float) -> None:
    rng = np.random.default_rng(0)
    samples = torch.stack([sample_dirichlet(concentration, 8, rng) for _ in range(4000)])
    assert bool(torch.isfinite(samples).all())
    torch.testing.assert_close(samples.sum(dim=1), torch.ones(4000))
    variance = (1 / 8) * (7 / 8) / (8 * concentration + 1)
    assert samples.mean(dim=0).tolist() == pytest.approx([1 / 8] * 8, abs=6 * (variance / 4000) ** 0.5)
    assert samples.var(dim=0).mean() == pytest.approx(variance, rel=0.1)
    assert torch.equal(
        sample_dirichlet(concentration, 8, np.random.default_rng(3)),
        sample_dirichlet(concentration, 8, np.random.default_rng(3)),
    )


def test_grids() -> None:
    assert one_hot_preferences(2).tolist() == [[1, 0], [0, 1]]
    grid = two_task_grid(11)
    assert grid[:, 0].tolist() == pytest.approx([i / 10 for i in range(11)])
    check_preference(grid, ("a", "b"))
    points = lattice(3, 4)
    assert len(points) == 15
    check_preference(points, NAMES)
