"""ParetoAttention: same results as the original at W(γ), in every layout and with every mask."""

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

from pareto_merging.model.attention import ParetoAttention
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

GAMMA = [0.2, 0.8]
BATCH, LENGTH, SOURCE, SIZE, HEADS = 3, 4, 5, 8, 2


def attention(**settings: object) -> tuple[nn.MultiheadAttention, ParetoAttention]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.MultiheadAttention(SIZE, HEADS, **settings).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1)
    model = randomize(parametrize(plain, [noisy_copy(plain, 1), noisy_copy(plain, 2)], rank=2))
    assert isinstance(model, ParetoAttention)
    set_preference(model, GAMMA)
    merged = merge(model, GAMMA)
    assert type(merged) is nn.MultiheadAttention
    return merged, model


def inputs(batch_first: bool, batched: bool = True, source: int = SOURCE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(BATCH, LENGTH, SIZE), (BATCH, source, SIZE), (BATCH, source, SIZE)]
    tensors = [torch.randn(*(shape if batched else shape[1:]), generator=generator) for shape in shapes]
    return tuple(t.transpose(0, 1) if batched and not batch_first else t for t in tensors)  # type: ignore[return-value]


def assert_same(expected: tuple[Tensor, Tensor | None], got: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (got[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["self", "key is value", "all differ"])
def test_layouts(batch_first: bool, need_weights: bool, kind: str) -> None:
    plain, model = attention(batch_first=batch_first)
    query, key, value = inputs(batch_first)
    if kind == "self":
        key = value = query
    elif kind == "key is value":
        value = key
    assert_same(
        plain(query, key, value, need_weights=need_weights), model(query, key, value, need_weights=need_weights)
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("mask", ["none", "2D bool", "2D float", "3D float", "padding", "both", "causal"])
def test_masks(mask: str, need_weights: bool, batched: bool) -> None:
    plain, model = attention(batch_first=True)
    query, key, value = inputs(True, batched, source=LENGTH)
    batch = BATCH if batched else 1
    generator = torch.Generator().manual_seed(2)
    boolean = torch.rand(LENGTH, LENGTH, generator=generator) > 0.6
    boolean[:, 0] = False
    padding = torch.zeros(batch, LENGTH, dtype=torch.bool)
    padding[:, -1] = True
    padding = padding if batched else padding[0]
    arguments: dict[str, object] = {"need_weights": need_weights}
    if mask in ("2D bool", "both"):
        arguments["attn_mask"] = boolean
    if mask == "2D float":
        arguments["attn_mask"] = torch.randn(LENGTH, LENGTH, generator=generator)
    if mask == "3D float":
        arguments["attn_mask"] = torch.randn(batch * HEADS, LENGTH, LENGTH, generator=generator)
    if mask in ("padding", "both"):
        arguments["key_padding_mask"] = padding
    if mask == "causal":
        arguments |= {"attn_mask": torch.full((LENGTH, LENGTH), -torch.inf).triu(1), "is_causal": True}
    assert_same(plain(query, key, value, **arguments), model(query, key, value, **arguments))


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": False},
        {"kdim": SIZE, "vdim": SIZE},
        {"kdim": 6, "vdim": 7},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
    ],
)
def test_forms_of_attention(settings: dict[str, object]) -> None:
    plain, model = attention(batch_first=True, **settings)
    query, key, value = inputs(True)
    key, value = key[..., : settings.get("kdim", SIZE)], value[..., : settings.get("vdim", SIZE)]  # type: ignore[misc]
    assert_same(plain(query, key, value), model(query, key, value))
    with torch.enable_grad():
        model(query, key, value)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_weights_per_head_and_gradient_of_the_input() -> None:
    plain, model = attention(batch_first=True)
    query, key, value = (t.requires_grad_() for t in inputs(True))
    expected = plain(query, key, value, average_attn_weights=False)
    got = model(query, key, value, average_attn_weights=False)
    assert_same(expected, got)
    for a, b in zip(
        torch.autograd.grad(expected[0].sum(), (query, key, value)),
        torch.autograd.grad(got[0].sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_is_applied_in_training_only() -> None:
    _, model = attention(batch_first=True, dropout=0.5)
    query, key, value = inputs(True)
    assert torch.equal(model(query, key, value)[0], model(query, key, value)[0])
    model.train()
    for need_weights in (True, False):
        first, second = (model(query, key, value, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("folding", [False, True])
def test_a_preference_per_item_in_either_layout(batch_first: bool, folding: bool) -> None:
    _, model = attention(batch_first=batch_first)
    module = fold(model) if folding else model
    gammas = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])
    set_preference(module, gammas)
    query, key, value = inputs(batch_first)
    out, weights = module(query, key, value)
    for item in range(BATCH):
        pick = (lambda t, i=item: t[i : i + 1]) if batch_first else (lambda t, i=item: t[:, i : i + 1])
        alone, alone_weights = merge(model, gammas[item])(pick(query), pick(key), pick(value))
        torch.testing.assert_close(pick(out), alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[item : item + 1], alone_weights, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected one for an input without a batch"):
        module(query[0], key[0], value[0])


def test_mask_errors() -> None:
    _, model = attention(batch_first=True)
    query, key, value = inputs(True)
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(4, 5\) or \(6, 4, 5\), got \(4, 4\)"):
        model(query, key, value, attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="key_padding_mask: expected shape"):
        model(query, key, value, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask: expected a mask where is_causal is set"):
        model(query, key, value, is_causal=True)
    with pytest.raises(TypeError, match="attn_mask: expected a boolean or floating-point mask"):
        model(query, key, value, attn_mask=torch.zeros(4, 5, dtype=torch.int64))
