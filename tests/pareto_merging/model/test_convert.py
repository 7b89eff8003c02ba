"""Plain modules turned into Pareto ones in place, and back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from support.networks import (
    Lazy,
    bits,
    transformer_layer,
)
from torch import Tensor, nn

from pareto_merging.model.convert import LAYERS, register
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.layer import ParetoModule, merged_property
from pareto_merging.model.learned import get_lambda
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import get_preference, set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


class Taken(nn.Linear):
    """A linear layer that already has a parameter called lam."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lam = nn.Parameter(torch.ones(1))


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Taken: expected no attribute lam"):
        parametrize(Taken(), [noisy_copy(Taken(), 1)])
    plain = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="finetuned: expected task names that are strings, got 1"):
        parametrize(plain, {1: plain, "1": plain})  # type: ignore[dict-item]
    broken = {**plain.state_dict(), "weight": torch.full((2, 2), torch.nan)}
    with pytest.raises(ValueError, match="expected finite numbers in weight of b minus pretrained"):
        parametrize(plain, {"a": plain, "b": broken})
    half = nn.Linear(1, 1).half()
    low, high = ({k: torch.full_like(v, x) for k, v in half.state_dict().items()} for x in (-6e4, 6e4))
    half.load_state_dict(low)
    with pytest.raises(ValueError, match="expected finite numbers in weight of a minus pretrained"):
        parametrize(half, {"a": high})
    for setting, message in (
        ({"init_lambda": float("nan")}, "init_lambda: expected a finite number"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"rank": True}, "rank: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            parametrize(plain, [plain], **setting)
    with pytest.raises(TypeError, match="finetuned: expected a sequence or mapping"):
        parametrize(plain, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected weight of a to be a tensor, got list"):
        parametrize(plain, {"a": {"weight": [1], "bias": plain.bias}})  # type: ignore[dict-item]
    for function in (get_preference, get_lambda, fold, lambda m: merge(m, [1.0]), lambda m: set_preference(m, [1.0])):
        with pytest.raises(TypeError, match=r"model: expected an nn.Module, got NoneType"):
            function(None)  # type: ignore[arg-type]


class Clash(nn.Sequential):
    """Its last layer cannot become a Pareto layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.LSTM(4, 4), nn.BatchNorm1d(4), transformer_layer(), Taken())


@pytest.mark.parametrize("problem", ["shape", "NaN", "attribute", "read", "dtype"])
def test_in_place_leaves_the_module_plain_on_an_error(problem: str) -> None:
    class Broken(Lazy):
        def __getitem__(self, name: str) -> Tensor:
            if problem == "read" and name == "2.running_var":
                raise OSError("gone")
            return super().__getitem__(name)

    pretrained = Clash()
    pretrained[0].bias.requires_grad_(False)
    weights = dict(noisy_copy(pretrained, 1).state_dict())
    if problem == "shape":
        weights["4.weight"] = torch.zeros(3, 4)
    elif problem == "NaN":
        weights["4.weight"] = torch.full((4, 4), torch.nan)
    before, types = bits(pretrained), [type(module) for module in pretrained.modules()]
    attributes = [set(module.__dict__) for module in pretrained.modules()]
    flags = [p.requires_grad for p in pretrained.parameters()]
    error, message = {
        "shape": (ValueError, r"has 4.weight of shape \[3, 4\], expected \[4, 4\]"),
        "NaN": (ValueError, "expected finite numbers in 4.weight of a minus pretrained"),
        "attribute": (ValueError, "Taken: expected no attribute lam"),
        "read": (OSError, "gone"),
        "dtype": (ValueError, "copy: expected True or False, got 'no'"),
    }[problem]
    setting: Any = "no" if problem == "dtype" else False
    with pytest.raises(error, match=message):
        parametrize(pretrained, {"a": Broken(weights)}, low_rank="all", rank=2, buffers="average", copy=setting)
    assert bits(pretrained) == before
    assert [type(module) for module in pretrained.modules()] == types
    assert [set(module.__dict__) for module in pretrained.modules()] == attributes
    assert [p.requires_grad for p in pretrained.parameters()] == flags


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("folding", [False, True])
def test_per_item_preferences_in_a_sequence_first_block(length: int, folding: bool) -> None:
    """As many tokens as items: what lies along which dimension cannot be seen from the shape."""
    pretrained = nn.TransformerEncoderLayer(8, 2, 16).eval()
    model = randomize(parametrize(pretrained, [noisy_copy(pretrained, k) for k in (1, 2)], rank=2, low_rank="all"))
    model = fold(model) if folding else model
    gammas = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    x = torch.randn(length, 3, 8, generator=torch.Generator().manual_seed(0))
    set_preference(model, gammas)
    y = model(x)
    for item in range(3):
        alone = merge(model, gammas[item])(x[:, item : item + 1])
        torch.testing.assert_close(y[:, item : item + 1], alone, rtol=1e-4, atol=1e-5)


def test_transformer_encoder_with_a_padding_mask_in_inference() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    pretrained = nn.TransformerEncoder(layer, 2).eval()
    model = randomize(parametrize(pretrained, [noisy_copy(pretrained, k) for k in (1, 2)], rank=2, low_rank="all"))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 4] = True
    with torch.no_grad():
        plain = merge(model, [0.5, 0.5])
        y = model(x, src_key_padding_mask=padding)
        expected = plain(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)
    assert plain.use_nested_tensor == pretrained.use_nested_tensor
    assert plain.layers[0].activation_relu_or_gelu == pretrained.layers[0].activation_relu_or_gelu


class Doubled(ParetoModule, nn.Conv1d):
    """A Pareto form of a class that has none of its own."""

    weight = merged_property("weight")
    bias = merged_property("bias")

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_of_ones_own_is_registered_from_outside(copies: Copies) -> None:
    net, x = nn.Sequential(nn.Conv1d(2, 3, 1)), torch.randn(1, 2, 4)
    expected = 2 * parametrize(net, copies(net, 2))(x)
    register(nn.Conv1d, Doubled, lambda module, names: module.groups == 1)
    try:
        model = parametrize(net, copies(net, 2))
        assert type(model[0]) is Doubled
        torch.testing.assert_close(model(x), expected)
        assert type(merge(model, [0.5, 0.5])[0]) is nn.Conv1d
        grouped = nn.Sequential(nn.Conv1d(2, 4, 1, groups=2))
        assert type(parametrize(grouped, copies(grouped, 2))[0]) is not Doubled
        with pytest.raises(ValueError, match=r"layer: expected a new class, got <class '.*Conv1d'>, which is taken"):
            register(nn.Conv1d, ParetoModule, lambda module, names: True)
        register(nn.Conv1d, Doubled, lambda module, names: False, replace=True)
        assert type(parametrize(net, copies(net, 2))[0]) is not Doubled
    finally:
        del LAYERS[nn.Conv1d]
