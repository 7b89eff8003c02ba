"""The gradient and the losses in a wider type, and the errors of plain PyTorch."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.errors import Gradient, group_errors
from benchmarks.common.modes import no_tf32
from benchmarks.training.models import Case, Part
from benchmarks.training.runners import Plain, combine_sum, low_rank_norm, merged_exactly, merged_plainly, plain_loss
from pareto_merging.learn.scalarize import scalarize


def exact_gradient(case: Case) -> tuple[Gradient, dict[str, float]]:
    """Return the gradient in a wider type, and plain PyTorch's errors in the model's.

    Those are the larger of two ways to write the merge, rounded once or after each task.
    """
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    with no_tf32():
        runner = Plain(case, lambda part, gamma: merged_exactly(part, gamma, wide), wide, together=False)
        runner.step()
    truth = runner.gradient()
    runner.close()
    errors: dict[str, float] = {}
    merges: list[Callable[[Part, Tensor], Tensor]] = [
        lambda part, gamma: merged_exactly(part, gamma, case.dtype),
        lambda part, gamma: merged_plainly(part, gamma, combine_sum),
    ]
    for merge in merges:
        runner = Plain(case, merge, case.dtype, together=False)
        runner.step()
        for group, error in group_errors(runner.gradient(), truth).items():
            errors[group] = max(error, errors.get(group, 0.0))
        runner.close()
    return truth, errors


def exact_losses(case: Case) -> tuple[Gradient, dict[str, float]]:
    """Return each task's loss of the plain model in a wider type, and PyTorch's error.

    That is its rounding where that is more: chance makes the error of one number small.
    """
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    losses: list[Gradient] = []
    with torch.no_grad(), no_tf32():
        for dtype in (wide, case.dtype):
            widened = copy.deepcopy(case.plain).to(case.device, dtype)
            pairs = enumerate(zip(case.heads, case.images, strict=True))
            losses.append({f"loss.{task}": plain_loss(widened, head, x.to(dtype)) for task, (head, x) in pairs})
    truth, plain = losses
    rounding = torch.finfo(case.dtype).eps
    return truth, {group: max(error, rounding) for group, error in group_errors(plain, truth).items()}


def distance_gradient(case: Case, dtype: torch.dtype) -> Gradient:
    """Return the gradient of the data-free loss by its definition. Every difference of weights is in memory."""
    settings = case.settings
    total, scale = torch.zeros(case.tasks, dtype=dtype, device=case.device), torch.zeros_like(case.gamma, dtype=dtype)
    for part in case.parts.values():
        if "task_vectors" in part:
            zero, taus = torch.zeros_like(part["weight"], dtype=dtype), part["task_vectors"].to(dtype)
            difference = merged_exactly({**part, "weight": zero}, case.gamma, dtype) - taus
            total = total + difference.flatten(1).square().sum(dim=1)
            scale = scale + taus.flatten(1).square().sum(dim=1)
    values = total / scale if settings.normalize_distance else total
    loss = scalarize(values, case.gamma.to(values), settings.scalarization, settings.mu)
    loss = loss + settings.tensor_norm * low_rank_norm(case.parts, case.gamma, dtype)
    return dict(zip(case.learned, torch.autograd.grad(loss, list(case.learned.values())), strict=True))
