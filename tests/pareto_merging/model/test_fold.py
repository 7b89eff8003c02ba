"""A Pareto model made plain for one preference, or folded for all."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from support.networks import (
    GAMMAS,
    IMAGES,
    MODELS,
    build,
    by_hand,
    output,
)
from torch import nn

from pareto_merging.model.fold import fold, merge
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


@pytest.mark.parametrize("name", MODELS)
def test_merge_equals_the_formula_and_the_pareto_model(name: str, copies: Copies) -> None:
    pretrained, x, low_rank = build(name)
    finetuned = copies(pretrained, 3)
    model = randomize(parametrize(pretrained, finetuned, rank=3, low_rank=low_rank))
    exact = x.double() if x.is_floating_point() else x
    for gamma in GAMMAS:
        set_preference(model, gamma)
        plain = merge(model, gamma)
        y = output(model(x))
        torch.testing.assert_close(output(plain(x)), y, rtol=1e-5, atol=1e-5)
        truth = output(by_hand(pretrained, finetuned, model, gamma)(exact))
        torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)
    if low_rank != "none":
        set_preference(model, GAMMAS[1])
        other = output(model(x))
        set_preference(model, GAMMAS[0])
        assert not torch.allclose(other, output(model(x))), "the preference changes nothing"


@pytest.mark.parametrize("name", MODELS)
def test_merge_gives_back_the_pareto_original(name: str, copies: Copies) -> None:
    pretrained, _, low_rank = build(name)
    model = parametrize(pretrained, copies(pretrained, 2), rank=2, low_rank=low_rank)
    plain = merge(model, [0.5, 0.5])
    assert [type(m) for m in plain.modules()] == [type(m) for m in pretrained.modules()]
    assert list(plain.state_dict()) == list(pretrained.state_dict())
    assert all(p.requires_grad for p in plain.parameters())
    assert not any("pareto" in m.__dict__ for m in plain.modules())
    shared = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    assert not shared & {p.data_ptr() for p in plain.parameters()}, "shares memory with the Pareto model"
    pickle.loads(pickle.dumps(plain))


@pytest.mark.parametrize("name", MODELS)
def test_fold_keeps_the_results_and_drops_the_task_vectors(name: str, copies: Copies) -> None:
    pretrained, x, low_rank = build(name)
    model = randomize(parametrize(pretrained, copies(pretrained, 3), rank=2, low_rank=low_rank))
    folded = fold(model)
    assert not any("task_vectors" in key or key.endswith("lam") for key in folded.state_dict())
    low_rank_size = sum(p.numel() for n, p in learned_parameters(model).items() if not n.startswith("lam."))
    assert (
        sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in pretrained.parameters()) + low_rank_size
    )
    for gamma in GAMMAS:
        set_preference(model, gamma)
        set_preference(folded, gamma)
        torch.testing.assert_close(output(folded(x)), output(model(x)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            output(merge(folded, gamma)(x)), output(merge(model, gamma)(x)), rtol=1e-5, atol=1e-5
        )
    again = fold(folded)
    set_preference(again, GAMMAS[1])
    torch.testing.assert_close(output(again(x)), output(folded(x)))


def test_copies_carry_no_graph_and_wrappers_no_state(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    set_preference(model, torch.softmax(torch.zeros(2, requires_grad=True), dim=0))
    assert not copy.deepcopy(model).pareto.now.gamma.requires_grad
    pickle.loads(pickle.dumps(model))
    wrapped = merge(nn.Sequential(model, nn.Linear(8, 2)), [0.5, 0.5])
    assert not any("pareto" in module.__dict__ for module in wrapped.modules())
    with torch.inference_mode():
        set_preference(model, [0.5, 0.5])
    model(IMAGES).sum().backward()


def test_fold_of_an_outer_core_while_a_preference_per_item_is_set(copies: Copies) -> None:
    layer = nn.Linear(4, 3)
    model = parametrize(layer, copies(layer, 2), low_rank="all", core="outer-product")
    set_preference(model, torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    folded = fold(model)
    x = torch.randn(5, 4)
    for pair in (model, folded):
        set_preference(pair, [0.3, 0.7])
    torch.testing.assert_close(folded(x), model(x))
