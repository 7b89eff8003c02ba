"""Which matrices have a low-rank term."""

from collections.abc import Callable
from typing import Any

import pytest
from support.networks import (
    build,
)
from torch import nn

from pareto_merging.checkpoints import encoders
from pareto_merging.model.low_rank import wants_low_rank

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


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
