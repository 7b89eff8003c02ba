"""DARE: drop task-vector entries at random, rescale the rest.

Yu et al., "Language models are Super Mario", ICML 2024: τ̃_k = m_k ⊙ τ_k / (1 − p) with m_k ~ Bernoulli(1 − p); then W
= W0 + λ Σ_k τ̃_k, task arithmetic on what is left. Buffers are averaged, as in :mod:`task_arithmetic`.
"""

import torch
from torch import Tensor, nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, Problem, one_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.preprocessing import check_density, dare_generator, dare_mask


def merge(
    pretrained: nn.Module, finetuned: Copies, *, coefficient: float = 0.3, density: float = 0.5, seed: int = 0
) -> Merged:
    """Return task arithmetic, λ = ``coefficient``, on randomly thinned task vectors; no data.

    ``density``: 1 − p, the share of entries kept, in (0, 1]. ``seed``: of the draws, the same on every device.
    """
    check_density(density)
    draws: list[torch.Generator] = []

    def piece(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
        if place == 0:
            draws[:] = [dare_generator(seed, name, task) for task in range(len(taus))]
        total = torch.zeros_like(base)
        for tau, generator in zip(taus, draws, strict=True):
            total.addcmul_(tau, dare_mask(len(tau), density, generator).to(tau), value=1 / density)
        return base + coefficient * total

    return one_model(merge_tensors(pretrained, finetuned, piece), finetuned)


def _choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [
        {"coefficient": 0.3, "density": 0.5},
        {"coefficient": round(min(0.5, 3 / tasks), 4), "density": 0.5},
        {"coefficient": round(min(0.4, 2 / tasks), 4), "density": 0.8},
        {"coefficient": 0.3, "density": 0.1},
    ]


def _run(problem: Problem, choice: Choice) -> Merged:
    return merge(problem.pretrained, problem.finetuned, seed=problem.method.seed, **choice)


METHOD = Method("dare", "DARE", "weights", _run, _choices)
