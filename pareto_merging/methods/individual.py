"""The individual models: each task with its own fine-tuned weights. The upper bound, at the price of K models.

As an answer to a preference: the fine-tuned model of the task that γ wants most (the first of several).
"""

import torch
from torch import Tensor, nn

from pareto_merging.methods.interface import Copies, Merged, Method, on_weights, task_names
from pareto_merging.model.copies import check_copies
from pareto_merging.model.pieces import flat_pieces
from pareto_merging.model.stored import copy_of


def merge(pretrained: nn.Module, finetuned: Copies) -> Merged:
    """Give for each γ a copy of the fine-tuned model that it wants most.

    Bit by bit, in the dtype of ``pretrained``: weights that are stored in a wider one are rounded once. Raises
    ValueError as :func:`parametrize`, and ``at`` for numbers that are not finite.
    """
    copies, _ = check_copies(pretrained, finetuned)

    @torch.no_grad()
    def at(gamma: Tensor) -> nn.Module:
        task = list(copies)[int(gamma.argmax())]
        model = copy_of(pretrained)
        _, tensors = check_copies(model, {task: copies[task]})
        for names, tensor in tensors:
            tensor.copy_(next(copies[task][name] for name in names if name in copies[task]))
            if not all(bool(torch.isfinite(piece).all()) for piece in flat_pieces(tensor)):
                raise ValueError(f"finetuned: expected finite numbers in {names[0]} of {task}, got NaN or inf")
        return model

    return Merged(task_names(finetuned), at, preference_aware=True)


METHOD = Method("individual", "Individual", "weights", on_weights(merge), stores="all models", is_bound=True)
