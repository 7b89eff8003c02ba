"""Data-free Pareto Merging: S_k = Σ_layers ‖W(γ) − W_k‖²_F instead of entropies (Chen & Kwok, ICML 2025).

The distances have closed forms in Gram matrices and r×r products (:class:`WeightDistance`), so no image is seen, no
forward is run and thousands of steps take seconds. Our reading: each S_k in units of ‖τ_k‖², so that tasks count
alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto
from pareto_merging.methods.interface import Merged
from pareto_merging.model.copies import Weights


def settings(**changes: Any) -> MethodSettings:
    """Pareto Merging's settings with the weight-distance objective."""
    return MethodSettings.model_validate({**changes, "objective": "weight-distance"})


def merge(
    pretrained: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights],
    *,
    method: MethodSettings | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Merged:
    """A model for every preference from the weights alone; arguments as :func:`pareto.merge`."""
    method = settings() if method is None else method.model_copy(update={"objective": "weight-distance"})
    return pareto.merge(
        pretrained, finetuned, tasks=None, method=method, folder=folder, resume=resume, progress=progress
    )
