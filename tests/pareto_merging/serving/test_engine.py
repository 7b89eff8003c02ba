"""The engine against plain merged models: every way to compute, padding, streams of preferences, sweeps, files."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import noisy_copy, randomize
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

import pareto_merging
import pmkernels
from pareto_merging.errors import UserError
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine
from pareto_merging.serving import engine as engine_module
from pareto_merging.serving.layers import ServedAttention, ServedLinear

TASKS = ("ones", "twos", "threes")
ENCODER = {
    "arguments": {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 12,
    }
}
GAMMAS = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]])


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def pareto(plain: nn.Module, **options: Any) -> nn.Module:
    finetuned = {name: noisy_copy(plain, seed) for seed, name in enumerate(TASKS)}
    return randomize(pareto_merging.parametrize(plain, finetuned, **{"rank": 4, **options}), scale=0.3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return pareto(VisionTransformer(**ENCODER["arguments"]).eval())


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "folded.safetensors"
    heads = {name: (torch.randn(5 + i, 12), 20.0) for i, name in enumerate(TASKS[:2])}
    save_folded(model, path, heads=heads, encoder=ENCODER)
    return path


@pytest.fixture(autouse=True)
def many_items_are_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MERGE_FROM", 8)


@pytest.fixture
def engine(file: Path) -> Engine:
    return Engine(file, "cpu", max_batch=8)


def expected(model: nn.Module, batch: Tensor, gammas: Tensor) -> Tensor:
    """Each image by the plain model merged at its own preference."""
    with torch.no_grad():
        return torch.cat(
            [pareto_merging.merge(model, gamma).eval()(image[None]) for image, gamma in zip(batch, gammas, strict=True)]
        )


def ways(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes how each batch is computed from here on."""
    seen: list[str] = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda mode, *rest: (seen.append(mode), forward(mode, *rest))[1])
    return seen


class FakeGraph:
    """Runs the captured function again, into the memory it returned: what a CUDA graph does."""

    def __init__(self, function: Callable[[], Tensor | None], result: Tensor | None) -> None:
        self.function, self.result, self.replays, self.probe = function, result, 0, False

    def replay(self) -> None:
        self.replays += 1
        found = self.function()
        if self.result is not None and found is not None:
            self.result.copy_(found)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    def capture(function: Callable[[], Any], device: torch.device, pool: Any, probe: bool) -> tuple[FakeGraph, Any]:
        result = function()
        made.append(FakeGraph(function, result))
        made[-1].probe = probe
        return made[-1], result

    monkeypatch.setattr(engine_module, "_can_capture", lambda device: True)
    monkeypatch.setattr(engine_module, "capture", capture)
    monkeypatch.setattr(engine_module, "warm_up", lambda function, device: function())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


def test_a_preference_per_item(engine: Engine, model: nn.Module) -> None:
    batch = images(5)
    features = engine(batch, GAMMAS)
    assert features.shape == (5, 12) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected(model, batch, GAMMAS), rtol=1e-4, atol=1e-4)
    # the images differ by their preferences too, or the test proves nothing
    same = engine(batch[:1].expand(5, -1, -1, -1), GAMMAS)
    assert float(torch.pdist(same).min()) > 0.01
    assert torch.equal(engine(batch, GAMMAS), features)


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


def test_graphs_of_a_few_sizes(file: Path, model: nn.Module, graphs: list[FakeGraph]) -> None:
    engine = Engine(file, "cpu", max_batch=6)
    assert engine.buckets == [1, 2, 4, 6]
    rows = torch.arange(40) % 5
    for start, count in ((0, 3), (3, 4), (7, 1), (8, 2), (10, 6), (16, 5), (21, 13), (34, 3)):
        chosen = GAMMAS[rows[start : start + count]]
        batch = images(count, seed=start)
        found = engine(batch, chosen)
        torch.testing.assert_close(found, expected(model, batch, chosen), rtol=1e-4, atol=1e-4)
    # one for each size, whatever the preferences; and one image, whose preference is shared
    assert len(graphs) == 5
    assert sum(graph.replays for graph in graphs) == 10


def test_what_a_graph_returned_is_the_callers_own(file: Path, graphs: list[FakeGraph]) -> None:
    engine = Engine(file, "cpu", max_batch=4)
    first = engine(images(3), GAMMAS[:3])
    kept = first.clone()
    engine(images(4, seed=1), GAMMAS[1:])
    assert torch.equal(first, kept)


def test_padding_is_never_seen(file: Path, model: nn.Module, graphs: list[FakeGraph]) -> None:
    engine = Engine(file, "cpu", max_batch=4)
    spoilt = images(4)
    spoilt[1:] = torch.nan
    assert not torch.isfinite(engine(spoilt, GAMMAS[:4])[1:]).any()
    # the NaN images are now padding
    found = engine(images(1, seed=5), GAMMAS[2:3])
    three = engine(images(3, seed=6), GAMMAS[:3])
    assert found.shape == (1, 12) and three.shape == (3, 12)
    torch.testing.assert_close(found, expected(model, images(1, seed=5), GAMMAS[2:3]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(three, expected(model, images(3, seed=6), GAMMAS[:3]), rtol=1e-4, atol=1e-4)


def test_a_new_preference_captures_and_merges_in_place(
    file: Path, model: nn.Module, graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(file, "cpu", max_batch=8)
    batch = images(8)
    for gamma in (GAMMAS[1], GAMMAS[0], GAMMAS[3]):
        found = engine(batch, gamma)
        torch.testing.assert_close(found, expected(model, batch, gamma.expand(8, -1)), rtol=1e-4, atol=1e-4)
    # one graph merges, one computes
    assert len(graphs) == 2
    memory = [part.merged.data_ptr() for part in engine._served if part.merged is not None]
    engine(batch, GAMMAS[4])
    assert [part.merged.data_ptr() for part in engine._served if part.merged is not None] == memory
    torch.testing.assert_close(
        engine(batch, GAMMAS[:1].expand(8, -1)), expected(model, batch, GAMMAS[:1].expand(8, -1)), rtol=1e-4, atol=1e-4
    )
    assert len(graphs) == 2


def test_a_model_that_cannot_be_captured_runs_all_the_same(
    file: Path, model: nn.Module, graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr(engine_module, "capture", refuse)
    engine = Engine(file, "cpu", max_batch=4)
    with pytest.warns(UserWarning, match=r"engine: computed without CUDA graphs, because it waits for the GPU"):
        found = engine(images(3), GAMMAS[:3])
    torch.testing.assert_close(found, expected(model, images(3), GAMMAS[:3]), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            shared = engine(images(3), GAMMAS[1])
    torch.testing.assert_close(shared, expected(model, images(3), GAMMAS[1].expand(3, -1)), rtol=1e-4, atol=1e-4)


def test_warming_up_captures_every_size(file: Path, model: nn.Module, graphs: list[FakeGraph]) -> None:
    engine = Engine(file, "cpu", max_batch=5)
    engine.warm_up()
    # four sizes with a preference for each item, with a shared one, with merged weights, and the graph that merges them
    assert engine.buckets == [1, 2, 4, 5] and len(graphs) == 13
    # the first of each kind is looked at before it is captured
    once = [True, False, False, False]
    assert [graph.probe for graph in graphs] == [*once, *once, True, *once]
    for size in engine.buckets:
        gammas = GAMMAS[torch.arange(size) % 5]
        torch.testing.assert_close(
            engine(images(size), gammas), expected(model, images(size), gammas), rtol=1e-4, atol=1e-4
        )
        for _ in range(2):
            engine(images(size), GAMMAS[3])
    assert len(graphs) == 13
    before = len(graphs)
    alone = Engine(file, "cpu", max_batch=5)
    held = alone.bytes
    alone.warm_up(shared=False)
    assert len(graphs) - before == 8 and alone.bytes == held


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


class Tokens(nn.Module):
    """Any number of tokens of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).mean(dim=1)


def test_a_wrong_input_does_not_end_the_graphs(tmp_path: Path, graphs: list[FakeGraph]) -> None:
    plain = Tokens()
    learned = pareto(plain, low_rank="all")
    save_folded(learned, tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=plain, max_batch=4)
    with pytest.raises(ValueError, match=r"x: expected shape \[\*, 6\], got \[4, 7, 5\]"):
        engine(torch.randn(3, 7, 5), GAMMAS[:3])
    assert engine.cuda_graphs and not engine._static_images
    # graphs of a few shapes only, the others without
    for tokens in range(1, engine_module.MAX_SHAPES + 4):
        x = torch.randn(3, tokens, 6)
        torch.testing.assert_close(engine(x, GAMMAS[:3]), expected(learned, x, GAMMAS[:3]))
    assert len(engine._static_images) == len(graphs) == engine_module.MAX_SHAPES


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
