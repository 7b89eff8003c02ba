"""Weight averaging: W = (1/K) Σ_k W_k (Wortsman et al., "Model soups", 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pareto_merging.baselines.streaming import merge_tensors
from pareto_merging.parametrize import Weights


def merge(pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> nn.Module:
    """The average of K fine-tuned copies, as a new module like ``pretrained``; needs no data."""
    return merge_tensors(pretrained, finetuned, lambda base, taus: base + sum(taus) / len(taus))
