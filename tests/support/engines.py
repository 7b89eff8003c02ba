"""A small folded model, what its engine must compute, and a stand-in for a CUDA graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from torch import Tensor, nn

import pareto_merging
from pareto_merging.serving import Engine

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


class Tokens(nn.Module):
    """Any number of tokens of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).mean(dim=1)
