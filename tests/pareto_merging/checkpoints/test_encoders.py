"""Encoders by description."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.transformer import QuickGELU

from pareto_merging.checkpoints import encoders
from pareto_merging.errors import UserError

SMALL = {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 8}


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps(SMALL))
    description = encoders.describe(str(path), quick_gelu=True)
    assert encoders.image_size(description) == 8
    model = encoders.build(description)
    assert not model.training
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 8)
    assert any(isinstance(module, QuickGELU) for module in model.modules())
    assert not any(isinstance(m, QuickGELU) for m in encoders.build({**description, "quick_gelu": False}).modules())


def test_by_name() -> None:
    description = encoders.describe("ViT-B-32")
    assert encoders.image_size(description) == 224
    with torch.device("meta"):
        model = encoders.build(description)
    assert sum(p.numel() for p in model.parameters()) == 87_849_216
    with torch.device("meta"):
        quick = encoders.build(encoders.describe("ViT-B-32-quickgelu"))
    assert any(isinstance(module, QuickGELU) for module in quick.modules())


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an open_clip model name, got 'ViT-B32'; near: ViT-B-32"):
        encoders.describe("ViT-B32")
    with pytest.raises(UserError, match=r"none.json: expected a JSON file"):
        encoders.describe(str(tmp_path / "none.json"))
    bad = tmp_path / "bad.json"
    for text, message in (("{", "expected JSON"), ("[1]", "expected a mapping")):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            encoders.describe(str(bad))
    with pytest.raises(UserError, match=r"expected arguments of open_clip's VisionTransformer, got .*wdth"):
        encoders.build({"arguments": {**SMALL, "wdth": 3}})
    with pytest.raises(UserError, match="expected architecture or arguments"):
        encoders.build({})
