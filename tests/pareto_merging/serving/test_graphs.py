"""The engine with CUDA graphs that a stand-in plays: sizes, padding, memory, and models without graphs."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import GAMMAS, FakeGraph, Tokens, expected, images, pareto
from torch import nn

from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine
from pareto_merging.serving import graphs as graphs_module

pytestmark = pytest.mark.usefixtures("many_items_are_eight")


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

    monkeypatch.setattr(graphs_module, "capture", refuse)
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


def test_a_wrong_input_does_not_end_the_graphs(tmp_path: Path, graphs: list[FakeGraph]) -> None:
    plain = Tokens()
    learned = pareto(plain, low_rank="all")
    save_folded(learned, tmp_path / "folded.safetensors")
    engine = Engine(tmp_path / "folded.safetensors", "cpu", plain=plain, max_batch=4)
    with pytest.raises(ValueError, match=r"x: expected shape \[\*, 6\], got \[4, 7, 5\]"):
        engine(torch.randn(3, 7, 5), GAMMAS[:3])
    assert engine.cuda_graphs and not engine._graphs._images
    # graphs of a few shapes only, the others without
    for tokens in range(1, graphs_module.MAX_SHAPES + 4):
        x = torch.randn(3, tokens, 6)
        torch.testing.assert_close(engine(x, GAMMAS[:3]), expected(learned, x, GAMMAS[:3]))
    assert len(engine._graphs._images) == len(graphs) == graphs_module.MAX_SHAPES
