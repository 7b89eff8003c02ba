"""A merged parameter: W0 and what is added to it.

The parts of ``weight`` are attributes ``task_vectors``, ``lam``, ``A_c``, ``B_c``, ``A``, ``G``, ``B`` of its module;
those of any other parameter carry its name in front: ``bias_lam``, ``in_proj_weight_G``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.model.cores import preference_core

# the term that depends on the preference, and the one that does not
LOW_RANK = ("A", "G", "B")
CONSTANT = ("A_c", "B_c")
LEARNED = ("lam", *CONSTANT, *LOW_RANK)
PARTS = ("task_vectors", *LEARNED)


def part_name(name: str, part: str) -> str:
    """Name the attribute that holds ``part`` of parameter ``name``: ``("bias", "lam")`` -> ``"bias_lam"``."""
    return part if name == "weight" else f"{name}_{part}"


class LowRankTerm(NamedTuple):
    """A·(G ×₃ γ)·Bᵀ: A [N, r], G [r, r, K], B [D, r]."""

    A: Tensor
    G: Tensor
    B: Tensor


@dataclass(eq=False, slots=True)
class MergedParameter:
    """One parameter W0 + Σλτ + A_c·B_cᵀ + A·(G ×₃ γ)·Bᵀ, as stored.

    Attributes:
        module, name: the Pareto module that has it, and its attribute there.
        path: its name in the model, ``blocks.0.attn.in_proj_weight``; the attribute where it was asked of the module.
        weight: W0. task_vectors: [K, *shape]. lam: [K]. A_c, B_c, A, G, B: None for what it does not have; G alone is
            None in a structure that learns none. Of a convolution A_c is [out, r] and B_c [in·k·k, r].
    """

    module: Any
    name: str
    path: str
    weight: Tensor
    task_vectors: Tensor | None
    lam: Tensor | None
    A_c: Tensor | None
    B_c: Tensor | None
    A: Tensor | None
    G: Tensor | None
    B: Tensor | None

    @property
    def used_lam(self) -> Tensor | None:
        """Return λ within the range that it is clamped to."""
        bounds = self.module.pareto.now.lambda_range
        return self.lam if self.lam is None or bounds is None else self.lam.clamp(*bounds)

    def low_rank(self, gamma: Tensor | None = None) -> LowRankTerm | None:
        """Return the low-rank term at ``gamma`` [K], by default the current preference. None where there is none."""
        if self.A is None or self.B is None:
            return None
        if self.G is not None:
            return LowRankTerm(self.A, self.G, self.B)
        gamma = self.module.pareto.now.gamma if gamma is None else gamma
        return LowRankTerm(self.A, preference_core(self.module.pareto.core, gamma.to(self.A)), self.B)

    def whole_low_rank(self, gamma: Tensor | None = None) -> LowRankTerm | None:
        """Return both low-rank terms as one, [A_c A]·(G' ×₃ γ)·[B_c B]ᵀ. G' is 1 for every task on A_c's diagonal."""
        term = self.low_rank(gamma)
        if self.A_c is None or self.B_c is None:
            return term
        gamma = self.module.pareto.now.gamma if gamma is None else gamma
        rank = self.A_c.shape[1]
        # divided by their sum, so that γ gives 1 exactly
        ones = torch.eye(rank, dtype=self.A_c.dtype, device=self.A_c.device) / gamma.sum().to(self.A_c)
        constant = ones[:, :, None].expand(rank, rank, gamma.shape[-1])
        if term is None:
            return LowRankTerm(self.A_c, constant, self.B_c)
        size = term.G.shape[0]
        G = torch.cat([F.pad(constant, (0, 0, 0, size)), F.pad(term.G, (0, 0, rank, 0))])
        return LowRankTerm(torch.cat([self.A_c, term.A], dim=1), G, torch.cat([self.B_c, term.B], dim=1))

    def parts(self) -> dict[str, Tensor | None]:
        """Return what is added to W0, as keyword arguments of :mod:`pmkernels`."""
        return {part: getattr(self, part) for part in PARTS}

    def used_parts(self, gamma: Tensor | None = None) -> dict[str, Tensor | None]:
        """Return :meth:`parts` as used at ``gamma`` [K], by default the current one. λ is clamped, G there."""
        parts, term = self.parts(), self.low_rank(gamma)
        parts["lam"], parts["G"] = self.used_lam, None if term is None else term.G
        return parts


def merged_parameter(module: nn.Module, name: str, path: str = "") -> MergedParameter:
    """Return the merged parameter ``name`` of a Pareto module. AttributeError where the module has set it to None."""
    weight = module._parameters.get(name)
    if weight is None:
        raise AttributeError(f"{name}: expected a merged parameter of {type(module).__name__}, got none")
    parts = [module._parameters.get(part_name(name, part)) for part in PARTS]
    return MergedParameter(module, name, path or name, weight, *parts)


def merged_parameters(model: nn.Module) -> Iterator[MergedParameter]:
    """Yield the merged parameters in the order of the model's modules. Each comes once, under its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name in getattr(module, "pareto_names", ()):
            weight = module._parameters.get(name)
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield merged_parameter(module, name, f"{prefix}.{name}" if prefix else name)
