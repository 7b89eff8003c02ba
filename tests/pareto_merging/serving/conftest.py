"""The folded models, engines and servers of this room's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from support.engines import ENCODER, TASKS, FakeGraph, pareto
from support.servers import Running, make_folded, running
from torch import nn

from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine
from pareto_merging.serving import engine as engine_module
from pareto_merging.serving import graphs as graphs_module


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


@pytest.fixture
def many_items_are_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MERGE_FROM", 8)


@pytest.fixture
def engine(file: Path) -> Engine:
    return Engine(file, "cpu", max_batch=8)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    def capture(function: Callable[[], Any], device: torch.device, pool: Any, probe: bool) -> tuple[FakeGraph, Any]:
        result = function()
        made.append(FakeGraph(function, result))
        made[-1].probe = probe
        return made[-1], result

    monkeypatch.setattr(engine_module, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs_module, "capture", capture)
    monkeypatch.setattr(graphs_module, "warm_up", lambda function, device: function())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folded(tmp_path_factory.mktemp("http") / "folded.safetensors")


@pytest.fixture(scope="module")
def shared(folded: Path) -> Iterator[Running]:
    with running(folded) as server:
        yield server
