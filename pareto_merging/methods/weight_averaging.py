"""Weight averaging: W = (1/K) Σ_k W_k (Wortsman et al., "Model soups", ICML 2022)."""

from torch import nn

from pareto_merging.methods.interface import Copies, Merged, Method, on_weights, one_model
from pareto_merging.methods.streaming import merge_tensors


def merge(pretrained: nn.Module, finetuned: Copies) -> Merged:
    """Average K fine-tuned copies; no data, nothing to choose."""
    model = merge_tensors(pretrained, finetuned, lambda name, place, base, taus: base + taus.mean(dim=0))
    return one_model(model, finetuned)


METHOD = Method("weight-averaging", "Weight averaging", "weights", on_weights(merge))
