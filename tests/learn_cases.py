"""What the tests of learning share: short settings, task sets on 8×8 images, and copies of what is learned."""

from typing import Any

import torch
from helpers import noisy_copy
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize


def short_run(**changes: Any) -> MethodSettings:
    """Four steps of six images at rank 2."""
    return MethodSettings.model_validate(
        {"steps": 4, "batch_size": 6, "rank": 2, "checkpoint_every": 2, "seed": 3, **changes}
    )


def task_set(tasks: int, images: int = 20, dim: int = 8, seed: int = 7) -> dict[str, Task]:
    """Random images and a zero-shot head of five classes for ``t0`` …"""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{k}": Task(
            TensorImages(torch.randn(images, 3, 8, 8, generator=generator)),
            ZeroShotHead(torch.randn(5, dim, generator=generator), 10.0),
        )
        for k in range(tasks)
    }


def learned(model: nn.Module) -> dict[str, Tensor]:
    """A copy of λ, A, G and B by name."""
    return {name: parameter.detach().clone() for name, parameter in learned_parameters(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether they have the same names and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def small_model() -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    """A Pareto model of two linear layers in float64, the plain one and three copies."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
    finetuned = [noisy_copy(plain, seed) for seed in (1, 2, 3)]
    return parametrize(plain, finetuned, rank=2, low_rank="all"), plain, finetuned
