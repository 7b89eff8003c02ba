"""Pareto Merging: the Pareto set of merged models, learned in one run without labels (Chen & Kwok, ICML 2025).

W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ (equation 6), trained on the smooth Tchebycheff scalarisation of the tasks'
entropies at sampled γ (equation 10); settings that the paper leaves open say so in :class:`MethodSettings`.

Pareto Merging++ has the task vectors trimmed and their signs elected by TIES first (``preprocess="ties"``; any function
can be plugged in). With ``objective="weight-distance"`` it is data-free: see :mod:`data_free`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Merged, task_names
from pareto_merging.model.copies import Weights
from pareto_merging.model.fold import merge as merge_at
from pareto_merging.model.learned import get_lambda, lambda_names
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.preprocessing import Preprocess


def merge(
    pretrained: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights],
    *,
    tasks: Mapping[str, Task] | None,
    method: MethodSettings | None = None,
    preprocess: Preprocess | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Merged:
    """A model for every preference, all from one run; ``result.pareto`` is the Pareto model.

    Args:
        tasks: by task name, unlabelled images and the frozen head; None for the data-free objective.
        method: by default the preset ``icml2025``. preprocess: of the task vectors, instead of ``method.preprocess``.
        folder, resume: where a checkpoint is kept and gone on from: see :func:`learn_pareto_set`.
    """
    method = MethodSettings.model_validate({}) if method is None else method
    arguments = method.model_arguments() | ({} if preprocess is None else {"preprocess": preprocess})
    model = parametrize(pretrained, finetuned, **arguments)
    learn_pareto_set(model, tasks, method, folder=folder, resume=resume, progress=progress)

    def at(gamma: Tensor) -> nn.Module:
        return merge_at(model, gamma)

    facts = {"lambda": dict(zip(lambda_names(model), get_lambda(model).tolist(), strict=True))}
    return Merged(task_names(finetuned), at, preference_aware=method.low_rank != "none", facts=facts, pareto=model)
