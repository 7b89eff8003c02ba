"""Pareto Merging: learn in one run, without labels, the best merged model for every preference.

W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ (Chen & Kwok, ICML 2025).

Each public name is imported when it is first asked for, so that the command line's help does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pareto_merging.version import VERSION

if TYPE_CHECKING:
    from pareto_merging.checkpoints import encoders as encoders
    from pareto_merging.checkpoints.checkpoint import open_checkpoint as open_checkpoint
    from pareto_merging.data.tasks import Task as Task
    from pareto_merging.data.tasks import ZeroShotHead as ZeroShotHead
    from pareto_merging.data.tasks import read_head as read_head
    from pareto_merging.errors import Interrupted as Interrupted
    from pareto_merging.errors import TrainingError as TrainingError
    from pareto_merging.errors import UserError as UserError
    from pareto_merging.learn.loop import learn_pareto_set as learn_pareto_set
    from pareto_merging.learn.settings import MethodSettings as MethodSettings
    from pareto_merging.measure.evaluation import evaluate_model as evaluate_model
    from pareto_merging.measure.evaluation import evaluate_preferences as evaluate_preferences
    from pareto_merging.methods.sequential import merge_sequential as merge_sequential
    from pareto_merging.model.attention import ParetoAttention as ParetoAttention
    from pareto_merging.model.files import load_folded as load_folded
    from pareto_merging.model.files import load_heads as load_heads
    from pareto_merging.model.files import load_pareto_set as load_pareto_set
    from pareto_merging.model.files import save_folded as save_folded
    from pareto_merging.model.files import save_pareto_set as save_pareto_set
    from pareto_merging.model.fold import fold as fold
    from pareto_merging.model.fold import merge as merge
    from pareto_merging.model.learned import get_lambda as get_lambda
    from pareto_merging.model.learned import lambda_names as lambda_names
    from pareto_merging.model.learned import learned_parameters as learned_parameters
    from pareto_merging.model.learned import set_lambda as set_lambda
    from pareto_merging.model.linear import ParetoLinear as ParetoLinear
    from pareto_merging.model.parametrize import parametrize as parametrize
    from pareto_merging.model.state import get_preference as get_preference
    from pareto_merging.model.state import preference as preference
    from pareto_merging.model.state import set_preference as set_preference
    from pareto_merging.model.stored import remember_stored as remember_stored
    from pareto_merging.model.strategy import set_strategy as set_strategy
    from pareto_merging.run.workspace import load_models as load_models

    # one class by the names that it has had
    MergingTask = Task
    EvaluationTask = Task

__version__ = VERSION

# module -> its public names
_NAMES = {
    "checkpoints.checkpoint": ("open_checkpoint",),
    "data.tasks": ("Task", "ZeroShotHead", "read_head"),
    "errors": ("Interrupted", "TrainingError", "UserError"),
    "learn.loop": ("learn_pareto_set",),
    "learn.settings": ("MethodSettings",),
    "measure.evaluation": ("evaluate_model", "evaluate_preferences"),
    "methods.sequential": ("merge_sequential",),
    "model.attention": ("ParetoAttention",),
    "model.files": ("load_folded", "load_heads", "load_pareto_set", "save_folded", "save_pareto_set"),
    "model.fold": ("fold", "merge"),
    "model.learned": ("get_lambda", "lambda_names", "learned_parameters", "set_lambda"),
    "model.linear": ("ParetoLinear",),
    "model.parametrize": ("parametrize",),
    "model.state": ("get_preference", "preference", "set_preference"),
    "model.stored": ("remember_stored",),
    "model.strategy": ("set_strategy",),
    "run.workspace": ("load_models",),
}
# public name -> where it is; one class has three
_HOMES = {name: (home, name) for home, names in _NAMES.items() for name in names}
_HOMES |= dict.fromkeys(("MergingTask", "EvaluationTask"), _HOMES["Task"])

# modules that are attributes without an import of their own; model cards of exported files import encoders
_ROOMS = {"data": "data", "errors": "errors", "preferences": "preferences", "encoders": "checkpoints.encoders"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{_ROOMS[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, own_name = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{home}"), own_name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
