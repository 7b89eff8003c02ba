"""Any module and K copies → a Pareto model → plain modules again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import noisy_copy, randomize
from support.networks import (
    GAMMAS,
    IMAGES,
    MODELS,
    Extra,
    Scaled,
    bits,
    build,
    output,
    parametrized,
    shared_module,
)
from torch import nn

from pareto_merging.checkpoints import encoders
from pareto_merging.errors import UserError
from pareto_merging.model.files import load_pareto_set, save_pareto_set
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.learned import get_lambda, lambda_names, learned_parameters
from pareto_merging.model.parametrize import parametrize, wants_low_rank
from pareto_merging.model.state import get_preference, preference, set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_is_left_alone_and_the_signature_stays(name: str, copies: Copies) -> None:
    pretrained, x, low_rank = build(name)
    before = {key: value.clone() for key, value in pretrained.state_dict().items()}
    model = parametrize(pretrained, copies(pretrained, 2), rank=2, low_rank=low_rank)
    assert isinstance(model, type(pretrained))
    assert type(pretrained).forward is type(pretrained).forward
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in pretrained.state_dict().items())
    assert all(p.requires_grad for p in pretrained.parameters())
    assert output(model(x)).shape == output(pretrained(x)).shape


# an interpreter is not for full size
@pytest.mark.parametrize("strategy", ["eager"], indirect=True)
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
@pytest.mark.slow
def test_open_clip_at_full_size(name: str) -> None:
    pretrained = encoders.build({"architecture": name})
    finetuned = {f"t{k}": noisy_copy(pretrained, k + 1, scale=1e-3) for k in range(2)}
    model = randomize(parametrize(pretrained, finetuned, digests=False), scale=0.01)
    config = open_clip.get_model_config(name)["vision_cfg"]
    layers = config["layers"]
    low_rank = [n for n in learned_parameters(model) if n.startswith("G.")]
    assert len(low_rank) == 2 * layers, "in- and out-projection of every block"
    # per block: in- and out-projection, two MLP layers and two layer norms, weight and bias each
    assert len(lambda_names(model)) == 12 * layers + 8
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    set_preference(model, [0.3, 0.7])
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(merge(model, [0.3, 0.7])(x), y, rtol=1e-4, atol=1e-5)
        folded = fold(model)
        per_item = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
        set_preference(folded, per_item)
        torch.testing.assert_close(folded(x)[0], y[0], rtol=1e-4, atol=1e-5)


def test_buffers_from_pretrained_or_averaged(copies: Copies) -> None:
    pretrained, x, _ = build("conv")
    finetuned = copies(pretrained, 3)
    kept = parametrize(pretrained, finetuned, low_rank="none")
    assert torch.equal(kept[1].running_mean, pretrained[1].running_mean)
    averaged = parametrize(pretrained, finetuned, low_rank="none", buffers="average")
    for name in ("running_mean", "running_var"):
        expected = sum(getattr(m[1], name) for m in finetuned.values()) / 3
        torch.testing.assert_close(getattr(averaged[1], name), expected)
    assert torch.equal(averaged[1].num_batches_tracked, pretrained[1].num_batches_tracked)
    torch.testing.assert_close(merge(averaged, GAMMAS[0])(x), averaged(x))


def test_zero_task_vectors_are_not_stored(copies: Copies) -> None:
    pretrained, x, _ = build("mlp")
    finetuned = {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in copies(pretrained, 2).items()}
    for weights in finetuned.values():
        weights["0.bias"] = pretrained[0].bias.detach().clone()
    model = parametrize(pretrained, finetuned, low_rank="none")
    assert lambda_names(model) == ["0.weight", "2.weight"]
    assert "0.bias_task_vectors" not in model.state_dict()
    torch.testing.assert_close(model[0].bias, pretrained[0].bias)
    unchanged = parametrize(pretrained, {"a": pretrained}, low_rank="none")
    assert get_lambda(unchanged).shape == (0, 1)
    assert torch.equal(unchanged(x), pretrained(x))
    set_preference(unchanged, [1.0])
    # the low-rank term may be all there is
    frozen = randomize(parametrize(pretrained, {"a": pretrained}, rank=2, low_rank="all"))
    torch.testing.assert_close(merge(frozen, [1.0])(x), frozen(x))
    assert not torch.allclose(frozen(x), pretrained(x))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0"),
        ({"low_rank": "mlp"}, "low_rank: expected attention, in-projection, all, none or a function, got 'mlp'"),
        ({"granularity": "layer"}, "granularity: expected tensor, module, block or model, got 'layer'"),
        ({"buffers": "sum"}, "buffers: expected pretrained or average, got 'sum'"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    pretrained, _, _ = build("mlp")
    with pytest.raises(ValueError, match=message):
        parametrize(pretrained, [pretrained], **setting)


def test_one_task_and_a_model_inside_another(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 1), rank=2))
    torch.testing.assert_close(merge(model, [1.0])(IMAGES), model(IMAGES))
    outer = nn.Sequential(model, nn.Linear(8, 2))
    with preference(outer, [1.0]):
        assert outer(IMAGES).shape == (5, 2)
    assert get_preference(outer) == {"t0": 1.0}


@pytest.mark.parametrize(
    "make",
    [
        Scaled,
        shared_module,
        parametrized,
        lambda: nn.Sequential(Extra(4, 4), nn.ReLU()),
        lambda: nn.Linear(4, 4),
    ],
)
def test_at_lambda_one_of_one_task_the_model_is_the_fine_tuned_one(make: Callable[[], nn.Module]) -> None:
    pretrained = make().eval()
    finetuned = noisy_copy(pretrained, 1)
    model = parametrize(pretrained, [finetuned], rank=2, low_rank="attention", init_lambda=1.0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), finetuned(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(model, [1.0])(x), finetuned(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold(model)(x), finetuned(x), rtol=1e-4, atol=1e-5)
    assert type(merge(model, [1.0])) is type(pretrained)


def test_the_default_dtype_and_device_do_not_matter(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 2)
    expected = parametrize(tiny_vit, finetuned, rank=2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = parametrize(tiny_vit, finetuned, rank=2)
            set_preference(model, [0.3, 0.7])
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(learned_parameters(model).items(), learned_parameters(expected).values(), strict=True):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b), name
    assert model.pareto.now.gamma.device.type == "cpu"


@pytest.mark.parametrize("buffers", ["pretrained", "average"])
@pytest.mark.parametrize("name", MODELS)
def test_in_place_gives_the_same_bits(name: str, buffers: Any, copies: Copies) -> None:
    pretrained, x, low_rank = build(name)
    finetuned = copies(pretrained, 2)
    expected = parametrize(pretrained, finetuned, rank=2, low_rank=low_rank, buffers=buffers)
    model = parametrize(pretrained, finetuned, rank=2, low_rank=low_rank, buffers=buffers, copy=False)
    assert model is pretrained
    assert bits(model) == bits(expected)
    assert model.pareto.digests == expected.pareto.digests
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert torch.equal(output(model(x)), output(expected(x)))
    assert type(merge(model, [0.5, 0.5])) is type(build(name)[0])


def test_loading_in_place(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    finetuned = copies(tiny_vit, 2)
    saved = randomize(parametrize(tiny_vit, finetuned, rank=2))
    path = tmp_path / "set.safetensors"
    save_pareto_set(saved, path)
    before = bits(tiny_vit)
    with pytest.raises(UserError, match="belongs to other weights; digest of t1"):
        load_pareto_set(path, tiny_vit, {**finetuned, "t1": noisy_copy(tiny_vit, 9)}, copy=False)
    assert bits(tiny_vit) == before
    assert not list(pareto_modules(tiny_vit)) and not hasattr(tiny_vit, "pareto")
    assert all(p.requires_grad for p in tiny_vit.parameters())
    # what is a Pareto model already is refused, and stays one
    with pytest.raises(ValueError, match="expected a plain module, got a Pareto model"):
        load_pareto_set(path, saved, finetuned, copy=False)
    assert load_pareto_set(path, tiny_vit, finetuned, copy=False) is tiny_vit
    assert bits(tiny_vit) == bits(saved)


def test_rank_16_on_the_in_projections_is_the_papers_half_percent() -> None:
    model = encoders.build({"architecture": "ViT-B-32"})
    added = sum(
        16 * sum(parameter.shape) + 16 * 16 * 8
        for name, parameter in model.named_parameters()
        if wants_low_rank(model, name, "in-projection")
    )
    assert 0.005 < added / sum(p.numel() for p in model.parameters()) < 0.008


def test_which_matrices_are_attention(tiny_vit: nn.Module) -> None:
    def chosen(model: nn.Module, setting: Any) -> set[str]:
        return {n for n, p in model.named_parameters() if p.ndim == 2 and wants_low_rank(model, n, setting)}

    block = "transformer.resblocks.0."
    attention = {block + "attn.in_proj_weight", block + "attn.out_proj.weight"}
    everything = attention | {block + "mlp.c_fc.weight", block + "mlp.c_proj.weight"}
    assert {n for n in chosen(tiny_vit, "attention") if n.startswith(block)} == attention
    assert {n for n in chosen(tiny_vit, "in-projection") if n.startswith(block)} == {block + "attn.in_proj_weight"}
    assert {n for n in chosen(tiny_vit, "all") if n.startswith(block)} == everything
    assert chosen(tiny_vit, "none") == set()
    assert chosen(tiny_vit, lambda name, module: "c_fc" in name) == {
        f"transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(2)
    }
    clip = build("Hugging Face")[0]
    names = {name.rpartition("encoder.layers.0.")[2] for name in chosen(clip, "attention") if "layers.0" in name}
    assert names == {f"self_attn.{p}_proj.weight" for p in ("q", "k", "v", "out")}
    names = {name.rpartition("encoder.layers.0.")[2] for name in chosen(clip, "in-projection") if "layers.0" in name}
    assert names == {f"self_attn.{p}_proj.weight" for p in ("q", "k", "v")}
