"""The individual models: each task with its own fine-tuned weights. The upper bound, at the price of K models.

As an answer to a preference: the fine-tuned model of the task that γ wants most (the first of several).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pareto_merging.baselines.interface import Merged, task_names
from pareto_merging.baselines.streaming import merge_tensors
from pareto_merging.parametrize import Weights, check_copies


def merge(pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> Merged:
    """Nothing is merged: ``at(γ)`` is a copy of the fine-tuned model of the task with the largest γ_k."""
    copies, _ = check_copies(pretrained, finetuned)
    names = list(copies)

    def at(gamma: Tensor) -> nn.Module:
        name = names[int(gamma.argmax())]
        return merge_tensors(pretrained, {name: copies[name]}, lambda _, place, base, taus: base + taus[0])

    return Merged(task_names(finetuned), at, preference_aware=True)
