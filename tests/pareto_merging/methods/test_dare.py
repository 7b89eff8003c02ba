"""DARE: what is dropped, what is kept and by how much it grows."""

import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, conv_net, parameter_task_vectors, state_of
from torch import nn

from pareto_merging.methods import dare, task_arithmetic
from pareto_merging.model import pieces
from pareto_merging.model.fold import merge
from pareto_merging.model.parametrize import parametrize


def test_each_entry_is_dropped_or_divided_by_the_density() -> None:
    net = nn.Linear(300, 200, bias=False)
    finetuned = [noisy_copy(net, k + 1, 0.1) for k in range(2)]
    model = dare.merge(net, finetuned, coefficient=0.5, density=0.25, seed=3).model()
    first, second = parameter_task_vectors(net, finetuned)["weight"]
    change = (model.weight - net.weight).detach()
    # each of the four outcomes, by their chances
    outcomes = {(a, b): 0.5 * 4 * (a * first + b * second) for a in (0, 1) for b in (0, 1)}
    left = torch.ones_like(change, dtype=torch.bool)
    for (a, b), value in outcomes.items():
        here = torch.isclose(change, value, rtol=1e-4, atol=2e-6)
        share = (0.25 if a else 0.75) * (0.25 if b else 0.75)
        assert here.double().mean().item() == pytest.approx(share, abs=0.01), (a, b)
        left &= ~here
    assert not bool(left.any()), "neither kept nor dropped"


def test_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net()
    finetuned = [noisy_copy(net, k + 1, 0.1) for k in range(3)]
    first = state_of(dare.merge(net, finetuned, seed=0).model())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = state_of(dare.merge(net, finetuned, seed=0).model())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    # of two tensors alike in shape and values the draws differ
    other = state_of(dare.merge(net, finetuned, seed=1).model())
    assert not torch.equal(first["5.weight"], other["5.weight"])
    # the draws do not depend on how tensors are cut to pieces
    monkeypatch.setattr(pieces, "CHUNK", 30)
    in_pieces = state_of(dare.merge(net, finetuned, seed=0).model())
    assert all(torch.equal(first[name], in_pieces[name]) for name in first)


def test_as_a_preprocessing_it_drops_the_same() -> None:
    net = conv_net()
    finetuned = [noisy_copy(net, k + 1, 0.1) for k in range(3)]
    model = dare.merge(net, finetuned, coefficient=0.3, density=0.4, seed=2).model()
    pareto = parametrize(net, finetuned, low_rank="none", preprocess="dare", density=0.4, seed=2)
    merged = merge(pareto, [0.2, 0.3, 0.5])
    assert_state(model, dict(merged.named_parameters()))


def test_density_one_is_task_arithmetic(tiny_vit: nn.Module) -> None:
    finetuned = [noisy_copy(tiny_vit, k + 1) for k in range(2)]
    expected = task_arithmetic.merge(tiny_vit, finetuned, coefficient=0.4).model()
    found = dare.merge(tiny_vit, finetuned, coefficient=0.4, density=1.0).model()
    assert_state(found, dict(expected.state_dict()))
    with pytest.raises(ValueError, match=r"density: expected a share of the entries in \(0, 1\], got 0"):
        dare.merge(tiny_vit, finetuned, density=0)
