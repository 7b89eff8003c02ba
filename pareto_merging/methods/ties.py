"""TIES-Merging: trim, elect sign, disjoint mean (Yadav et al., NeurIPS 2023, algorithm 1).

Per task: keep the ``density`` share of the task vector's entries with the largest magnitude, over the whole vector.
Per entry: the sign of the trimmed task vectors' sum is elected, and what has that sign is averaged (or summed, as the
merging of vision models in the published code does). W = W0 + λ·τ.

We differ from the published code in two things: where the sum is exactly 0 nothing is elected (the paper's sgn), while
the code takes the sign that most entries have; and buffers are averaged, not trimmed together with the parameters.
"""

from typing import Literal

from torch import Tensor, nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, on_weights, one_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import check_copies
from pareto_merging.model.preprocessing import Ties
from pareto_merging.model.stored import PretrainedWeights


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    coefficient: float = 0.3,
    density: float = 0.2,
    combine: Literal["mean", "sum"] = "sum",
) -> Merged:
    """Return the TIES-merged model; no data.

    Args:
        coefficient: λ; the paper's default is 1 with "mean", the published vision code's 0.3 with "sum".
        density: the share of entries kept, in (0, 1]. combine: of the entries that agree, the "mean" or the "sum".
    """
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine: expected mean or sum, got {combine!r}")
    copies, tensors = check_copies(pretrained, finetuned)
    parameters = [(names, tensor) for names, tensor in tensors if isinstance(tensor, nn.Parameter)]
    ties = Ties.of(parameters, copies, density, PretrainedWeights(pretrained))

    def piece(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
        kept = ties(name, taus)
        total = kept.sum(dim=0)
        if combine == "mean":
            total = total / (kept != 0).sum(dim=0).clamp(min=1)
        return base + coefficient * total

    return one_model(merge_tensors(pretrained, finetuned, piece), finetuned, thresholds=list(ties.thresholds))


def _choices(tasks: int, method: MethodSettings) -> list[Choice]:
    return [
        {"coefficient": 0.3, "density": 0.2, "combine": "sum"},
        {"coefficient": 1.0, "density": 0.2, "combine": "mean"},
        {"coefficient": round(min(0.5, 2 / tasks), 4), "density": 0.5, "combine": "sum"},
        {"coefficient": round(min(0.8, 3 / tasks), 4), "density": 0.2, "combine": "sum"},
    ]


METHOD = Method("ties", "TIES-Merging", "weights", on_weights(merge), _choices)
