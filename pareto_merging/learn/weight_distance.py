"""The objective ``weight-distance``: S_k = Σ_layers ‖W(γ) − W_k‖²_F, in closed form and without data."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.data.tasks import Task
from pareto_merging.learn.gradient import low_rank_square
from pareto_merging.learn.objectives import Objective
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.parameters import LowRankTerm, merged_parameters
from pareto_merging.model.state import pareto_state


class WeightDistance(Objective):
    """The distances of a Pareto model to the fine-tuned ones.

    No matrix of a layer's size is formed: W(γ) − W_k = Σ_j (λ_j − δ_jk) τ_j + A·C·Bᵀ, so with the Gram matrix of the
    task vectors (once) and the r×r products T_j = Aᵀτ_jB (one pass over the τ per call):

        ‖W(γ) − W_k‖² = (λ − e_k)ᵀ Gram (λ − e_k) + 2 Σ_j (λ_j − δ_jk) ⟨T_j, C⟩ + ‖A·C·Bᵀ‖²

    The first term of all layers is one batched product, and so are the other two of layers of one shape. Every
    parameter with task vectors or a low-rank term counts, tied ones once. ``normalize`` divides S_k by ‖τ_k‖² summed
    over the layers, so that S_k = 1 for the pretrained model and the tasks are on one scale (our addition; False is the
    plain sum).
    """

    def __init__(self, model: nn.Module, normalize: bool = False) -> None:
        state = pareto_state(model)
        self.tasks, self.strategy = len(state.task_names), state.now.kernel_strategy
        # those with task vectors first
        self._parameters = sorted(merged_parameters(model), key=lambda p: p.task_vectors is None)
        self._task_vectors = [p.task_vectors for p in self._parameters if p.task_vectors is not None]
        grams = [gram(task_vectors) for task_vectors in self._task_vectors]
        if not grams:
            raise ValueError("model: expected task vectors for the weight-distance objective, got none (folded?)")
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in grams) else torch.float32
        # [L, K, K]
        self._grams = torch.stack([g.to(grams[0].device, dtype) for g in grams])
        scale = self._grams.diagonal(dim1=1, dim2=2).sum(dim=0) if normalize else torch.ones_like(self._grams[0, 0])
        self.scale = torch.where(scale > 0, scale, 1.0)
        self._identity = torch.eye(self.tasks, dtype=dtype, device=self._grams.device)

    def values(self, gamma: Tensor) -> Tensor:
        """Return S_1 … S_K [K] at gamma [K], differentiable in λ, A, G and B."""
        table = torch.stack([lam.to(self._grams) for p in self._parameters if (lam := p.used_lam) is not None])
        # row k of a layer is λ − e_k
        difference = table[:, None, :] - self._identity
        total = ((difference @ self._grams) * difference).sum(dim=(0, 2))
        shapes: dict[Any, list[tuple[int, LowRankTerm]]] = {}
        for index, parameter in enumerate(self._parameters):
            if (term := parameter.whole_low_rank(gamma)) is not None:
                key = (term.A.shape, term.B.shape, term.A.device, index < len(self._task_vectors))
                shapes.setdefault(key, []).append((index, term))
        for (*_, has_task_vectors), group in shapes.items():
            A, G, B = (torch.stack(parts) for parts in zip(*(term for _, term in group), strict=True))
            core = G @ gamma.to(G)
            total = total + low_rank_square(A, core, B).sum().to(total)
            if not has_task_vectors:
                continue
            project = partial(pmkernels.project_task_vectors, strategy=self.strategy)
            # of a convolution as matrices
            taus = [(self._task_vectors[index].flatten(2), term) for index, term in group]
            projected = torch.stack([project(tau, term.A, term.B) for tau, term in taus])
            # ⟨T_j, C⟩ of each layer and task [L, K]
            inner = (projected * core[:, None]).sum(dim=(2, 3)).to(total)
            # indexing by a list would copy it to the device, which a CUDA graph cannot
            mine = torch.stack([difference[index] for index, _ in group])
            total = total + 2 * (mine * inner[:, None, :]).sum(dim=(0, 2))
        return total / self.scale


def gram(task_vectors: Tensor) -> Tensor:
    """Return ⟨τ_i, τ_j⟩ of one layer, [K, *] -> [K, K], in float32 (float64) and pieces."""
    dtype = pmkernels.reference.accumulate_dtype(task_vectors)
    flat = task_vectors.reshape(task_vectors.shape[0], -1)
    total = torch.zeros(flat.shape[0], flat.shape[0], dtype=dtype, device=flat.device)
    for piece in flat.split(1 << 20, dim=1):
        wide = piece.to(dtype)
        total += wide @ wide.t()
    return total


def make(model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> WeightDistance:
    """Return the objective, in the units that the settings name."""
    return WeightDistance(model, settings.loss.normalize_distance)
