"""The cores of the low-rank term that are not learned: γγᵀ and γ·e₁ᵀ."""

import torch
from torch import Tensor


def preference_core(core: str, gamma: Tensor) -> Tensor:
    """Return the G [r, r, K] of a structure without a learned core. r = K, and G ×₃ γ is γγᵀ, or γ·e₁ᵀ (γ in the first
    column).

    With A [N, K] and B [D, K] the low-rank term A·(G ×₃ γ)·Bᵀ is then (Aγ) ∘ (Bγ) for ``"outer-product"`` and
    (Aγ) ∘ b for ``"outer-vector"``, b the first column of B; ∘ is the outer product of two vectors.
    Raises ValueError for another core, or a preference per item.
    """
    if gamma.ndim != 1:
        raise ValueError(f"preference: expected one for the whole batch with core={core!r}, got {len(gamma)}")
    if core == "outer-product":
        square = gamma[:, None] * gamma[None, :]
    elif core == "outer-vector":
        square = torch.nn.functional.pad(gamma[:, None], (0, len(gamma) - 1))
    else:
        raise ValueError(f"core: expected outer-product or outer-vector where there is no G, got {core!r}")
    # the entries of γ sum to 1, so the same slice for every task gives that slice back; divided by their sum, exactly
    return (square / gamma.sum())[:, :, None].expand(-1, -1, len(gamma))
