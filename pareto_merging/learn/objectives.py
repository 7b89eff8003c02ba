"""What is minimised: one objective per task, a scalarisation of them, and two regularisers.

Equations: Chen & Kwok, "You Only Merge Once" / "Pareto Merging", arXiv 2408.12105, equations 3, 7 and 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.state import pareto_state

Scalarization: TypeAlias = Literal["smooth-tchebycheff", "tchebycheff", "linear"]


def smooth_tchebycheff(objectives: Tensor, gamma: Tensor, mu: float = 0.1, ideal: float = 0.0) -> Tensor:
    """μ·log Σ_k exp(γ_k (S_k − z_k) / μ): objectives [K], gamma [K] -> scalar (Lin et al. 2024; equation 7)."""
    return mu * torch.logsumexp(gamma * (objectives - ideal) / mu, dim=-1)


def tchebycheff(objectives: Tensor, gamma: Tensor, ideal: float = 0.0) -> Tensor:
    """max_k γ_k (S_k − z_k): the limit of the smooth form for μ → 0."""
    return (gamma * (objectives - ideal)).amax(dim=-1)


def linear(objectives: Tensor, gamma: Tensor) -> Tensor:
    """Σ_k γ_k S_k (equation 4): reaches only the convex parts of a front."""
    return (gamma * objectives).sum(dim=-1)


def scalarize(objectives: Tensor, gamma: Tensor, kind: Scalarization, mu: float) -> Tensor:
    """The scalarisation named ``kind`` of objectives [K] at gamma [K]."""
    if kind == "smooth-tchebycheff":
        return smooth_tchebycheff(objectives, gamma, mu)
    if kind == "tchebycheff":
        return tchebycheff(objectives, gamma)
    if kind == "linear":
        return linear(objectives, gamma)
    raise ValueError(f"scalarization: expected smooth-tchebycheff, tchebycheff or linear, got {kind!r}")


def cosine_alignment(objectives: Tensor, gamma: Tensor) -> Tensor:
    """cos(S, 1/γ): objectives [K], gamma [K] -> scalar (equation 10; subtracted from the loss).

    1/γ is written γ_min/γ, which has the same direction and does not overflow; an entry of γ below 1e-12 counts as
    1e-12.
    """
    gamma = gamma.clamp(min=1e-12)
    return torch.cosine_similarity(objectives, gamma.amin() / gamma, dim=-1)


class _ZeroSafeSqrt(torch.autograd.Function):
    """√max(x, 0) with a gradient of 0 at and below 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.clamp(min=0).sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return torch.where(root > 0, grad / (2 * root), 0.0)


def low_rank_square(A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    """‖A·C·Bᵀ‖²_F = tr(AᵀA·C·BᵀB·Cᵀ) by products of r×r matrices: A [*, N, r], C [*, r, r], B [*, D, r] -> [*]."""
    return ((A.mT @ A @ C) * (C @ (B.mT @ B))).sum(dim=(-2, -1))


def tensor_norm(model: nn.Module, gamma: Tensor) -> Tensor:
    """‖A·(G ×₃ γ)·Bᵀ‖_F over all low-rank layers together (equation 10), zero where there are none.

    Our reading: the Frobenius norm of the whole personalised part, √Σ_layers ‖·‖², not a sum of the layers' norms.
    Its gradient at G = 0 is 0. Layers of one shape are computed together, in a few batched products.
    """
    shapes: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for A, G, B in _low_rank_parts(model, gamma):
        shapes.setdefault((A.shape, G.shape, B.shape, A.dtype, A.device), []).append((A, G, B))
    if not shapes:
        return torch.zeros((), device=gamma.device)
    wide = pmkernels.reference.accumulate_dtype(gamma, *(A for group in shapes.values() for A, _, _ in group))
    total = torch.zeros((), dtype=wide, device=gamma.device)
    for group in shapes.values():
        A, G, B = (torch.stack(parts).to(wide) for parts in zip(*group, strict=True))
        total = total + low_rank_square(A, G @ gamma.to(G), B).sum().to(gamma.device)
    norm: Tensor = _ZeroSafeSqrt.apply(total)
    return norm


def _low_rank_parts(model: nn.Module, gamma: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    seen = set()
    for _, module in pareto_modules(model):
        for name in module.pareto_names:
            parts = module.pareto_parts_at(name, gamma)
            A, G, B = parts["A"], parts["G"], parts["B"]
            if A is not None and G is not None and B is not None and id(A) not in seen:
                seen.add(id(A))
                yield A, G, B


@dataclass(frozen=True)
class EntropyTerms:
    """The predictions on one batch of one task: ``objective`` S_k and what is watched beside it (all scalars)."""

    objective: Tensor
    entropy: Tensor
    mean_prediction_entropy: Tensor


def entropy_terms(logits: Tensor, information_maximisation: float = 0.0) -> EntropyTerms:
    """S_k of one batch: the mean Shannon entropy of the predictions (equation 3), logits [n, C].

    With ``information_maximisation`` w > 0 the entropy of the mean prediction is rewarded, S_k + w·(log C − H(p̄)),
    which a model that puts every image into one class cannot lower. Not in the paper; off by default.
    """
    entropy = pmkernels.softmax_entropy(logits).mean()
    mean_prediction = torch.softmax(logits.to(entropy.dtype), dim=-1).mean(dim=0)
    mean_entropy = torch.special.entr(mean_prediction.clamp(min=torch.finfo(entropy.dtype).tiny)).sum()
    objective = entropy
    if information_maximisation:
        objective = entropy + information_maximisation * (math.log(logits.shape[-1]) - mean_entropy)
    return EntropyTerms(objective, entropy.detach(), mean_entropy.detach())


class WeightDistance:
    """The data-free objectives S_k = Σ_layers ‖W(γ) − W_k‖²_F of a Pareto model, without a matrix of a layer's size.

    W(γ) − W_k = Σ_j (λ_j − δ_jk) τ_j + A·C·Bᵀ, so with the Gram matrix of the task vectors (once) and the r×r products
    T_j = Aᵀτ_jB (one pass over the τ per call):

        ‖W(γ) − W_k‖² = (λ − e_k)ᵀ Gram (λ − e_k) + 2 Σ_j (λ_j − δ_jk) ⟨T_j, C⟩ + ‖A·C·Bᵀ‖²

    The first term of all layers is one batched product, and so are the other two of layers of one shape.

    Args:
        model: a Pareto model. Every parameter with task vectors or a low-rank term counts, tied ones once.
        normalize: divide S_k by ‖τ_k‖² summed over the layers, so that S_k = 1 for the pretrained model and the
            tasks are on one scale whatever the size of their task vectors (our addition; False is the plain sum).
    """

    def __init__(self, model: nn.Module, normalize: bool = False) -> None:
        # layers with task vectors first, in the order of their Gram matrices
        self._layers: list[tuple[ParetoModule, str]] = []
        self._folded: list[tuple[ParetoModule, str]] = []
        grams: list[Tensor] = []
        state = pareto_state(model)
        self.tasks, self.strategy = len(state.task_names), state.now.kernel_strategy
        seen = set()
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                weight = module._parameters[name]
                if id(weight) in seen:
                    continue
                seen.add(id(weight))
                task_vectors = module.pareto_parts(name)["task_vectors"]
                if task_vectors is None:
                    self._folded.append((module, name))
                else:
                    self._layers.append((module, name))
                    grams.append(gram(task_vectors))
        if not grams:
            raise ValueError("model: expected task vectors for the weight-distance objective, got none (folded?)")
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in grams) else torch.float32
        # [L, K, K]
        self._grams = torch.stack([g.to(grams[0].device, dtype) for g in grams])
        scale = self._grams.diagonal(dim1=1, dim2=2).sum(dim=0) if normalize else torch.ones_like(self._grams[0, 0])
        self.scale = torch.where(scale > 0, scale, 1.0)
        self._identity = torch.eye(self.tasks, dtype=dtype, device=self._grams.device)

    def __call__(self, gamma: Tensor) -> Tensor:
        """S_1 … S_K at gamma [K], differentiable in λ, A, G and B: [K]."""
        parts = [module.pareto_parts_at(name, gamma) for module, name in self._layers]
        table = torch.stack([_given(p, "lam").to(self._grams) for p in parts])
        # row k of a layer is λ − e_k
        difference = table[:, None, :] - self._identity
        total = ((difference @ self._grams) * difference).sum(dim=(0, 2))
        shapes: dict[Any, list[int]] = {}
        folded = [module.pareto_parts_at(name, gamma) for module, name in self._folded]
        for index, p in enumerate(parts + folded):
            if p["A"] is not None:
                key = (_given(p, "A").shape, _given(p, "B").shape, _given(p, "A").device, index < len(parts))
                shapes.setdefault(key, []).append(index)
        for (*_, has_task_vectors), group in shapes.items():
            members = [(parts + folded)[index] for index in group]
            A, G, B = (torch.stack([_given(p, name) for p in members]) for name in ("A", "G", "B"))
            core = G @ gamma.to(G)
            total = total + low_rank_square(A, core, B).sum().to(total)
            if not has_task_vectors:
                continue
            projected = torch.stack(
                [
                    pmkernels.project_task_vectors(
                        _given(p, "task_vectors"), _given(p, "A"), _given(p, "B"), strategy=self.strategy
                    )
                    for p in members
                ]
            )
            # ⟨T_j, C⟩ of each layer and task [L, K]
            inner = (projected * core[:, None]).sum(dim=(2, 3)).to(total)
            # indexing by a list would copy it to the device, which a CUDA graph cannot
            mine = torch.stack([difference[index] for index in group])
            total = total + 2 * (mine * inner[:, None, :]).sum(dim=(0, 2))
        return total / self.scale


def _given(parts: dict[str, Tensor | None], name: str) -> Tensor:
    value = parts[name]
    assert value is not None
    return value


def gram(task_vectors: Tensor) -> Tensor:
    """⟨τ_i, τ_j⟩ of one layer, [K, *] -> [K, K], float32 (float64), in pieces that never copy all task vectors."""
    dtype = pmkernels.reference.accumulate_dtype(task_vectors)
    flat = task_vectors.reshape(task_vectors.shape[0], -1)
    total = torch.zeros(flat.shape[0], flat.shape[0], dtype=dtype, device=flat.device)
    for piece in flat.split(1 << 20, dim=1):
        wide = piece.to(dtype)
        total += wide @ wide.t()
    return total
