"""The type that an engine computes in, and files and arguments that are wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from support.engines import ENCODER, GAMMAS, expected, images
from torch import nn

from pareto_merging.errors import UserError
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine

pytestmark = pytest.mark.usefixtures("many_items_are_eight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16], ids=str)
def test_types(file: Path, model: nn.Module, dtype: Any) -> None:
    engine = Engine(file, "cpu", dtype)
    batch = images(5)
    found = engine(batch, GAMMAS)
    assert str(found.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    truth = expected(copy.deepcopy(model).double(), batch.double(), GAMMAS)
    plain = copy.deepcopy(model).to(engine.dtype)
    allowed = (expected(plain, batch.to(engine.dtype), GAMMAS).double() - truth).abs().max()
    assert float((found.double() - truth).abs().max()) <= 2 * float(allowed) + 1e-6
    shared = engine(batch, GAMMAS[1])
    again = engine(batch, GAMMAS[1])
    assert float((shared.double() - again.double()).abs().max()) <= 4 * float(allowed) + 1e-6


def test_the_type_is_the_files(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "folded.safetensors"
    save_folded(copy.deepcopy(model).bfloat16(), path, encoder=ENCODER)
    assert Engine(path, "cpu").dtype == torch.bfloat16
    # a float32 file through a module in bfloat16 loses nothing, and the module stays as it was
    save_folded(model, path, encoder=ENCODER)
    plain = VisionTransformer(**ENCODER["arguments"]).bfloat16()
    before = copy.deepcopy(plain.state_dict())
    for _ in range(2):
        engine = Engine(path, "cpu", plain=plain)
        assert engine.dtype == torch.float32
        torch.testing.assert_close(engine(images(5), GAMMAS), expected(model, images(5), GAMMAS), rtol=1e-4, atol=1e-4)
    assert type(plain) is VisionTransformer
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_files_and_arguments_that_are_wrong(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file"):
        Engine(tmp_path / "none.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match=r"expected a pareto-folded file"):
        Engine(tmp_path / "other.safetensors")
    for options, kind, message in (
        ({"device": "nowhere"}, UserError, r"device: expected one that is here, got nowhere"),
        ({"device": "meta"}, UserError, r"device: expected one that is here"),
        ({"dtype": "int8"}, ValueError, r"dtype: expected one of float32, bfloat16, float16, float64, got int8"),
        ({"dtype": "nonsense"}, ValueError, r"dtype: expected one of"),
        ({"max_batch": 0}, ValueError, r"max_batch: expected at least 1 item, got 0"),
        ({"max_batch": True}, ValueError, r"max_batch: expected at least 1 item, got True"),
    ):
        with pytest.raises(kind, match=message):
            Engine(file, **options)  # type: ignore[arg-type]
