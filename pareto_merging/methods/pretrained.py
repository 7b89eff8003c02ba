"""The pretrained model as it is: what zero-shot use gets, and where every task vector starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pareto_merging.methods.interface import Merged, one_model
from pareto_merging.model.copies import Weights
from pareto_merging.model.stored import copy_of


def merge(pretrained: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> Merged:
    """A copy of ``pretrained``; of ``finetuned`` only the task names are used."""
    return one_model(copy_of(pretrained), finetuned)
