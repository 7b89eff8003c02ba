"""nn.Linear with a merged weight."""

import copy

import pytest
import torch
from helpers import noisy_copy, randomize
from support.networks import linears
from torch import nn
from torch.nn import functional as F

from pareto_merging.model.fold import merge
from pareto_merging.model.linear import ParetoLinear
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference
from pareto_merging.model.strategy import set_strategy


@pytest.mark.usefixtures("strategy")
def test_linear_from_linears() -> None:
    pretrained = nn.Linear(6, 4)
    finetuned = [noisy_copy(pretrained, 1), noisy_copy(pretrained, 2), noisy_copy(pretrained, 3)]
    layer = ParetoLinear.from_linears(pretrained, finetuned, rank=2, init_lambda=0.2)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.lam, torch.full((3,), 0.2))
    x = torch.randn(5, 6)
    expected = pretrained.weight + 0.2 * sum(f.weight - pretrained.weight for f in finetuned)
    bias = pretrained.bias + 0.2 * sum(f.bias - pretrained.bias for f in finetuned)
    torch.testing.assert_close(layer(x), x @ expected.T + bias)
    assert "tasks=3, rank=2" in repr(layer)
    plain = ParetoLinear.from_linears(pretrained, finetuned, rank=0)
    assert "A" not in plain._parameters
    named = ParetoLinear.from_linears(pretrained, {"MNIST": finetuned[0], "DTD": finetuned[1]})
    set_preference(named, {"MNIST": 1})
    assert torch.equal(named.pareto.now.gamma, torch.tensor([1.0, 0.0]))
    # its own constructor makes what nn.Linear's makes
    assert ParetoLinear(3, 2)(torch.zeros(1, 3)).shape == (1, 2)
    with pytest.raises(ValueError, match="expected at least one copy that differs from pretrained"):
        ParetoLinear.from_linears(pretrained, [copy.deepcopy(pretrained)], rank=0)


@pytest.mark.usefixtures("strategy")
def test_starting_values_of_the_low_rank_term() -> None:
    pretrained = nn.Linear(600, 400)
    layer = ParetoLinear.from_linears(pretrained, [noisy_copy(pretrained, 1)], rank=16)
    assert not bool(layer.G.any())
    for factor, size in ((layer.A, 400), (layer.B, 600)):
        bound = (6 / size) ** 0.5
        assert factor.shape == (size, 16)
        assert 0.98 * bound < factor.detach().abs().max() <= bound
        assert factor.detach().var() == pytest.approx(bound**2 / 3, rel=0.05)
    again = ParetoLinear.from_linears(pretrained, [noisy_copy(pretrained, 1)], rank=16)
    assert torch.equal(layer.A, again.A)


@pytest.mark.usefixtures("strategy")
def test_autocast(tiny_vit: nn.Module) -> None:
    model = randomize(parametrize(tiny_vit, [noisy_copy(tiny_vit, 1), noisy_copy(tiny_vit, 2)], rank=2))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        plain = merge(model, [0.5, 0.5])(x)
    truth = model(x)
    assert (y - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-3


def test_linear_reads_what_a_plain_layer_would() -> None:
    model = linears()
    set_strategy(model, "cached")
    y = torch.randn(3, 6)
    torch.testing.assert_close(model[0](y), F.linear(y, model[0].weight, model[0].bias))
