"""Modules with merged parameters: what is read, set, and given a preference per item."""

import copy
import io
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


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("LSTM", "open_clip Attention", "tied")])
def test_per_item_preferences_equal_itemwise_merging(name: str, folding: bool, copies: Copies) -> None:
    pretrained, x, low_rank = build(name)
    model = randomize(parametrize(pretrained, copies(pretrained, 3), rank=2, low_rank=low_rank))
    model = fold(model) if folding else model
    gammas = torch.softmax(3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), dim=-1)
    set_preference(model, gammas)
    y = output(model(x))
    for item in range(5):
        alone = output(merge(model, gammas[item])(x[item : item + 1]))
        torch.testing.assert_close(y[item : item + 1], alone, rtol=1e-4, atol=1e-5)


def test_per_item_preferences_where_a_tensor_is_merged_whole_say_so(copies: Copies) -> None:
    for name in ("open_clip Attention", "tied"):
        pretrained, x, low_rank = build(name)
        model = parametrize(pretrained, copies(pretrained, 2), rank=2, low_rank=low_rank)
        set_preference(model, torch.full((5, 2), 0.5))
        with pytest.raises(ValueError, match="expected one preference for the whole batch, got 5"):
            model(x)


def test_per_item_preferences_of_another_batch_size_say_so(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    set_preference(model, torch.full((4, 2), 0.5))
    with pytest.raises(ValueError, match="got 4 preferences for an input of shape"):
        model(IMAGES)


def test_reading_a_parameter_gives_the_merged_one_and_assigning_is_refused(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2))
    plain = merge(model, [0.5, 0.5])
    for name in (
        "class_embedding",
        "proj",
        "conv1.weight",
        "ln_pre.bias",
        "transformer.resblocks.0.attn.in_proj_weight",
    ):
        owner, _, attribute = name.rpartition(".")
        torch.testing.assert_close(
            getattr(model.get_submodule(owner), attribute), getattr(plain.get_submodule(owner), attribute)
        )
    with pytest.raises((AttributeError, TypeError)):
        model.proj = torch.zeros(1)
    assert model.get_parameter("transformer.resblocks.0.attn.in_proj_weight_lam").shape == (2,)


def test_a_merged_parameter_cannot_be_replaced(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(AttributeError, match="weight: expected a merged parameter to be left alone"):
        model.ln_pre.weight = nn.Parameter(torch.zeros(32))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert model(IMAGES).shape == (5, 8)


@pytest.mark.parametrize("folding", [False, True])
def test_deepcopy_pickle_state_dict_and_to(tiny_vit: nn.Module, copies: Copies, folding: bool) -> None:
    def make(seed: int) -> nn.Module:
        model = randomize(parametrize(tiny_vit, copies(tiny_vit, 3), rank=2), seed)
        return fold(model) if folding else model

    model = make(0)
    set_preference(model, GAMMAS[0])
    y = model(IMAGES)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(IMAGES), y)
        set_preference(clone, GAMMAS[1])
        assert torch.equal(model(IMAGES), y), "a copy shares its preference with the original"
        set_preference(clone, [0.2, 0.3, 0.5])
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.add_(1)
        assert torch.equal(model(IMAGES), y)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = make(1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    set_preference(other, GAMMAS[0])
    assert torch.equal(other(IMAGES), y)
    double = copy.deepcopy(model).to(torch.float64)
    torch.testing.assert_close(double(IMAGES.double()).float(), y)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype)
        assert all(p.dtype == torch.float32 for p in learned_parameters(low).values())
        assert low.transformer.resblocks[0].mlp.c_fc.weight.dtype == dtype
        assert (low(IMAGES.to(dtype)).float() - y).abs().max() < 0.1 * y.abs().max()
        back = low.to("cpu").float()
        assert all(
            torch.equal(p, q)
            for p, q in zip(learned_parameters(back).values(), learned_parameters(model).values(), strict=True)
        )
    assert copy.deepcopy(model).to("meta").transformer.resblocks[0].attn.in_proj_weight_G.device.type == "meta"


def test_gradients_survive_to(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2))
    model(IMAGES).sum().backward()
    model.to(torch.bfloat16)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learned_parameters(model).values())


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.slow
def test_compiles_without_a_graph_break(tiny_vit: nn.Module, copies: Copies, folding: bool) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 3), rank=2))
    model = fold(model) if folding else model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for gamma in GAMMAS:
        set_preference(model, gamma)
        y = compiled(IMAGES)
        torch.testing.assert_close(y, model(IMAGES))
        ours = torch.autograd.grad(y.sum(), list(learned_parameters(model).values()))
        theirs = torch.autograd.grad(model(IMAGES).sum(), list(learned_parameters(model).values()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    set_preference(model, torch.softmax(torch.randn(5, 3), dim=-1))
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
