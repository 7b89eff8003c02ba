"""Weight averaging: W = (1/K) Σ_k W_k (Wortsman et al., "Model soups", ICML 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pareto_merging.methods.interface import Merged, one_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import Weights


def merge(pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> Merged:
    """The average of K fine-tuned copies; needs no data and has nothing to choose."""
    model = merge_tensors(pretrained, finetuned, lambda name, place, base, taus: base + taus.mean(dim=0))
    return one_model(model, finetuned)
