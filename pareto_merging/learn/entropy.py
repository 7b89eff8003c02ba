"""The objective ``entropy``: S_k is the mean entropy of the predictions on task k.

On batches without labels. Chen & Kwok, "You Only Merge Once" / "Pareto Merging", arXiv 2408.12105, equation 3.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.data.tasks import Task
from pareto_merging.learn.objectives import Objective, TaskTerms
from pareto_merging.learn.settings import MethodSettings

MEAN_PREDICTION = "mean_prediction_entropy"


class Entropy(Objective):
    """The entropy of each task's predictions. The log says that of the mean prediction too, which shows collapse."""

    watches = ("entropy", MEAN_PREDICTION)

    def __init__(self, model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> None:
        self.information_maximisation = settings.loss.information_maximisation

    def terms(self, task: int, outputs: Tensor, targets: Tensor | None) -> TaskTerms:
        return entropy_terms(outputs, self.information_maximisation)


def entropy_terms(logits: Tensor, information_maximisation: float = 0.0) -> TaskTerms:
    """Return S_k of one batch, its entropy and its mean prediction's, for logits [n, C].

    With ``information_maximisation`` w > 0 the entropy of the mean prediction is rewarded, S_k + w·(log C − H(p̄)),
    which a model that puts every image into one class cannot lower. Not in the paper; off by default.
    """
    entropy = pmkernels.softmax_entropy(logits).mean()
    mean_prediction = torch.softmax(logits.to(entropy.dtype), dim=-1).mean(dim=0)
    mean_entropy = torch.special.entr(mean_prediction.clamp(min=torch.finfo(entropy.dtype).tiny)).sum()
    objective = entropy
    if information_maximisation:
        objective = entropy + information_maximisation * (math.log(logits.shape[-1]) - mean_entropy)
    return TaskTerms(objective, (entropy.detach(), mean_entropy.detach()))
