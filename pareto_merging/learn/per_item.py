"""A preference for every image of a step.

Under linear scalarisation E_γ Σ_k γ_k S_k(γ), γ ~ Dirichlet(p·1), is (1/K)·Σ_k E S_k(γ) with γ ~ Dirichlet(p·1 + e_k):
so each image of task k draws its own γ, and the loss is the plain mean over images. With one γ for a whole step a model
of K tasks sees few preferences, and the images of tasks with γ_k ≈ 0 teach nothing. Nothing crosses tasks: the backward
of each is independent of the others.

Modules that read a merged tensor as a whole cannot follow. Then the images of every task are cut into parts with one γ
each: the same expectation, and a forward and backward for each part.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pareto_merging.learn.gradient import low_rank_square
from pareto_merging.learn.settings import SamplingSettings
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import sample_for_task

# preferences per task and step where a model takes one at a time
LEAST_PARTS = 4
# a model that mixes items up is off by far more, and one that does not by rounding
_TOLERANCE = 0.05


def item_preferences(sampling: SamplingSettings, tasks: int, step: int, *, in_parts: bool) -> Tensor:
    """Draw the preferences of one step. [K, n, K] for n images of each of K tasks, or n parts of them."""
    count = sampling.batch_size
    if in_parts:
        count = min(count, max(LEAST_PARTS, sampling.preferences_per_step))
    rng = np.random.default_rng([sampling.seed, 2, step])
    return torch.stack([sample_for_task(sampling.concentration, tasks, task, count, rng) for task in range(tasks)])


@contextlib.contextmanager
def _large_terms(model: nn.Module) -> Iterator[None]:
    """Give each preference-dependent term half its weight's norm inside. Where G is 0, no preference is seen."""
    generator, kept = torch.Generator().manual_seed(0), []
    try:
        for parameter in merged_parameters(model):
            A, G, B = parameter.A, parameter.G, parameter.B
            if A is None or G is None or B is None:
                continue
            kept.append((G, G.clone()))
            G.copy_(torch.randn(G.shape, generator=generator))
            norms = low_rank_square(A, G.permute(2, 0, 1), B).sqrt()
            half = 0.5 * parameter.weight.to(G).norm()
            G.mul_(torch.where(norms > 0, half / norms, 0.0))
        yield
    finally:
        for G, value in kept:
            G.copy_(value)


@torch.no_grad()
def why_not_per_item(model: nn.Module, images: Tensor) -> str | None:
    """Say why a Pareto model takes no preference per item, or None if it does.

    Two items at two preferences are compared with each at its own. ``images``: at least one, [n, …], on the device.
    """
    now, pair = pareto_state(model).now, torch.cat([images, images])[:2]
    tasks = len(pareto_state(model).task_names)
    gammas = torch.eye(tasks, device=now.gamma.device)[[0, -1]] if tasks > 1 else now.gamma.new_ones(2, 1)
    apart = []
    with _large_terms(model):
        with now.changed(gamma=gammas, cache=None):
            try:
                together = model(pair)
            except ValueError as error:
                return str(error).removeprefix("preference: ")
        for gamma, image in zip(gammas, pair, strict=True):
            with now.changed(gamma=gamma, cache=None):
                apart.append(model(image[None]))
    expected = torch.cat(apart)
    if together.shape != expected.shape:
        return f"expected features {list(expected.shape)} of two items, got {list(together.shape)}"
    apart_by = float((together - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
    return None if apart_by <= _TOLERANCE else f"items at preferences of their own differ by {apart_by:.1%}"
