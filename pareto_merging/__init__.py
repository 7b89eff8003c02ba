"""Pareto Merging: learn in one run, without labels, the best merged model for every preference.

W(γ) = W0 + Σ_k λ_k τ_k + A·(G ×₃ γ)·Bᵀ (Chen & Kwok, ICML 2025).
"""

from pareto_merging.checkpoints.readers import open_checkpoint
from pareto_merging.data.heads import ZeroShotHead, read_head
from pareto_merging.errors import Interrupted, TrainingError, UserError
from pareto_merging.learn.training import MergingTask, learn_pareto_set
from pareto_merging.measure.evaluation import EvaluationTask, evaluate_model, evaluate_preferences
from pareto_merging.model.files import (
    load_folded,
    load_heads,
    load_pareto_set,
    save_folded,
    save_pareto_set,
)
from pareto_merging.model.modules import ParetoAttention, ParetoLinear, set_strategy
from pareto_merging.model.parametrize import (
    fold,
    get_lambda,
    lambda_names,
    learned_parameters,
    merge,
    parametrize,
    set_lambda,
)
from pareto_merging.model.stored import remember_stored
from pareto_merging.preferences import get_preference, preference, set_preference
from pareto_merging.run.config import MethodSettings
from pareto_merging.run.workspace import load_models

__all__ = [
    "EvaluationTask",
    "Interrupted",
    "MergingTask",
    "MethodSettings",
    "ParetoAttention",
    "ParetoLinear",
    "TrainingError",
    "UserError",
    "ZeroShotHead",
    "evaluate_model",
    "evaluate_preferences",
    "fold",
    "get_lambda",
    "get_preference",
    "lambda_names",
    "learn_pareto_set",
    "learned_parameters",
    "load_folded",
    "load_heads",
    "load_models",
    "load_pareto_set",
    "merge",
    "open_checkpoint",
    "parametrize",
    "preference",
    "read_head",
    "remember_stored",
    "save_folded",
    "save_pareto_set",
    "set_lambda",
    "set_preference",
    "set_strategy",
]
