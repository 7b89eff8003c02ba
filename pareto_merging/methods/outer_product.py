"""The paper's two variations with outer products in place of G ×₃ γ.

Appendix 5 of arXiv 2408.12105 v1. Variation 1: W(γ) = W0 + Σ_k λ_k τ_k + (Aγ) ∘ (Bγ) with A [N, K], B [D, K].
Variation 2: W(γ) = W0 + Σ_k λ_k τ_k + (Aγ) ∘ b with A [N, K], b [D].

The copy of the paper that we have lost the formulas and kept the words ("transform the preference vector to a matrix
using vector outer product"), so both are our reading. Both are of rank one at every γ. A starts at zero and B from
Kaiming's uniform distribution, so that, as in Pareto Merging, the run starts at W0 + 0.3 Σ τ_k. Trained exactly as
Pareto Merging.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Unpack

from torch import nn

from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import pareto
from pareto_merging.methods.interface import Copies, Merged, Run, learning


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task] | None,
    variation: Literal[1, 2] = 1,
    method: MethodSettings | None = None,
    **run: Unpack[Run],
) -> Merged:
    """Learn a model for every preference from a structure of rank one. Other arguments as :func:`pareto.merge`."""
    if variation not in (1, 2):
        raise ValueError(f"variation: expected 1 or 2, got {variation!r}")
    core = "outer-product" if variation == 1 else "outer-vector"
    method = (MethodSettings.model_validate({}) if method is None else method).model_copy(update={"core": core})
    return pareto.merge(pretrained, finetuned, tasks=tasks, method=method, **run)


VARIANTS = tuple(
    replace(
        pareto.METHOD,
        key=f"outer-product-{variation}",
        title=f"Outer product, variation {variation}",
        run=learning(merge, pareto.settings_of, variation=variation),
    )
    for variation in (1, 2)
)
