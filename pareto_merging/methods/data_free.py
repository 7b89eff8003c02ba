"""Data-free Pareto Merging: distances to the fine-tuned weights instead of entropies.

S_k = Σ_layers ‖W(γ) − W_k‖²_F (Chen & Kwok, ICML 2025). The distances have closed forms in Gram matrices and r×r
products (:class:`WeightDistance`), so no image is seen, no forward is run and thousands of steps take seconds. Our
reading: each S_k in units of ‖τ_k‖², so that tasks count alike.
"""

from functools import partial
from typing import Any, Unpack

from torch import nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, Run, learning


def settings(**changes: Any) -> MethodSettings:
    """Return Pareto Merging's settings with the weight-distance objective."""
    return MethodSettings.model_validate({**changes, "objective": "weight-distance"})


def merge(
    pretrained: nn.Module, finetuned: Copies, *, method: MethodSettings | None = None, **run: Unpack[Run]
) -> Merged:
    """Learn a model for every preference from the weights alone; arguments as :func:`pareto.merge`."""
    method = settings() if method is None else method.model_copy(update={"objective": "weight-distance"})
    return pareto.merge(pretrained, finetuned, tasks=None, method=method, **run)


def _choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [{}, {"learning_rate": 10 * method.learning_rate}, {"concentration": 1.0}, {"mu": 10 * method.mu}]


RUN = learning(pareto.merge, partial(pareto.settings_of, objective="weight-distance"), tasks=None)
METHOD = Method("pareto-data-free", "Pareto Merging, data-free", "weights", RUN, _choices, stores="1 model + low rank")
