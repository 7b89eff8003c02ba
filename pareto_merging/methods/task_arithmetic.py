"""Task arithmetic: W = W0 + λ Σ_k τ_k (Ilharco et al., "Editing models with task arithmetic", ICLR 2023).

Of parameters; buffers, to which the published code does the same, are averaged (:func:`merge_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pareto_merging.methods.interface import Merged, one_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import Weights


def merge(
    pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights], *, coefficient: float = 0.3
) -> Merged:
    """W0 plus ``coefficient`` (λ, one number for all tasks and tensors) times the sum of the task vectors; no data."""
    model = merge_tensors(pretrained, finetuned, lambda name, place, base, taus: base + coefficient * taus.sum(dim=0))
    return one_model(model, finetuned)
