"""AdaMerging: λ learned by minimising the entropy of the predictions on unlabelled images (Yang et al., ICLR 2024).

Layer-wise AdaMerging is Pareto Merging without a low-rank term, at the equal preference, with linear scalarisation:
min_λ Σ_k S_k(W0 + Σ_k λ_k τ_k), equation 1 of arXiv 2408.12105. It runs on the same code, so the two differ in nothing
but what the methods differ in. We differ from the published code in the constant 1/K of the loss, which Adam does not
feel, and do not clamp λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pareto_merging.config import MethodSettings
from pareto_merging.parametrize import Weights, parametrize
from pareto_merging.parametrize import merge as merge_at
from pareto_merging.preferences import equal_preference
from pareto_merging.training import MergingTask, learn_pareto_set


def settings(base: MethodSettings) -> MethodSettings:
    """``base`` (steps, batch size, learning rate, seed …) with everything that makes it AdaMerging."""
    return base.model_copy(
        update={
            "scalarization": "linear",
            "preference": "equal",
            "preferences_per_step": 1,
            "low_rank": "none",
            "cosine": 0.0,
            "tensor_norm": 0.0,
            "learn_lambda": True,
        }
    )


def merge(
    pretrained: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights],
    *,
    tasks: Mapping[str, MergingTask],
    method: MethodSettings,
    progress: bool = True,
) -> nn.Module:
    """The merged model, as a new module like ``pretrained``.

    Args:
        tasks: by task name, unlabelled images and the frozen head. method: steps, batch size, learning rate, seed,
            init_lambda and granularity count; the rest is as :func:`settings` says.
    """
    method = settings(method)
    model = parametrize(
        pretrained,
        finetuned,
        low_rank="none",
        init_lambda=method.init_lambda,
        granularity=method.granularity,
        buffers=method.buffers,
        digests=False,
    )
    learn_pareto_set(model, tasks, method, progress=progress)
    with torch.no_grad():
        return merge_at(model, equal_preference(len(tasks)))
