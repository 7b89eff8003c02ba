"""The table of scalarisations: how S_1 … S_K become one loss at a preference γ.

Equations: Chen & Kwok, arXiv 2408.12105. :func:`register` adds one from outside. Nothing here loads PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from pareto_merging.system.register import add_member

if TYPE_CHECKING:
    from torch import Tensor

# (objectives [K], gamma [K], μ) -> scalar
Scalarization: TypeAlias = "Callable[[Tensor, Tensor, float], Tensor]"


def smooth_tchebycheff(objectives: Tensor, gamma: Tensor, mu: float = 0.1) -> Tensor:
    """Return μ·log Σ_k exp(γ_k S_k / μ) of objectives [K] at gamma [K]. Lin et al. 2024; equation 7."""
    return mu * (gamma * objectives / mu).logsumexp(dim=-1)


def tchebycheff(objectives: Tensor, gamma: Tensor) -> Tensor:
    """Return max_k γ_k S_k, the limit of the smooth form for μ → 0."""
    return (gamma * objectives).amax(dim=-1)


def linear(objectives: Tensor, gamma: Tensor) -> Tensor:
    """Return Σ_k γ_k S_k (equation 4), which reaches only the convex parts of a front."""
    return (gamma * objectives).sum(dim=-1)


SCALARIZATIONS: dict[str, Scalarization] = {}


def register(name: str, function: Scalarization, *, replace: bool = False) -> None:
    """Add a scalarisation to the table. Raises ValueError as :func:`.register.add_member`."""
    add_member(SCALARIZATIONS, "scalarization", name, function, replace=replace)


register("smooth-tchebycheff", smooth_tchebycheff)
register("tchebycheff", lambda objectives, gamma, mu: tchebycheff(objectives, gamma))
register("linear", lambda objectives, gamma, mu: linear(objectives, gamma))


def scalarize(objectives: Tensor, gamma: Tensor, name: str, mu: float) -> Tensor:
    """Return the scalarisation ``name`` of objectives [K] at gamma [K]."""
    if name not in SCALARIZATIONS:
        raise ValueError(f"scalarization: expected one of {', '.join(SCALARIZATIONS)}, got {name!r}")
    return SCALARIZATIONS[name](objectives, gamma, mu)
