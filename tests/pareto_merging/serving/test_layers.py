"""The layers of served models: one model of memory, any module, one preference where only one is possible."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from open_clip.transformer import VisionTransformer
from support.engines import ENCODER, GAMMAS, expected, images, pareto
from torch import Tensor, nn

import pareto_merging
import pmkernels
from pareto_merging.errors import UserError
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine
from pareto_merging.serving.layers import ServedAttention, ServedLinear

pytestmark = pytest.mark.usefixtures("many_items_are_eight")


def test_it_holds_one_model(tmp_path: Path) -> None:
    plain = VisionTransformer(
        image_size=32, patch_size=16, width=256, layers=4, heads=4, mlp_ratio=4.0, output_dim=64
    ).bfloat16()
    state = pareto_merging.parametrize(plain, [copy.deepcopy(plain)], rank=4, digests=False)
    randomize(state)
    save_folded(state, tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=plain)
    bytes_of_plain = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert engine.dtype == torch.bfloat16
    # r is padded to 16 beside W: of width 256 a larger share than of 1024
    assert bytes_of_plain < engine.bytes < 1.03 * bytes_of_plain
    kinds = {type(module) for module in engine._model.modules()}
    assert {ServedLinear, ServedAttention} <= kinds
    assert not any(name.endswith(("_A", "_lam", ".A", ".lam")) for name, _ in engine._model.named_parameters())


class Stubborn(nn.Module):
    """Looks at values, which torch.vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if bool(hidden.isfinite().all()) else torch.zeros_like(hidden))


class Conv(nn.Module):
    """A low-rank term in a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.t()


def test_other_modules(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    for plain, low_rank, per_item in ((Stubborn(), "all", True), (Conv(), lambda name, m: True, False)):
        learned = pareto(plain, low_rank=low_rank)
        save_folded(learned, tmp_path / "folded.safetensors")
        engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=copy.deepcopy(plain))
        assert engine.per_item is per_item
        truth = expected(learned, x, GAMMAS)
        if per_item:
            torch.testing.assert_close(engine(x, GAMMAS), truth)
        else:
            with pytest.raises(
                ValueError, match=r"preferences: expected one for the whole batch .* got one for each of 5 images"
            ):
                engine(x, GAMMAS)
        swept = engine.sweep(x, GAMMAS)
        for index, gamma in enumerate(GAMMAS):
            for _ in range(2):
                whole = engine(x, gamma)
                torch.testing.assert_close(whole[index], truth[index])
            torch.testing.assert_close(swept[index], whole)
        with pytest.raises(UserError, match=r"expected a file that says what images it takes"):
            _ = engine.image_size


class Attending(nn.Module):
    """Self-attention, of any kind."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0].mean(dim=1)


@pytest.mark.parametrize(
    ("options", "low_rank"),
    [
        ({"add_zero_attn": True}, "attention"),
        ({"add_bias_kv": True}, "attention"),
        ({}, lambda name, module: name.endswith("out_proj.weight")),
    ],
    ids=["zero attention", "bias_k", "out-projection alone"],
)
def test_attention_that_takes_one_preference(tmp_path: Path, options: dict[str, Any], low_rank: Any) -> None:
    torch.manual_seed(2)
    plain = Attending(**options)
    learned = pareto(plain, low_rank=low_rank)
    save_folded(learned, tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=plain)
    x = torch.randn(4, 5, 8)
    engine.warm_up(item_shape=(5, 8))
    truth = expected(learned, x, GAMMAS[1].expand(4, -1))
    for _ in range(3):
        torch.testing.assert_close(engine(x, GAMMAS[1]), truth)
    torch.testing.assert_close(engine.sweep(x, GAMMAS)[1], truth)
    with pytest.raises(ValueError, match=r"expected one for the whole batch"):
        engine(x, GAMMAS[:4])


def test_low_rank_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = VisionTransformer(**ENCODER["arguments"]).eval()
    learned = pareto(plain, low_rank="all")
    save_folded(learned, tmp_path / "folded.safetensors", encoder=ENCODER)
    engine = Engine(tmp_path / "folded.safetensors", "cpu")
    batch = images(5)
    assert engine.per_item
    torch.testing.assert_close(engine(batch, GAMMAS), expected(learned, batch, GAMMAS), rtol=1e-4, atol=1e-4)
    for _ in range(2):
        found = engine(batch, GAMMAS[1])
    torch.testing.assert_close(found, expected(learned, batch, GAMMAS[1].expand(5, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("core", ["outer-product", "outer-vector"])
def test_structures_without_a_core(tmp_path: Path, core: str) -> None:
    plain = VisionTransformer(**ENCODER["arguments"]).eval()
    learned = pareto(plain, core=core, rank=3)
    save_folded(learned, tmp_path / "folded.safetensors", encoder=ENCODER)
    engine = Engine(tmp_path / "folded.safetensors", "cpu")
    batch = images(9)
    for _ in range(2):
        found = engine(batch, GAMMAS[1])
    torch.testing.assert_close(found, expected(learned, batch, GAMMAS[1].expand(9, -1)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"has no learned core"):
        engine(batch[:5], GAMMAS)


def test_one_product_with_B_for_q_k_and_v(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    served = pmkernels.preference_linear

    def noting(x: Tensor, wide: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(tuple(wide.shape))
        return served(x, wide, *rest, **options)

    monkeypatch.setattr(pmkernels, "preference_linear", noting)
    engine(images(2), GAMMAS[:2])
    # in- and out-projection of three blocks
    assert shapes == [(96, 48), (32, 48)] * 3
