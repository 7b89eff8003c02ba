"""The learned parameters by name, and λ as one table."""

from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from support.networks import (
    IMAGES,
)
from torch import nn

from pareto_merging.model.fold import merge
from pareto_merging.model.learned import get_lambda, lambda_group, lambda_names, learned_parameters, set_lambda
from pareto_merging.model.parametrize import parametrize

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_lambda_of_all_layers(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 3), rank=2, init_lambda=0.25)
    names = lambda_names(model)
    assert sorted(names) == sorted(name for name, _ in tiny_vit.named_parameters())
    assert torch.equal(get_lambda(model), torch.full((len(names), 3), 0.25))
    values = torch.arange(len(names) * 3, dtype=torch.float32).view(len(names), 3)
    set_lambda(model, values)
    assert torch.equal(get_lambda(model), values)
    row = values[names.index("transformer.resblocks.1.attn.in_proj_weight")]
    assert torch.equal(model.transformer.resblocks[1].attn.in_proj_weight_lam, row)
    set_lambda(model, 0.5)
    assert torch.equal(get_lambda(model), torch.full((len(names), 3), 0.5))
    set_lambda(model, torch.tensor([1.0, 0.0, 0.0]))
    task = copies(tiny_vit, 3)["t0"]
    torch.testing.assert_close(model(IMAGES), task(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"lambda: expected shape \[\d+, 3\], got \[2, 3\]"):
        set_lambda(model, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="lambda: expected finite numbers"):
        set_lambda(model, torch.full((len(names), 3), torch.nan))


def test_granularity(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 2)
    sizes = {
        g: len(lambda_names(parametrize(tiny_vit, finetuned, granularity=g))) for g in ("model", "block", "module")
    }
    # blocks: two, and class embedding, positions, projection, conv1, ln_pre, ln_post by themselves
    assert sizes == {"model": 1, "block": 8, "module": 6 + 2 * 6}
    assert (
        lambda_group("visual.transformer.resblocks.11.attn.out_proj.bias", "block") == "visual.transformer.resblocks.11"
    )
    assert lambda_group("class_embedding", "module") == "class_embedding"
    model = randomize(parametrize(tiny_vit, finetuned, granularity="block"))
    torch.testing.assert_close(merge(model, [0.5, 0.5])(IMAGES), model(IMAGES))
    block = model.transformer.resblocks[0]
    assert block.attn.in_proj_weight_lam is block.mlp.c_fc.bias_lam


def test_only_the_learned_parameters_require_a_gradient(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learned = {id(p) for p in learned_parameters(model).values()}
    assert all(p.requires_grad == (id(p) in learned) for p in model.parameters())
    count = sum(p.numel() for p in learned_parameters(model).values())
    block = 2 * (96 + 32) + 2 * 2 * 2 + 2 * (32 + 32) + 2 * 2 * 2
    assert count == 2 * block + 2 * len(lambda_names(model))


def test_shared_lambda_taken_apart_is_noticed(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, granularity="model")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="expected one λ vector for model, got several"):
        get_lambda(model)


def test_a_tensor_that_two_layers_share_is_learned_once(copies: Copies) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = parametrize(net, copies(net, 2), rank=2, low_rank="all")
    before = len(learned_parameters(model))
    model[1].register_parameter("A", model[0].A)
    learned = learned_parameters(model)
    assert len(learned) == len({id(parameter) for parameter in learned.values()}) == before - 1


def test_a_lambda_that_two_groups_share_has_the_name_of_each(copies: Copies) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = parametrize(net, copies(net, 2), low_rank="none")
    model[1].register_parameter("lam", model[0].lam)
    learned = learned_parameters(model)
    assert list(learned) == [f"lam.{name}" for name in lambda_names(model)]
    assert learned["lam.0.weight"] is learned["lam.1.weight"]
