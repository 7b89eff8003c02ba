"""The pretrained model as it is: what zero-shot use gets."""

from torch import nn

from pareto_merging.methods.interface import Copies, Merged, Method, on_weights, one_model
from pareto_merging.model.stored import copy_of


def merge(pretrained: nn.Module, finetuned: Copies) -> Merged:
    """Return a copy of ``pretrained``; of ``finetuned`` only the task names are used."""
    return one_model(copy_of(pretrained), finetuned)


METHOD = Method("pretrained", "Pretrained", "weights", on_weights(merge))
