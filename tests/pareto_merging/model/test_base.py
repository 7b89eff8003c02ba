"""Another base than the pretrained weights: how it is set, what it changes, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import nn

import pareto_merging as pm
from pareto_merging.model.base import base_tensors, note_base, set_base
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.learned import get_lambda
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import pareto_state, set_preference
from pareto_merging.model.strategy import set_strategy

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_base_tensors_are_the_plain_module_s(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, constant_rank=2)
    base = base_tensors(model)
    assert list(base) == [name for name, _ in tiny_vit.named_parameters()]
    assert all(torch.equal(base[name], p) for name, p in tiny_vit.named_parameters())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(base_tensors(parametrize(tied, [noisy_copy(tied, 1)]))) == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("strategy", ["eager", "cached"])
def test_the_model_begins_at_its_base(tiny_vit: nn.Module, copies: Copies, strategy: str) -> None:
    """At λ = 0 it is the merged model; λ, low-rank and constant terms count from there; nothing cached is left."""
    finetuned, other = copies(tiny_vit, 2), noisy_copy(tiny_vit, 9).eval()
    model = parametrize(tiny_vit, finetuned, rank=2, constant_rank=2)
    set_strategy(model, strategy)
    with torch.no_grad():
        before = model(IMAGES)
        set_base(model, dict(other.named_parameters()), "regmean")
        torch.testing.assert_close(model(IMAGES), other(IMAGES), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, other(IMAGES))
        assert bool((get_lambda(model) == 0).all())
        for gamma in ([0.3, 0.7], [1.0, 0.0]):
            plain = merge(model, gamma)
            assert all(torch.equal(p, other.get_parameter(name)) for name, p in plain.named_parameters())
        pm.set_lambda(model, 0.3)
        shifted = merge(model, [0.5, 0.5])
        for name, p in shifted.named_parameters():
            taus = sum(f.get_parameter(name) - tiny_vit.get_parameter(name) for f in finetuned.values())
            torch.testing.assert_close(p, other.get_parameter(name) + 0.3 * taus, rtol=1e-4, atol=1e-5)
        randomize(model)
        for gamma in ([0.3, 0.7], [1.0, 0.0]):
            set_preference(model, gamma)
            torch.testing.assert_close(model(IMAGES), merge(model, gamma)(IMAGES), rtol=1e-4, atol=1e-5)
            folded = fold(model)
            torch.testing.assert_close(model(IMAGES), folded(IMAGES), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), noisy_copy(tiny_vit, 9).parameters(), strict=True))


def test_what_it_was_made_of_is_noted(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    state = pareto_state(model)
    assert (state.start, state.base_digest) == ("pretrained", "")
    note_base(model, "sequential")
    first = state.base_digest
    assert state.start == "sequential" and len(first) == 64
    # the digest is that of the numbers, not of the time
    set_base(model, base_tensors(model), "regmean")
    assert (state.start, state.base_digest) == ("regmean", first)
    some = {"ln_post.weight": tiny_vit.ln_post.weight + 1}
    set_base(model, some, "regmean")
    assert state.base_digest != first
    assert torch.equal(base_tensors(model)["ln_post.weight"], some["ln_post.weight"])
    assert torch.equal(base_tensors(model)["conv1.weight"], tiny_vit.conv1.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_base_is_rounded_once(tiny_vit: nn.Module, copies: Copies, dtype: torch.dtype) -> None:
    net = tiny_vit.to(dtype)
    model, wide = parametrize(net, copies(net, 2), rank=2), noisy_copy(tiny_vit, 9).float()
    set_base(model, dict(wide.named_parameters()), "regmean")
    for name, tensor in base_tensors(model).items():
        assert tensor.dtype == dtype and torch.equal(tensor, wide.get_parameter(name).to(dtype)), name
    digest = pareto_state(model).base_digest
    set_base(model, {name: p.to(dtype) for name, p in wide.named_parameters()}, "regmean")
    assert pareto_state(model).base_digest == digest


def test_what_does_not_fit_changes_nothing(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit.half(), copies(tiny_vit, 2), rank=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = {"conv1.weight": torch.zeros(32, 3, 4, 4)}
    for bad, message in (
        ({"other": torch.zeros(3)}, r"base: expected a parameter of the model, got other \[3\]"),
        ({"ln_post.weight": torch.zeros(3)}, r"base: expected a parameter of shape \[32\], got ln_post.weight \[3\]"),
        ({"ln_post.weight": torch.full((32,), torch.nan)}, "finite numbers in ln_post.weight in torch.float16"),
        ({"ln_post.weight": torch.full((32,), 1e6)}, "finite numbers in ln_post.weight in torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            set_base(model, {**good, **bad}, "regmean")
    with pytest.raises(ValueError, match="got a folded one"):
        set_base(fold(model), good, "regmean")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pareto_state(model).start == "pretrained"
