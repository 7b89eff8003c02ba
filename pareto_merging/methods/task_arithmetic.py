"""Task arithmetic: W = W0 + λ Σ_k τ_k.

Ilharco et al., "Editing models with task arithmetic", ICLR 2023. Of parameters; buffers, to which the published code
does the same, are averaged (:func:`merge_tensors`).
"""

from torch import nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, on_weights, one_model
from pareto_merging.methods.streaming import merge_tensors


def merge(pretrained: nn.Module, finetuned: Copies, *, coefficient: float = 0.3) -> Merged:
    """Add the sum of the task vectors, times ``coefficient``, to W0; no data. It is λ, for all tasks and tensors."""
    model = merge_tensors(pretrained, finetuned, lambda name, place, base, taus: base + coefficient * taus.sum(dim=0))
    return one_model(model, finetuned)


def _choices(tasks: int, method: MethodSettings) -> list[Choice]:
    # 0.3 is the published value for eight tasks; fewer task vectors bear a larger one
    return [{"coefficient": round(c, 4)} for c in (0.3, min(0.5, 3 / tasks), min(0.4, 2 / tasks), 0.2)]


METHOD = Method("task-arithmetic", "Task arithmetic", "weights", on_weights(merge), _choices)
