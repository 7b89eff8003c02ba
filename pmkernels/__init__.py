"""Kernels for the weight of one layer of a Pareto model.

    W(γ) = W0 + Σ_k λ_k τ_k + A_c·B_cᵀ + A·(G ×₃ γ)·Bᵀ

Six operations, each with its definition in plain PyTorch under the same name in :mod:`pmkernels.reference`
(preference_linear's is pareto_linear).
"""

from pmkernels import reference
from pmkernels.entropy import softmax_entropy
from pmkernels.linear import pareto_linear
from pmkernels.merge import merge_weight
from pmkernels.preference import preference_linear, widen_weight
from pmkernels.projection import project_task_vectors
from pmkernels.strategies import STRATEGIES
from pmkernels.vectors import merge_vectors, merge_vectors_gradient

__all__ = [
    "STRATEGIES",
    "merge_vectors",
    "merge_vectors_gradient",
    "merge_weight",
    "pareto_linear",
    "preference_linear",
    "project_task_vectors",
    "reference",
    "softmax_entropy",
    "widen_weight",
]
