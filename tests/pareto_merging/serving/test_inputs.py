"""What a caller may give an engine, and what it may not; the type that it computes in."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from support.engines import ENCODER, GAMMAS, expected, images
from torch import nn

from pareto_merging.errors import UserError
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine


def test_forms_of_preferences(engine: Engine, model: nn.Module) -> None:
    batch = images(2)
    truth = expected(model, batch, torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]))
    forms: list[Any] = [
        torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]),
        torch.tensor([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64),
        [[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]],
        [{"ones": 0.6}, {"twos": 1}],
        [torch.tensor([0.6, 0.2, 0.2]), {"twos": 1.0}],
        ({"ones": 0.6}, [0.0, 1.0, 0.0]),
        ["ones=0.6", "0,1,0"],
        [np.array([0.6, 0.2, 0.2]), {"twos": 1}],
        np.array([[0.6, 0.2, 0.2], [0.0, 1.0, 0.0]]),
    ]
    for form in forms:
        torch.testing.assert_close(engine(batch, form), truth, rtol=1e-4, atol=1e-4)
    one = expected(model, batch, torch.tensor([[0.6, 0.2, 0.2]] * 2))
    for shared in (torch.tensor([0.6, 0.2, 0.2]), [0.6, 0.2, 0.2], {"ones": 0.6}, "ones=0.6", [[0.6, 0.2, 0.2]] * 2):
        torch.testing.assert_close(engine(batch, shared), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ([0.5, 0.5], r"expected shape \[3\]"),
        ([0.5, 0.6, 0.1], r"expected a sum of 1"),
        ([[0.5, 0.5, 0.0]] * 3, r"expected one for each of 2 images \(or one for all\), got 3"),
        ([[0.5, 0.5, 0.0], [float("nan"), 0.5, 0.5]], r"expected finite numbers"),
        ([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]], r"expected non-negative numbers"),
        ([{"ones": 0.5}, {"fours": 0.5}], r"expected task names among ones, twos, threes; got fours"),
        ([{"ones": 0.5}, 3], r"got a mixture"),
        ([], r"preference: expected shape"),
        (None, r"preference: expected 3 numbers"),
        ("nonsense", r"preference: expected 3 numbers such as"),
        (["equal", "ones=2"], r"preference: expected a sum of at most 1"),
    ],
    ids=str,
)
def test_preferences_that_are_none(engine: Engine, preferences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(images(2), preferences)


def test_images_that_are_none(engine: Engine) -> None:
    for bad, kind, message in (
        (images(2).byte(), TypeError, r"images: expected a floating-point tensor, .* got torch.uint8"),
        ([1, 2], TypeError, r"got list"),
        (images(2)[..., :8], ValueError, r"images: expected shape \[n, 3, 16, 16\], got \[2, 3, 16, 8\]"),
        (images(2)[0], ValueError, r"images: expected shape \[n, 3, 16, 16\], got \[3, 16, 16\]"),
        (images(0), ValueError, r"images: expected \[n, …\] with n at least 1"),
    ):
        with pytest.raises(kind, match=message):
            engine(bad, GAMMAS[0])  # type: ignore[arg-type]
    # and it goes on as if nothing had happened
    assert torch.isfinite(engine(images(2), GAMMAS[:2])).all()


@pytest.mark.usefixtures("many_items_are_eight")
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


@pytest.mark.usefixtures("many_items_are_eight")
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


@pytest.mark.usefixtures("many_items_are_eight")
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
