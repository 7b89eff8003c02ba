"""Expert-guided Pareto Merging: the fine-tuned models' own predictions teach the merged model of every preference.

Ours, beside the published method and in its structure W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·(G ×₃ γ)·Bᵀ. Four things
differ, and each can be had alone (:class:`MethodSettings`): the objective is the divergence from the task's fine-tuned
model (:mod:`.distillation`); every image of a step has a preference of its own (:mod:`.per_item`); a constant low-rank
term joins the base; learning starts from the sequential closed form (:mod:`.sequential`). docs/study.md says what each
of them gives, and where it loses.
"""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from pareto_merging.data.tasks import NoHead, Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, Problem, Run, learning


def settings(**changes: Any) -> MethodSettings:
    """Return the preset ``expert``, with ``changes``."""
    return MethodSettings.model_validate({"preset": "expert", **changes})


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    method: MethodSettings | None = None,
    **run: Unpack[Run],
) -> Merged:
    """Learn a model for every preference from the fine-tuned models; arguments as :func:`pareto.merge`.

    ``method``: by default the preset ``expert``. ``facts`` says what the start found, and which state was kept where
    images were held back.
    """
    return pareto.merge(pretrained, finetuned, tasks=tasks, method=method or settings(), **run)


def settings_of(problem: Problem, choice: Choice) -> MethodSettings:
    """Return the preset's settings for a problem, with a choice. The problem's own where they are of this preset."""
    return MethodSettings.model_validate({**pareto.of_preset(problem.method, "expert"), **choice})


def choices(tasks: int, method: MethodSettings) -> list[Choice]:
    """Return the preset first. Then faster rates, and preferences nearer to the middle."""
    return [{}, {"learning_rate": 3e-3, "lambda_learning_rate": 3e-2}, {"concentration": 1.0}]


def closed_form_settings(problem: Problem, choice: Choice) -> MethodSettings:
    """Return the settings that stop at the start. No head is looked at where a task has none."""
    headless = any(isinstance(task.head, NoHead) for task in (problem.tasks or {}).values())
    objective = {"objective": "features"} if headless else {}
    return settings_of(problem, {**objective, **choice, "start": "sequential", "steps": 0, "constant_rank": 0})


METHOD = Method(
    "pareto-expert",
    "Pareto Merging, expert-guided",
    "images",
    learning(merge, settings_of),
    choices,
    "1 model + low rank",
    learns=True,
)
VARIANTS = (
    Method(
        "pareto-closed-form",
        "Pareto Merging, expert-guided, closed form",
        "images",
        learning(merge, closed_form_settings),
        lambda tasks, method: [{}, {"ridge": 1e-2}, {"ridge": 1e-1}],
        "1 model + low rank",
    ),
    METHOD,
)
