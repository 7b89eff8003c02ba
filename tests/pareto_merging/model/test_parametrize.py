"""Any module and K copies → a Pareto model → plain modules again."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

import pmkernels
from pareto_merging.checkpoints import encoders
from pareto_merging.errors import UserError
from pareto_merging.model import pieces
from pareto_merging.model.attention import ParetoAttention
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.files import load_pareto_set, save_pareto_set
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.learned import get_lambda, lambda_group, lambda_names, learned_parameters, set_lambda
from pareto_merging.model.linear import ParetoLinear
from pareto_merging.model.low_rank import wants_low_rank
from pareto_merging.model.parameters import part_name
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import get_preference, preference, set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]
GAMMAS = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(tokens))))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))


def hugging_face_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.CLIPVisionModel(config)


def open_clip_attention() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=8,
        patch_size=4,
        width=32,
        layers=1,
        heads=2,
        mlp_ratio=2.0,
        output_dim=8,
        qk_norm=True,
        scale_heads=True,
    )


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)


def recurrent() -> nn.Module:
    return nn.LSTM(5, 7, num_layers=2, batch_first=True)


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(5))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "conv": (conv_net, IMAGES, "all"),
    "mlp": (mlp, torch.randn(5, 6, generator=torch.Generator().manual_seed(5)), "all"),
    "tied": (Tied, torch.arange(10).view(5, 2), "all"),
    "tied λ only": (Tied, torch.arange(10).view(5, 2), "none"),
    "Hugging Face": (hugging_face_clip, IMAGES, "attention"),
    "open_clip Attention": (open_clip_attention, IMAGES, "attention"),
    "encoder layer": (transformer_layer, torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(5)), "all"),
    "LSTM": (recurrent, torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(5)), "none"),
}


def build(name: str) -> tuple[nn.Module, Tensor, str]:
    make, x, low_rank = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), x, low_rank


def output(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.pooler_output if hasattr(result, "pooler_output") else result[0]


def by_hand(pretrained: nn.Module, copies: dict[str, nn.Module], model: nn.Module, gamma: list[float]) -> nn.Module:
    """The merged model from the formula, in plain loops over names: no code of ours but the learned numbers."""
    merged = copy.deepcopy(pretrained).double()
    base = {name: p.double() for name, p in pretrained.named_parameters(remove_duplicate=False)}
    learned = {name: value.detach().double() for name, value in learned_parameters(model).items()}
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            value = base[name].clone()
            for k, other in enumerate(copies.values()):
                tau = dict(other.named_parameters(remove_duplicate=False))[name].double() - base[name]
                if f"lam.{name}" in learned:
                    value += learned[f"lam.{name}"][k] * tau
            if f"A.{name}" in learned:
                core = sum(g * learned[f"G.{name}"][:, :, k] for k, g in enumerate(gamma))
                value += learned[f"A.{name}"] @ core @ learned[f"B.{name}"].T
            parameter.copy_(value)
    return merged


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


def test_weights_and_task_vectors_are_held_once(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)
    size = sum(p.numel() for p in tiny_vit.parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    frozen = sum(storages.values()) // 4 - sum(p.numel() for p in learned_parameters(model).values())
    assert frozen == (1 + 3) * size


def test_tied_weights_stay_tied(copies: Copies) -> None:
    pretrained, x, _ = build("tied")
    model = randomize(parametrize(pretrained, copies(pretrained, 3), low_rank="none"))
    assert lambda_names(model) == ["embed.weight", "inner.weight", "inner.bias"]
    for changed in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert changed.embed._parameters["weight"] is changed.out._parameters["weight"]
        assert changed.embed.task_vectors is changed.out.task_vectors
        assert changed.embed.lam is changed.out.lam
        torch.testing.assert_close(changed(x), model(x))
    plain = merge(model, GAMMAS[0])
    assert plain.embed.weight is plain.out.weight
    folded = fold(model)
    assert folded.embed.weight is folded.out.weight


def test_tied_weights_that_differ_in_a_copy_are_an_error(copies: Copies) -> None:
    pretrained, _, _ = build("tied")
    weights = {k: v.clone() for k, v in pretrained.state_dict().items()}
    weights["out.weight"] += 1
    with pytest.raises(ValueError, match=r"embed.weight and out.weight are tied in pretrained but differ in b"):
        parametrize(pretrained, {"a": pretrained.state_dict(), "b": weights})
    # a file may hold a tied tensor once
    del weights["out.weight"]
    parametrize(pretrained, {"a": weights})


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


def test_mismatched_copies_are_named(copies: Copies) -> None:
    pretrained, _, _ = build("mlp")
    good = {k: v.clone() for k, v in pretrained.state_dict().items()}
    missing = {k: v for k, v in good.items() if k != "0.bias"}
    extra = {**good, "head.weight": torch.zeros(2)}
    shaped = {**good, "2.weight": torch.zeros(4, 9)}
    with pytest.raises(
        ValueError, match=r"b lacks 0.bias; c has an extra head.weight; d has 2.weight of shape \[4, 9\]"
    ):
        parametrize(pretrained, {"a": good, "b": missing, "c": extra, "d": shaped})
    with pytest.raises(ValueError, match="expected at least one fine-tuned copy"):
        parametrize(pretrained, [])
    with pytest.raises(TypeError, match="expected a sequence or mapping of K fine-tuned copies, got a single one"):
        parametrize(pretrained, good)
    with pytest.raises(TypeError, match="expected a sequence or mapping of K fine-tuned copies, got a single one"):
        parametrize(pretrained, pretrained)
    with pytest.raises(TypeError, match="finetuned: expected modules or state dicts, got str"):
        parametrize(pretrained, {"a": "file.pt"})
    with pytest.raises(TypeError, match=r"pretrained: expected an nn.Module"):
        parametrize(good, [pretrained])
    with pytest.raises(ValueError, match="pretrained: expected a plain module, got a Pareto model"):
        parametrize(parametrize(pretrained, [good], low_rank="none"), [good])


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


def test_only_the_learned_parameters_require_a_gradient(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learned = {id(p) for p in learned_parameters(model).values()}
    assert all(p.requires_grad == (id(p) in learned) for p in model.parameters())
    count = sum(p.numel() for p in learned_parameters(model).values())
    block = 2 * (96 + 32) + 2 * 2 * 2 + 2 * (32 + 32) + 2 * 2 * 2
    assert count == 2 * block + 2 * len(lambda_names(model))


def test_one_task_and_a_model_inside_another(tiny_vit: nn.Module, copies: Copies) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 1), rank=2))
    torch.testing.assert_close(merge(model, [1.0])(IMAGES), model(IMAGES))
    outer = nn.Sequential(model, nn.Linear(8, 2))
    with preference(outer, [1.0]):
        assert outer(IMAGES).shape == (5, 2)
    assert get_preference(outer) == {"t0": 1.0}


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


def test_every_part_is_registered_under_its_name(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    for _, module in pareto_modules(model):
        assert isinstance(module, ParetoModule)
        for name in module.pareto_names:
            parts = module.pareto_parts(name)
            assert parts["task_vectors"] is not None
            merged = pmkernels.reference.merge_weight(
                module._parameters[name], gamma=None if parts["A"] is None else module.pareto.now.gamma, **parts
            )
            torch.testing.assert_close(module.pareto_merged(name), merged)
    assert part_name("weight", "lam") == "lam"
    assert isinstance(model.transformer.resblocks[0].attn, ParetoAttention)
    assert isinstance(model.transformer.resblocks[0].mlp.c_fc, ParetoLinear)


class Scaled(nn.Module):
    """A linear layer that was given a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.fc.scale


class Extra(nn.Linear):
    """A module that keeps more than tensors in its state dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


def shared_module() -> nn.Module:
    activation, linear = nn.PReLU(), nn.Linear(4, 4)
    return nn.Sequential(linear, activation, nn.LayerNorm(4), linear, activation)


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())


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


def test_a_merged_parameter_cannot_be_replaced(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(AttributeError, match="weight: expected a merged parameter to be left alone"):
        model.ln_pre.weight = nn.Parameter(torch.zeros(32))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert model(IMAGES).shape == (5, 8)


def test_shared_lambda_taken_apart_is_noticed(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, granularity="model")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="expected one λ vector for model, got several"):
        get_lambda(model)


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


class Lazy(Mapping[str, Tensor]):
    """Reads: every access is new memory, and what was read before must be gone by then."""

    def __init__(self, tensors: Mapping[str, Tensor], with_shapes: bool = True) -> None:
        self.tensors = tensors
        self.reads: Counter[str] = Counter()
        self.last: weakref.ref[Any] | None = None
        if with_shapes:
            self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        assert self.last is None or self.last() is None, f"{name} is read while another tensor is held"
        self.reads[name] += 1
        value = self.tensors[name].detach().clone()
        # the memory, whatever tensors there are of it
        self.last = weakref.ref(value.untyped_storage())
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (value.dtype, value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


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


@pytest.mark.parametrize("preprocess", ["none", "ties", "dare"])
@pytest.mark.parametrize("with_shapes", [True, False])
@pytest.mark.parametrize("name", ["tied", "conv", "open_clip Attention"])
def test_a_lazy_mapping_holds_one_tensor_at_a_time(
    name: str, with_shapes: bool, preprocess: Any, copies: Copies
) -> None:
    pretrained, _, low_rank = build(name)
    finetuned = copies(pretrained, 3)
    lazy = {task: Lazy(other.state_dict(), with_shapes) for task, other in finetuned.items()}
    settings: Any = {"rank": 2, "low_rank": low_rank, "preprocess": preprocess, "buffers": "average"}
    model = parametrize(pretrained, lazy, **settings)
    expected = parametrize(pretrained, finetuned, **settings)
    assert bits(model) == bits(expected)
    assert model.pareto.digests == expected.pareto.digests
    if preprocess == "none":
        assert all(set(other.reads.values()) == {1 if with_shapes else 2} for other in lazy.values())


def test_shapes_are_believed_until_the_tensor_is_read() -> None:
    plain = nn.Linear(3, 2)
    wrong = Lazy({**plain.state_dict(), "scale": torch.ones(1)})
    wrong.shapes["weight"] = (2, 4)
    with pytest.raises(ValueError, match=r"a has an extra scale; a has weight of shape \[2, 4\], expected \[2, 3\]"):
        parametrize(plain, {"a": wrong})
    assert not wrong.reads
    # [2, 1] would broadcast
    promised = Lazy({**plain.state_dict(), "weight": torch.zeros(2, 1)})
    promised.shapes["weight"] = (2, 3)
    with pytest.raises(ValueError, match=r"weight of a to have shape \[2, 3\], got \[2, 1\]"):
        parametrize(plain, {"a": promised})


def test_tied_weights_of_a_lazy_mapping() -> None:
    pretrained, _, _ = build("tied")
    weights = {name: value.clone() for name, value in pretrained.state_dict().items()}
    weights["embed.weight"][0], weights["out.weight"][0] = 0.0, -0.0

    class Files(Lazy):
        def __getitem__(self, name: str) -> Tensor:
            # where the bits differ two are compared
            self.last = None
            return super().__getitem__(name)

    # the same numbers
    parametrize(pretrained, {"a": Files(weights)})
    weights["out.weight"][0] = 1.0
    with pytest.raises(ValueError, match=r"embed.weight and out.weight are tied in pretrained but differ in a"):
        parametrize(pretrained, {"a": Files(weights)})


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_digests_and_differences_do_not_depend_on_the_pieces(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    for shape in ((), (0,), (5,), (4, 3), (2, 3, 5), (1, 1, 11), (11, 1, 1)):
        value = (5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
        for tensor in (value, value.movedim(0, -1) if value.ndim else value):
            # what files in the wild carry: the whole tensor at once, 16-bit values as float32
            whole = tensor.float() if dtype in (torch.float16, torch.bfloat16) else tensor
            part = hashlib.sha256(f"{whole.dtype} {list(whole.shape)} ".encode() + whole.numpy().tobytes())
            ours = TensorDigest()
            ours.add("w", tensor)
            assert ours.hexdigest() == hashlib.sha256(f"w {part.hexdigest()}".encode()).hexdigest(), shape
            cut = [tensor[index] for index in pieces.pieces_of(tensor.shape)]
            assert all(0 < piece.numel() <= chunk for piece in cut)
            assert torch.equal(torch.cat([torch.empty(0, dtype=dtype), *(p.flatten() for p in cut)]), tensor.flatten())
            if dtype in (torch.float16, torch.bfloat16):
                model = nn.ParameterDict({"w": tensor})
                other = {"w": tensor.float() * 1.01 + 1e-3}
                tau = parametrize(model, [other], low_rank="none").state_dict().get("w_task_vectors")
                expected = (other["w"] - tensor.float()).to(dtype)
                assert torch.equal(tau[0], expected) if tensor.numel() else tau is None
