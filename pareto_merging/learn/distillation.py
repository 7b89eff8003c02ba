"""The objectives ``distillation`` and ``features``: S_k is the distance to the task's own fine-tuned model.

Ours (docs/study.md has the figures): the fine-tuned models are at hand in every merging problem, and what they
predict on unlabelled images is a better teacher than low entropy, which cannot see a confident mistake. With the logits
ℓ_k of the fine-tuned model and ℓ of the merged one, both by task k's head:

    S_k = T²·mean_i KL(softmax(ℓ_k(x_i)/T) ‖ softmax(ℓ(x_i)/T))

(Hinton et al., "Distilling the knowledge in a neural network", 2015, whose T² keeps gradients of one size whatever T
is.) Without a head: S_k = mean_i 1 − cos(f_k(x_i), f(x_i)) of the features. Either may have the entropy beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from pareto_merging.data.tasks import Task
from pareto_merging.learn.entropy import MEAN_PREDICTION, entropy_terms
from pareto_merging.learn.objectives import Objective, TaskTerms
from pareto_merging.learn.settings import LossSettings, MethodSettings
from pareto_merging.system.modes import eval_mode

# the share of a batch's images that the model and the teacher put into one class
AGREEMENT = "agreement"


def temperature_kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(logits/T)) of each row.

    Args:
        logits, teacher: [n, C], in any dtypes; the result is in float32 (float64), differentiable in ``logits``.
        temperature: T > 0.
    """
    dtype = pmkernels.reference.accumulate_dtype(logits)
    log_p = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    log_q = torch.log_softmax(teacher.to(dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)


def cosine_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cos(features, teacher) of each row. [n, *] and [n, D] -> [n], differentiable in ``features``."""
    dtype = pmkernels.reference.accumulate_dtype(features)
    return 1 - torch.cosine_similarity(features.to(dtype).flatten(1), teacher.to(dtype), dim=-1)


class Outputs(NamedTuple):
    """What a model says of a batch: logits [n, C], features [n, D]. Each where the settings ask for it."""

    logits: Tensor | None
    features: Tensor | None

    def joined(self) -> Tensor:
        """Return both side by side, [n, C + D]."""
        parts = [part for part in self if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0]) for part in parts], dim=1)


def outputs_of(features: Tensor, head: nn.Module, loss: LossSettings) -> Outputs:
    """Return what is compared with the teacher's, by the settings of the loss."""
    logits = head(features) if needs_head(loss) else None
    return Outputs(logits, features.flatten(1) if loss.objective == "features" or loss.features_weight else None)


def needs_head(loss: LossSettings) -> bool:
    """Tell if an objective on teachers looks at logits."""
    return loss.objective != "features" or loss.entropy_weight > 0


@torch.no_grad()
def ask(teacher: Callable[[Tensor], Tensor], images: Tensor, head: nn.Module, loss: LossSettings) -> Tensor:
    """Return what a teacher says of images now, [n, C + D]. A module is in eval mode for it."""
    with eval_mode(*([teacher] if isinstance(teacher, nn.Module) else [])):
        return outputs_of(teacher(images), head, loss).joined()


class Distillation(Objective):
    """The distance of each task's predictions, or features, to its teacher's.

    The teachers are the tasks': kept tensors [images, C + D], or modules that are asked in every step. The log has the
    agreement too: the share of images that both put into one class.
    """

    has_targets = True

    def __init__(self, model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> None:
        self.loss = settings.loss
        self.teachers = [task.teacher for task in tasks.values()]
        self.heads = [task.head for task in tasks.values()]
        self.watches = (AGREEMENT, "entropy", MEAN_PREDICTION) if needs_head(self.loss) else ()

    def targets_of(self, task: int, indices: Sequence[int], images: Tensor) -> Tensor:
        teacher = self.teachers[task]
        if isinstance(teacher, Tensor):
            return teacher[torch.as_tensor(indices, device=teacher.device)]
        if teacher is None:
            raise ValueError("tasks: expected a teacher for every task (with_teachers gives them), got none")
        return ask(teacher, images, self.heads[task], self.loss)

    def outputs(self, features: Tensor, head: nn.Module) -> Outputs:
        return outputs_of(features, head, self.loss)

    def terms(self, task: int, outputs: Outputs, targets: Tensor | None) -> TaskTerms:
        assert targets is not None
        (logits, features), loss = outputs, self.loss
        classes = 0 if logits is None else logits.shape[1]
        # what both have to be, where the objective compares no logits
        of_head, of_encoder = (targets[:, :classes], targets[:, classes:])
        parts: list[Tensor] = []
        if features is not None:
            distance = cosine_distance(features, of_encoder).mean()
            parts.append(distance if loss.objective == "features" else loss.features_weight * distance)
        if logits is None:
            return TaskTerms(parts[0])
        if loss.objective != "features":
            parts.append(temperature_kl(logits, of_head, loss.temperature).mean())
        entropy = entropy_terms(logits if loss.entropy_weight else logits.detach(), loss.information_maximisation)
        if loss.entropy_weight:
            parts.append(loss.entropy_weight * entropy.objective)
        agreement = (logits.argmax(dim=-1) == of_head.argmax(dim=-1)).to(parts[0].dtype).mean()
        return TaskTerms(torch.stack(parts).sum(), (agreement, *entropy.watched))
