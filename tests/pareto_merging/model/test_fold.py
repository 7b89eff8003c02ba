"""A Pareto model made plain for one preference, or folded for all."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
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
from pareto_merging.model.parameters import merged_parameters
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


class Everything(nn.Module):
    """Convolution, attention, a matrix used twice, and linear layers: each image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attn = nn.Conv2d(3, 6, 4, stride=4), nn.MultiheadAttention(6, 2, batch_first=True)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).flatten(2).mT
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.out(self.b(torch.tanh(self.a(h)))).mean(dim=1)


def with_constant(core: str = "tensor", dtype: torch.dtype = torch.float64, **how: Any) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Everything().to(dtype).eval()
    finetuned = [noisy_copy(net, seed) for seed in (1, 2, 3)]
    settings = {"rank": 2, "low_rank": "all", "constant_rank": 3, "core": core, **how}
    return net, randomize(parametrize(net, finetuned, **settings))


def dense(model: nn.Module, name: str, gamma: torch.Tensor) -> torch.Tensor:
    """W0 + Σλτ + A_c·B_cᵀ + A·C·Bᵀ of one parameter, from the definition."""
    stored = next(p for p in merged_parameters(model) if p.path == name)
    value = stored.weight + sum(lam * tau for lam, tau in zip(stored.lam, stored.task_vectors, strict=True))
    if stored.A_c is not None:
        value = value + (stored.A_c @ stored.B_c.T).view(value.shape)
    if stored.A is not None:
        inner = {"tensor": lambda: stored.A @ (stored.G @ gamma) @ stored.B.T,
                 "outer-product": lambda: torch.outer(stored.A @ gamma, stored.B @ gamma),
                 "outer-vector": lambda: torch.outer(stored.A @ gamma, stored.B[:, 0])}  # fmt: skip
        value = value + inner[model.pareto.core]()
    return value.detach()


@pytest.mark.parametrize("core", ["tensor", "outer-product", "outer-vector"])
@pytest.mark.parametrize("low_rank", ["all", "none"])
def test_a_constant_term_is_in_the_model_its_merge_and_its_fold(core: str, low_rank: str) -> None:
    net, model = with_constant(core, low_rank=low_rank)
    images = IMAGES[:3].double()
    kinds = {name.partition(".")[0] for name in learned_parameters(model)}
    assert {"A_c", "B_c"} <= kinds
    matrices = {name for name, p in net.named_parameters() if p.ndim > 1}
    assert {n.partition(".")[2] for n in learned_parameters(model) if n.startswith("A_c.")} == matrices
    folded = fold(model)
    left = {name.partition(".")[0] for name in learned_parameters(folded)}
    assert left == kinds - {"lam", "A_c", "B_c"}
    assert not any("_c" in key.rpartition(".")[2] for key in folded.state_dict())
    for gamma in ([0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        plain, wanted = merge(model, gamma), copy.deepcopy(net)
        with torch.no_grad():
            for name, p in wanted.named_parameters():
                p.copy_(dense(model, name, torch.tensor(gamma).double()))
                torch.testing.assert_close(plain.get_parameter(name), p, rtol=1e-6, atol=1e-7)
            assert plain.b.weight is plain.a.weight
            for one in (model, folded):
                set_preference(one, gamma)
                torch.testing.assert_close(one(images), wanted(images), rtol=1e-6, atol=1e-7)
            again = merge(folded, gamma)
            torch.testing.assert_close(again(images), wanted(images), rtol=1e-6, atol=1e-7)
    assert sum(p.numel() for p in merge(folded, gamma).parameters()) == sum(p.numel() for p in net.parameters())


def test_a_constant_term_and_a_preference_per_item_after_fold() -> None:
    _, model = with_constant()
    folded, images = fold(model), IMAGES[:3].double()
    gammas = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    with torch.no_grad():
        expected = torch.cat([merge(model, gamma)(x[None]) for gamma, x in zip(gammas, images, strict=True)])
        for one in (model, folded):
            set_preference(one, gammas)
            torch.testing.assert_close(one(images), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_term_in_channels_last_and_16_bits(dtype: torch.dtype) -> None:
    _, model = with_constant(dtype=dtype)
    model.conv._parameters["weight"].data = model.conv._parameters["weight"].data.to(memory_format=torch.channels_last)
    gamma = [0.2, 0.3, 0.5]
    set_preference(model, gamma)
    wanted = dense(model, "conv.weight", torch.tensor(gamma)).float()
    for found in (model.conv.weight, merge(model, gamma).conv.weight, fold(model).conv.weight):
        assert (
            found.dtype == dtype
            and (found.float() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
        )
