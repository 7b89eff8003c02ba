"""A merged parameter: W0 and what is added to it.

The parts of ``weight`` are attributes ``task_vectors``, ``lam``, ``A``, ``G``, ``B`` of its module; those of any other
parameter carry its name in front: ``bias_lam``, ``in_proj_weight_G``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from pareto_merging.model.cores import preference_core

PARTS = ("task_vectors", "lam", "A", "G", "B")
LEARNED = ("lam", "A", "G", "B")


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
    """One parameter W0 + Σλτ + A·(G ×₃ γ)·Bᵀ, as stored or as used.

    Attributes:
        module, name: the Pareto module that has it, and its attribute there.
        path: its name in the model, ``blocks.0.attn.in_proj_weight``; the attribute where it was asked of the module.
        weight: W0. task_vectors: [K, *shape]. lam: [K]. A, G, B: None for what it does not have; G alone is None in a
            structure that learns none.
    """

    module: nn.Module
    name: str
    path: str
    weight: Tensor
    task_vectors: Tensor | None
    lam: Tensor | None
    A: Tensor | None
    G: Tensor | None
    B: Tensor | None

    @property
    def group(self) -> str:
        """Return the name of the λ vector that it uses."""
        groups: Any = self.module.pareto_groups
        return groups[self.name]

    @property
    def used_lam(self) -> Tensor | None:
        """Return λ within the range that it is clamped to."""
        state: Any = self.module.pareto
        bounds = state.now.lambda_range
        return self.lam if self.lam is None or bounds is None else self.lam.clamp(*bounds)

    def parts(self) -> dict[str, Tensor | None]:
        """Return what is added to W0, as keyword arguments of :mod:`pmkernels`."""
        return {"task_vectors": self.task_vectors, "lam": self.lam, "A": self.A, "G": self.G, "B": self.B}

    def low_rank(self, gamma: Tensor | None = None) -> LowRankTerm | None:
        """Return the low-rank term at ``gamma`` [K], by default the current preference. None where there is none."""
        if self.A is None or self.B is None:
            return None
        state: Any = self.module.pareto
        G = self.G
        if G is None:
            G = preference_core(state.core, (state.now.gamma if gamma is None else gamma).to(self.A))
        return LowRankTerm(self.A, G, self.B)

    def at(self, gamma: Tensor | None = None) -> "MergedParameter":
        """Return it as it is used at ``gamma`` [K], by default the current preference.

        λ lies within the range it is clamped to, and a structure that learns no G has that of :func:`preference_core`.
        """
        term = self.low_rank(gamma)
        return self.with_low_rank(self.A, None if term is None else term.G, self.B, self.used_lam)

    def with_low_rank(
        self, A: Tensor | None, G: Tensor | None, B: Tensor | None, lam: Tensor | None = None
    ) -> "MergedParameter":
        """Return it with another low-rank term, and another λ where one is given."""
        lam = self.lam if lam is None else lam
        return MergedParameter(self.module, self.name, self.path, self.weight, self.task_vectors, lam, A, G, B)

    def rows(self, rows: slice) -> "MergedParameter":
        """Return the rows ``rows`` of a merged matrix."""
        task_vectors = None if self.task_vectors is None else self.task_vectors[:, rows]
        A = None if self.A is None else self.A[rows]
        return MergedParameter(
            self.module, self.name, self.path, self.weight[rows], task_vectors, self.lam, A, self.G, self.B
        )


def merged_parameter(module: nn.Module, name: str, path: str = "") -> MergedParameter | None:
    """Return the merged parameter ``name`` of a Pareto module. None where the module has set it to None."""
    weight = module._parameters.get(name)
    if weight is None:
        return None
    parts = [module._parameters.get(part_name(name, part)) for part in PARTS]
    return MergedParameter(module, name, path or name, weight, *parts)


def merged_parameters(model: nn.Module) -> Iterator[MergedParameter]:
    """Yield the merged parameters of a model, each once. They come in the order of its modules; tied ones under their
    first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name in getattr(module, "pareto_names", ()):
            parameter = merged_parameter(module, name, f"{prefix}.{name}" if prefix else name)
            if parameter is not None and id(parameter.weight) not in seen:
                seen.add(id(parameter.weight))
                yield parameter
