"""Pareto Merging: the Pareto set of merged models, learned in one run without labels.

Chen & Kwok, ICML 2025: W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ (equation 6), trained on the smooth Tchebycheff
scalarisation of the tasks' entropies at sampled γ (equation 10); settings that the paper leaves open say so in
:class:`MethodSettings`.

Pareto Merging++ has the task vectors trimmed and their signs elected by TIES first (``preprocess="ties"``; any function
can be plugged in). With ``objective="weight-distance"`` it is data-free: see :mod:`data_free`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Choice, Choices, Copies, Merged, Method, Problem, Run, learning, task_names
from pareto_merging.methods.start import learn_from_start
from pareto_merging.model.fold import merge as merge_at
from pareto_merging.model.learned import get_lambda, lambda_names
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.preprocessing import Preprocess
from pareto_merging.model.state import pareto_state


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task] | None,
    method: MethodSettings | None = None,
    preprocess: Preprocess | None = None,
    digests: bool = True,
    **run: Unpack[Run],
) -> Merged:
    """Learn a model for every preference in one run; ``result.pareto`` is the Pareto model.

    Args:
        tasks: by task name, unlabelled images and the frozen head; None for the data-free objective.
        method: by default the preset ``icml2025``. preprocess: of the task vectors, instead of ``method.preprocess``.
        digests: of the weights, see :func:`parametrize`.
        run: ``folder`` and ``resume``, where a checkpoint is kept and gone on from: see :func:`learn_pareto_set`.
    """
    method = MethodSettings.model_validate({}) if method is None else method
    if isinstance(preprocess, str):
        method, preprocess = method.model_copy(update={"preprocess": preprocess}), None
    arguments = method.model_arguments() | ({} if preprocess is None else {"preprocess": preprocess})
    model = parametrize(pretrained, finetuned, **arguments, digests=digests)
    result = learn_from_start(model, pretrained, finetuned, tasks, method, **run)
    facts: dict[str, Any] = {}
    if start := pareto_state(model).start_facts:
        facts["start"] = start
    if result.chosen:
        facts["chosen"] = result.chosen
    facts["lambda"] = dict(zip(lambda_names(model), get_lambda(model).tolist(), strict=True))
    return Merged(task_names(finetuned), partial(merge_at, model), method.low_rank != "none", facts, pareto=model)


def settings_of(problem: Problem, choice: Choice, **fixed: Any) -> MethodSettings:
    """Return the problem's settings with a choice, as Pareto Merging's. Whatever the configuration's own run is."""
    same: dict[str, Any] = {
        "objective": "entropy",
        "preprocess": "none",
        "core": "tensor",
        "preference": "dirichlet",
        "gamma": None,
    }
    same |= {"start": "pretrained", "constant_rank": 0, "few_images": "as-given", "held_back": 0.0}
    return MethodSettings.model_validate({**of_preset(problem.method, "icml2025"), **same, **choice, **fixed})


# of settings of another preset what any method can be told
SHARED = (
    *("seed", "steps", "batch_size", "rank", "low_rank", "init_lambda", "granularity", "buffers", "density"),
    *("collapse_threshold", "checkpoint_every"),
)


def of_preset(method: MethodSettings, preset: str) -> dict[str, Any]:
    """Return settings of the kind of ``preset`` as they are, of others what is shared. Kinds: published, and ours."""
    if (method.preset == "expert") == (preset == "expert"):
        return method.model_dump()
    return {"preset": preset} | {name: getattr(method, name) for name in SHARED if name in method.model_fields_set}


def choices(tasks: int, method: MethodSettings) -> list[Choice]:
    """Return the configuration's own settings first; then weaker regularisation and other rates."""
    rate = method.learning_rate
    return [
        {},
        {"concentration": 1.0, "tensor_norm": 0.01, "learning_rate": 3 * rate},
        {"learning_rate": 3 * rate, "lambda_learning_rate": 3 * (method.lambda_learning_rate or rate)},
        {"concentration": 1.0, "tensor_norm": 0.01},
    ]


def with_density(choices: Choices) -> Choices:
    """Return ``choices`` with TIES's published density first, and 0.5 for the others."""
    return lambda tasks, method: [
        {**choice, **({"density": 0.5} if number else {})} for number, choice in enumerate(choices(tasks, method))
    ]


METHOD = Method(
    "pareto", "Pareto Merging", "images", learning(merge, settings_of), choices, "1 model + low rank", learns=True
)
_PLUS = learning(merge, partial(settings_of, preprocess="ties"))
VARIANTS = (
    METHOD,
    replace(METHOD, key="pareto++", title="Pareto Merging++", run=_PLUS, choices=with_density(choices)),
)
