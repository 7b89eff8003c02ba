"""How far results are from the truth, and how far they may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.session import FAILED

# of the error of plain PyTorch in the same precision
TOLERANCE = 2.0


def relative_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest ‖result − truth‖ / ‖truth‖ of several tensors, 1e30 where it is not finite."""
    worst = 0.0
    for a, b in zip(results, truth, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        worst = max(worst, error if math.isfinite(error) else 1e30)
    return worst


LINE_TOLERANCE = 2 * TOLERANCE


@dataclass(frozen=True)
class Errors:
    """Relative errors: the largest of several results, and the largest of their rows or columns."""

    whole: float
    line: float

    @classmethod
    def of(cls, results: Sequence[Tensor], truth: Sequence[Tensor]) -> "Errors":
        """Compare rows and columns with the mean size of all. One wrong tile must not hide in a large result."""
        worst = 0.0
        for a, b in zip(results, truth, strict=True):
            if b.ndim != 2:
                continue
            size = float(b.norm()) / math.sqrt(b.numel())
            for dim in (0, 1):
                lines = (a.double() - b).norm(dim=dim) / math.sqrt(b.shape[dim])
                error = float(lines.max()) / max(size, 1e-30)
                worst = max(worst, error if math.isfinite(error) else FAILED)
        return cls(relative_error(results, truth), worst)


def item_error(result: Tensor, truth: Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖ of the worst item of [n, dim]. It is 1e30 where it is not finite."""
    errors = (result.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-30)
    return float(errors.nan_to_num(FAILED, FAILED).max().clamp(max=FAILED))


Gradient = dict[str, Tensor]


def group_errors(gradient: Gradient, truth: Gradient) -> dict[str, float]:
    """Return the relative errors of the gradients of λ, A, G and B, each together."""
    if set(gradient) != set(truth):
        return {"": FAILED}
    groups: dict[str, list[str]] = {}
    for name in truth:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return {
        group: relative_error(
            [torch.cat([gradient[name].reshape(-1) for name in names])],
            [torch.cat([truth[n].reshape(-1) for n in names])],
        )
        for group, names in groups.items()
    }
