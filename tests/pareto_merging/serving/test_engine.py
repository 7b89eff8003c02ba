"""The engine against plain merged models: every way to compute, streams of preferences, sweeps, threads."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import ENCODER, GAMMAS, TASKS, FakeGraph, Tokens, expected, images, pareto, ways
from torch import Tensor, nn

import pmkernels
from pareto_merging.errors import UserError
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine

pytestmark = pytest.mark.usefixtures("many_items_are_eight")


def test_a_preference_per_item(engine: Engine, model: nn.Module) -> None:
    batch = images(5)
    features = engine(batch, GAMMAS)
    assert features.shape == (5, 12) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected(model, batch, GAMMAS), rtol=1e-4, atol=1e-4)
    # the images differ by their preferences too, or the test proves nothing
    same = engine(batch[:1].expand(5, -1, -1, -1), GAMMAS)
    assert float(torch.pdist(same).min()) > 0.01
    assert torch.equal(engine(batch, GAMMAS), features)


def test_a_larger_batch_is_cut(engine: Engine, model: nn.Module) -> None:
    batch, gammas = images(19), GAMMAS[torch.arange(19) % 5]
    truth = expected(model, batch, gammas)
    torch.testing.assert_close(engine(batch, gammas), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        engine(batch, GAMMAS[1]), expected(model, batch, GAMMAS[1].expand(19, -1)), rtol=1e-4, atol=1e-4
    )


def test_equal_preferences_are_merged(engine: Engine, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ways(engine, monkeypatch)
    before = engine.bytes
    batch = images(3)

    def right(gamma: Tensor, count: int = 3) -> None:
        found = engine(images(count), gamma)
        of_each = gamma if gamma.ndim == 2 else gamma.expand(count, -1)
        torch.testing.assert_close(found, expected(model, images(count), of_each), rtol=1e-4, atol=1e-4)

    right(GAMMAS[1])
    assert seen == ["shared"] and engine.bytes == before
    # the second time in a row, however it is written
    right(GAMMAS[1].expand(3, -1))
    right(GAMMAS[1])
    # others come between, and the kept weights stand
    right(GAMMAS[:3])
    right(GAMMAS[1])
    assert seen == ["shared", "merged", "merged", "rows", "merged"]
    assert before < engine.bytes < 1.5 * before
    # another one, at once because there are many
    right(GAMMAS[3], count=8)
    right(GAMMAS[3], count=1)
    right(GAMMAS[1], count=2)
    assert seen[5:] == ["merged", "merged", "shared"]
    del batch


def test_merged_weights_are_not_kept_unless_wanted(file: Path, model: nn.Module) -> None:
    engine = Engine(file, "cpu", keep_merged=False)
    before = engine.bytes
    for _ in range(3):
        found = engine(images(9), GAMMAS[1])
    torch.testing.assert_close(found, expected(model, images(9), GAMMAS[1].expand(9, -1)), rtol=1e-4, atol=1e-4)
    assert engine.bytes == before


def test_sweep(engine: Engine, model: nn.Module) -> None:
    batch = images(3)
    found = engine.sweep(batch, GAMMAS)
    assert found.shape == (5, 3, 12)
    for features, gamma in zip(found, GAMMAS, strict=True):
        torch.testing.assert_close(features, expected(model, batch, gamma.expand(3, -1)), rtol=1e-4, atol=1e-4)
    many = engine.sweep(images(19), GAMMAS[:2])
    torch.testing.assert_close(many[1], engine(images(19), GAMMAS[1]), rtol=1e-4, atol=1e-4)
    by_name = engine.sweep(batch, [{"ones": 1.0}, {"threes": 1.0}])
    torch.testing.assert_close(by_name, found[[0, 2]], rtol=1e-4, atol=1e-4)
    assert engine.sweep(batch, GAMMAS[0]).shape == (1, 3, 12)
    torch.testing.assert_close(engine.sweep(batch, "one-hot")[[0, 2]], found[[0, 2]], rtol=1e-4, atol=1e-4)
    # and the engine is as it was
    torch.testing.assert_close(engine(batch, GAMMAS[:3]), expected(model, batch, GAMMAS[:3]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected a sum of 1"):
        engine.sweep(batch, [[0.5, 0.5, 0.5]])


def test_sweep_shares_what_the_preference_does_not_change(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(file, "cpu", max_batch=64)
    patches, products = [], []
    conv = engine._model.conv1
    conv.register_forward_hook(lambda module, args, out: patches.append(out.shape[0]))
    shared = pmkernels.preference._shared_product
    monkeypatch.setattr(
        pmkernels.preference, "_shared_product", lambda *a: (products.append(a[0].shape), shared(*a))[1]
    )
    engine.sweep(images(3), GAMMAS)
    # one convolution of three images for five preferences, and the first in-projection's product with W
    assert patches == [3]
    assert products == [torch.Size([3, 5, 32])]
    # more than can be computed at a time: still one convolution an image
    engine.sweep(images(30), GAMMAS)
    assert sum(patches) == 33


def test_the_callers_modes_change_nothing(file: Path, model: nn.Module, graphs: list[FakeGraph]) -> None:
    with torch.inference_mode():
        engine = Engine(file, "cpu", max_batch=8)
    batch = images(5)
    truth = {"rows": expected(model, batch, GAMMAS), "shared": expected(model, batch, GAMMAS[1].expand(5, -1))}

    def right() -> None:
        torch.testing.assert_close(engine(batch, GAMMAS), truth["rows"], rtol=1e-4, atol=1e-4)
        for _ in range(2):
            found = engine(batch, GAMMAS[1])
            assert found.dtype == torch.float32 and not found.is_inference()
            torch.testing.assert_close(found, truth["shared"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine.sweep(batch, GAMMAS[:2])[1], truth["shared"], rtol=1e-4, atol=1e-4)

    with torch.inference_mode():
        right()
    right()
    with torch.autocast("cpu", torch.bfloat16):
        right()
    with torch.device("meta"):
        right()
        engine.warm_up()
    with torch.enable_grad():
        assert not engine(batch.clone().requires_grad_(), GAMMAS).requires_grad


class OutOfReach(Tokens):
    """Looks at its data as torch.vmap cannot, in words without vmap."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.from_numpy(hidden.numpy()).relu()).mean(dim=1)


def test_a_sweep_without_vmap(tmp_path: Path) -> None:
    plain = OutOfReach()
    with torch.no_grad():
        learned = pareto(plain, low_rank="all")
    save_folded(learned, tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=plain)
    x = torch.randn(3, 7, 6)
    for _ in range(2):
        found = engine.sweep(x, GAMMAS)
        for features, gamma in zip(found, GAMMAS, strict=True):
            torch.testing.assert_close(features, expected(learned, x, gamma.expand(3, -1)))


class Pair(Tokens):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_model_that_returns_something_else(tmp_path: Path) -> None:
    save_folded(pareto(Pair(), low_rank="all"), tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=Pair())
    with pytest.raises(TypeError, match=r"model: expected it to return a tensor of features, got tuple"):
        engine(torch.randn(3, 7, 6), GAMMAS[:3])


def test_classify(engine: Engine, model: nn.Module) -> None:
    batch = images(3)
    logits = engine.classify(batch, GAMMAS[:3], "twos")
    assert logits.shape == (3, 6)
    torch.testing.assert_close(logits, engine.heads["twos"](engine(batch, GAMMAS[:3])))
    with pytest.raises(ValueError, match=r"task: expected one with a head, ones, twos; got threes"):
        engine.classify(batch, GAMMAS[:3], "threes")


def test_threads_share_an_engine(engine: Engine, model: nn.Module) -> None:
    truth = {i: expected(model, images(3, seed=i), GAMMAS[[i % 5, (i + 1) % 5, 2]]) for i in range(6)}
    wrong: list[int] = []

    def ask(i: int) -> None:
        for _ in range(5):
            found = engine(images(3, seed=i), GAMMAS[[i % 5, (i + 1) % 5, 2]])
            if not torch.allclose(found, truth[i], rtol=1e-4, atol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in truth]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_card_and_preprocessing(file: Path, model: nn.Module, tmp_path: Path) -> None:
    from PIL import Image

    engine = Engine(file, "cpu")
    assert engine.image_size == 16
    picture = Image.new("L", (40, 20), color=128)
    pixels = engine.preprocess(picture)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    card = engine.card
    assert [task["name"] for task in card["tasks"]] == list(TASKS)
    assert [task["classes"] for task in card["tasks"]] == [5, 6, None]
    assert card["rank"] == 4 and card["bytes"] == engine.bytes and card["preference_per_item"] is True
    import json

    json.dumps(card, allow_nan=False)
    own = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    save_folded(model, tmp_path / "own.safetensors", encoder=ENCODER, preprocessing=own)
    centred = Engine(tmp_path / "own.safetensors", "cpu").preprocess(picture)
    torch.testing.assert_close(centred, torch.full((3, 16, 16), (128 / 255 - 0.5) / 0.25))
    for bad in ({"size": 16}, {**own, "std": [0.0, 1.0, 1.0]}, {**own, "mean": [1.0]}, {**own, "size": 0}):
        save_folded(model, tmp_path / "bad.safetensors", encoder=ENCODER, preprocessing=bad)
        with pytest.raises(UserError, match=r"preprocessing: expected size, mean and std"):
            _ = Engine(tmp_path / "bad.safetensors", "cpu").preprocess
