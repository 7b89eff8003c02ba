"""AdaMerging: λ learned on unlabelled images (Yang et al., ICLR 2024).

min_λ Σ_k S_k(W0 + Σ_k λ_k τ_k), equation 1 of arXiv 2408.12105: one λ vector per parameter tensor ("layer-wise"), or
one for the model ("task-wise"). AdaMerging++ has the task vectors trimmed and their signs elected by TIES first.
"AdaMerging, expert-guided" is ours: the same λ, by the divergence from the fine-tuned models instead of the entropy.

It is Pareto Merging without a low-rank term, at one preference, with linear scalarisation, and runs on that code, so
the two differ in nothing but what the methods differ in. Where we differ from the published code: the loss is the mean
over the tasks and batches, not their sum, a constant that Adam does not feel; a step's two batches of 16 are one of 32
(the mean of two means); images come from seeded permutations and not from a new shuffle each step; buffers are not
merged.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, Unpack

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, Problem, Run, learning, learning_rates

Preset: TypeAlias = Literal["official", "fusionbench"]

PRESETS: dict[str, dict[str, Any]] = {
    # github.com/EnnengYang/AdaMerging: λ from 0.3, clamped in the forward pass, two batches of 16 per task and step
    "official": {"steps": 500, "batch_size": 32, "learning_rate": 1e-3, "clamp_lambda": True},
    # FusionBench's CLIP AdaMerging: one batch of 16, no clamp
    "fusionbench": {"steps": 1000, "batch_size": 16, "learning_rate": 1e-3, "clamp_lambda": False},
}
# what makes the method AdaMerging; the preference is equal, unless it is AdaMerging + preference
FIXED: dict[str, Any] = {
    "scalarization": "linear",
    "preferences_per_step": 1,
    "learn_lambda": True,
    "low_rank": "none",
    "core": "tensor",
    "cosine": 0.0,
    "tensor_norm": 0.0,
    "information_maximisation": 0.0,
    "constant_rank": 0,
    "start": "pretrained",
}


def _objective(name: str) -> str:
    """Return the objective: AdaMerging's entropy, unless it is one with teachers ("expert-guided", which is ours)."""
    kind = OBJECTIVES.get(name)
    return name if kind is not None and kind.has_teachers else "entropy"


def settings(
    preset: Preset = "official", *, task_wise: bool = False, plus: bool = False, **changes: Any
) -> MethodSettings:
    """Return the settings of ``preset``, with ``changes`` (steps, seed, learning_rate …).

    ``task_wise``: one λ for each task's whole model instead of one per tensor. ``plus``: AdaMerging++.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected {' or '.join(PRESETS)}, got {preset!r}")
    kind = {"granularity": "model" if task_wise else "tensor", "preprocess": "ties" if plus else "none"}
    objective = _objective(changes.get("objective", "entropy"))
    given = {"preference": "equal", **kind, **PRESETS[preset], **changes, **FIXED, "objective": objective}
    return MethodSettings.model_validate(given)


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    method: MethodSettings | None = None,
    **run: Unpack[Run],
) -> Merged:
    """Return the model with the learned λ.

    Args:
        tasks: by task name, unlabelled images and the frozen head.
        method: of :func:`settings`, by default the preset ``official``. Any other settings are made AdaMerging's: what
            :data:`FIXED` names is as it says, and a sampled preference becomes the equal one.
        run: ``folder`` and ``resume``, where a checkpoint is kept and gone on from: see :func:`learn_pareto_set`.
    """
    method = settings() if method is None else method
    changes: dict[str, Any] = {**FIXED, "objective": _objective(method.objective)}
    if method.preference != "fixed":
        changes["preference"] = "equal"
    method = method.model_copy(update=changes)
    # digests are for a checkpoint: there is no Pareto set file
    digests = run.get("folder") is not None
    learned = pareto.merge(pretrained, finetuned, tasks=tasks, method=method, digests=digests, **run)
    # without a low-rank term the preference changes nothing
    merged = learned.model()
    return Merged(learned.task_names, lambda gamma: merged, facts=learned.facts)


def settings_of(problem: Problem, choice: Choice, preset: Preset = "official", **kind: Any) -> MethodSettings:
    """Return AdaMerging's settings for a problem. Its preset, and what the problem's own say of any method."""
    names = ("seed", "init_lambda", "buffers", "density", "checkpoint_every", "collapse_threshold", "steps")
    shared = {name: getattr(problem.method, name) for name in names}
    if shared["steps"] is None:
        del shared["steps"]
    return settings(preset, **kind, **{**shared, **choice})


def _variant(key: str, title: str, **kind: Any) -> Method:
    choices = pareto.with_density(learning_rates(1e-3)) if kind.get("plus") else learning_rates(1e-3)
    return Method(key, title, "images", learning(merge, partial(settings_of, **kind)), choices, learns=True)


VARIANTS = (
    _variant("adamerging-task-wise", "AdaMerging, task-wise", task_wise=True),
    _variant("adamerging", "AdaMerging"),
    _variant("adamerging-fusionbench", "AdaMerging, FusionBench", preset="fusionbench"),
    _variant("adamerging++", "AdaMerging++", plus=True),
    _variant("adamerging-expert", "AdaMerging, expert-guided", objective="distillation"),
)
