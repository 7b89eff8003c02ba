"""Task arithmetic + preference: W(γ) = W0 + λ Σ_k γ_k τ_k.

Chen & Kwok, arXiv 2408.12105, section 3.4. The paper weights the task vectors with the preference directly and does not
say at which λ; ours is a setting. At λ = 1 a one-hot γ is the fine-tuned model itself and the equal γ the weight
average; at λ = K·c the equal γ is task arithmetic with coefficient c.
"""

from torch import Tensor, nn

from pareto_merging.methods.interface import Copies, Merged, Method, among, on_weights, task_names
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import check_copies


def merge(pretrained: nn.Module, finetuned: Copies, *, coefficient: float = 1.0) -> Merged:
    """Put a model together for every preference that is asked for; no data. ``coefficient``: λ."""
    check_copies(pretrained, finetuned)

    def at(gamma: Tensor) -> nn.Module:
        def combine(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
            return base + coefficient * (gamma.to(taus) @ taus)

        return merge_tensors(pretrained, finetuned, combine, gamma)

    return Merged(task_names(finetuned), at, preference_aware=True)


CHOICES = among("coefficient", 1.0, 1.5, 0.75, 2.0)
METHOD = Method(
    "task-arithmetic-preference", "Task arithmetic + preference", "weights", on_weights(merge), CHOICES, "all models"
)
