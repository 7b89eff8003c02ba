"""The serving engine on a CUDA GPU: graphs of a few sizes, new preferences without waiting, memory, streams."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

import pareto_merging
from pareto_merging.model.files import save_folded
from pareto_merging.serving import Engine

pytestmark = pytest.mark.gpu
TASKS = 4


class Encoder(nn.Module):
    """A transformer of nn.MultiheadAttention, as open_clip's, for where open_clip is not installed."""

    def __init__(self, width: int = 256, layers: int = 4, tokens: int = 50) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": nn.MultiheadAttention(width, 4, batch_first=True),
                    "ln_2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x) + self.position
        for block in self.blocks:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, need_weights=False)[0]
            x = x + block["down"](torch.nn.functional.gelu(block["up"](block["ln_2"](x))))
        return self.head(x.mean(dim=1))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def model(plain: nn.Module) -> nn.Module:
    finetuned = {f"t{k}": noisy_copy(plain, k, scale=0.01) for k in range(TASKS)}
    return randomize(pareto_merging.parametrize(plain, finetuned, rank=16), scale=0.1)


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "folded.safetensors"
    save_folded(model, path)
    return path


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 50, 48, generator=generator)
    return x, torch.softmax(2 * torch.randn(count, TASKS, generator=generator), dim=-1)


def right(model: nn.Module, features: Tensor, x: Tensor, gammas: Tensor, dtype: torch.dtype) -> None:
    """Each item against the plain model of its own preference, in units of that model's own error in ``dtype``."""
    plain = [pareto_merging.merge(model, gamma).eval() for gamma in gammas]
    with torch.no_grad():
        truth = torch.cat([m.double()(item[None].double()) for m, item in zip(plain, x, strict=True)])
        low = torch.cat([m.to(dtype)(item[None].to(dtype)) for m, item in zip(plain, x, strict=True)])
    allowed = float((low.double() - truth).norm())
    error = float((features.cpu().double() - truth).norm())
    assert error <= 2 * allowed + 1e-4 * float(truth.norm()), f"error {error:.3g}, plain {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_batches_of_any_size(file: Path, plain: nn.Module, model: nn.Module, dtype: torch.dtype, graphs: bool) -> None:
    engine = Engine(file, "cuda", dtype, plain=copy.deepcopy(plain), max_batch=16, cuda_graphs=graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, count in enumerate((1, 3, 16, 5, 2, 40)):
            x, gammas = batch(count, seed)
            right(model, engine(x, gammas), x, gammas, dtype)
            right(model, engine(x.cuda(), gammas.cuda()), x, gammas, dtype)
            shared = gammas[:1].expand(count, -1)
            for _ in range(2):
                right(model, engine(x, shared), x, shared, dtype)
    assert engine.cuda_graphs is graphs


def test_a_new_preference_costs_no_capture_and_no_wait(file: Path, plain: nn.Module) -> None:
    engine = Engine(file, "cuda", torch.bfloat16, plain=copy.deepcopy(plain), max_batch=8)
    engine.warm_up(item_shape=(50, 48))
    assert engine._graphs is not None
    captured = dict(engine._graphs._graphs)
    x = batch(8)[0].cuda().bfloat16()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(5):
            engine(x[: 8 - seed], batch(8 - seed, seed)[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine._graphs._graphs == captured
    assert torch.cuda.memory_reserved() == reserved


def test_it_holds_one_model(tmp_path: Path) -> None:
    plain = Encoder(width=1024, layers=2).bfloat16()
    learned = randomize(
        pareto_merging.parametrize(plain, [copy.deepcopy(plain), copy.deepcopy(plain)], rank=16, digests=False)
    )
    save_folded(learned, tmp_path / "folded.safetensors")
    before = torch.cuda.memory_allocated()
    engine = Engine(tmp_path / "folded.safetensors", "cuda", plain=copy.deepcopy(plain))
    held = torch.cuda.memory_allocated() - before
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert held <= 1.012 * size
    assert engine.bytes <= 1.01 * size


def test_sweep(file: Path, plain: nn.Module, model: nn.Module) -> None:
    engine = Engine(file, "cuda", torch.float32, plain=copy.deepcopy(plain), max_batch=16)
    x, _ = batch(3)
    gammas = batch(7, 5)[1]
    found = engine.sweep(x, gammas)
    for features, gamma in zip(found, gammas, strict=True):
        right(model, features, x, gamma.expand(3, -1), torch.float32)


def test_calls_on_several_streams(file: Path, plain: nn.Module, model: nn.Module) -> None:
    engine = Engine(file, "cuda", torch.float32, plain=copy.deepcopy(plain), max_batch=8)
    engine.warm_up(item_shape=(50, 48))
    asked = [batch(8, seed) for seed in range(6)]
    streams = [torch.cuda.Stream() for _ in asked]
    found = []
    for stream, (x, gammas) in zip(streams, asked, strict=True):
        with torch.cuda.stream(stream):
            found.append(engine(x, gammas))
    torch.cuda.synchronize()
    for features, (x, gammas) in zip(found, asked, strict=True):
        right(model, features, x, gammas, torch.float32)
