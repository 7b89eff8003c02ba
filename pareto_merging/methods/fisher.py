"""Fisher merging: entries averaged with the Fisher information of each model.

Matena & Raffel, NeurIPS 2022: W = Σ_k F_k W_k / Σ_k F_k, entry by entry (their equation 4 with λ_k = 1), where F_k is
the diagonal of the Fisher information of the k-th fine-tuned model with its head on its task's images:

    F_k = mean over images x of E_{y ~ p(y|x)} (d log p(y|x) / dW)²

The floor and the division by ‖F_k‖₂ over all parameters come from the published code of MergeLM and FusionBench, and
we differ from it in two things. It squares the gradient of a sum, of √p(y|x)·log p(y|x) over classes and a batch, whose
cross terms are no Fisher information; we square the gradient of one image and one class at a time. And it adds the
floor before it divides, so that an entry to which no model is sensible leans to the model with the smallest ‖F_k‖; we
add it after, and such an entry gets the average.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, on_images, one_model
from pareto_merging.methods.per_task import check_number, chosen_images, each_finetuned, image_of, to_model
from pareto_merging.methods.streaming import merge_tensors
from pareto_merging.model.copies import check_copies
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar

Labels: TypeAlias = Literal["expected", "sampled", "given"]


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    tasks: Mapping[str, Task],
    labels: Labels = "sampled",
    floor: float = 1e-6,
    normalize: bool = True,
    images: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Merged:
    """Return the Fisher-merged model. Buffers, and parameters that no forward uses, get the average.

    Beside the models (pretrained, K copies, result) there are at most three more in float32: F_k, Σ F_k W_k and Σ F_k;
    and a fourth in the storage dtype: a working copy with the weights of task k. The result comes after F_k and the
    working copy are gone.

    Args:
        tasks: by task name, unlabelled images and the frozen head. labels, images, seed: see :func:`diagonal_fisher`.
        floor: added to each F_k (after the division); 0 leaves it out, and where all F_k are 0 the average is taken.
        normalize: divide F_k by its L2 norm over all parameters, so that no task outweighs the others by its scale
            (an F_k of 0 everywhere stays).

    Raises:
        ValueError: as :func:`parametrize`; tasks that do not match the copies; a task without images, or labels.
        UserError: logits or gradients that are not finite, naming the task.
    """
    floor = check_number("floor", floor)
    _check_labels(labels)
    how = {"labels": labels, "images": images, "seed": seed, "progress": progress}
    numerator, denominator, norms = _sums(pretrained, finetuned, tasks, floor, normalize, **how)

    def piece(name: str, place: int, base: Tensor, taus: Tensor) -> Tensor:
        average = base + taus.mean(dim=0)
        if name not in denominator:
            return average
        total = denominator[name].view(-1)[place : place + len(base)]
        weighted = numerator[name].view(-1)[place : place + len(base)] / total
        return torch.where(total > 0, weighted, average)

    return one_model(merge_tensors(pretrained, finetuned, piece), finetuned, fisher_norms=norms)


def _sums(
    pretrained: nn.Module, finetuned: Copies, tasks: Mapping[str, Task], floor: float, normalize: bool, **how: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Return Σ F_k W_k and Σ F_k by each parameter's first name, and the ‖F_k‖."""
    numerator: dict[str, Tensor] = {}
    denominator: dict[str, Tensor] = {}
    norms = []
    copies, _ = check_copies(pretrained, finetuned)
    for task, model, tensors in each_finetuned(pretrained, finetuned, tasks):
        fisher = diagonal_fisher(model, tasks[task], name=f"task {task}", **how)
        norm = math.hypot(*(float(torch.linalg.vector_norm(f, dtype=torch.float64)) for f in fisher.values()))
        norms.append(norm)
        for names, _ in tensors:
            known = next((name for name in names if name in fisher), None)
            if known is None:
                continue
            f = fisher.pop(known)
            if normalize and norm:
                f /= norm
            f += floor
            if names[0] not in denominator:
                numerator[names[0]], denominator[names[0]] = torch.zeros_like(f), torch.zeros_like(f)
            denominator[names[0]] += f
            # as stored: the working copy has them in its own dtype
            value = next(copies[task][name] for name in names if name in copies[task]).detach()
            numerator[names[0]] += f.mul_(value.to(f))
    return numerator, denominator, norms


def diagonal_fisher(
    model: nn.Module,
    task: Task,
    *,
    labels: Labels = "sampled",
    images: int = 256,
    seed: int = 0,
    progress: bool = True,
    name: str = "the task",
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of ``task.head(model(image))``, one forward per image.

    Args:
        model: any module, run in eval mode on batches of one image; weights, mode, gradients and flags stay.
        task: images, and the head that maps features to logits [1, C]. name: what to call it in errors.
        labels: ``expected``: the exact expectation over the C classes, C backward passes per image. ``sampled``: one
            y ~ p(y|x) per image, drawn on the CPU from ``seed``, the same on all devices up to the rounding of p.
            ``given``: the dataset's labels, (image, label) pairs; this is the empirical Fisher.
        images: how many, the first of a permutation of the dataset seeded with ``seed``; all if there are fewer.

    Returns:
        By the name of each floating-point parameter (tied ones once), its F in float32 (float64 for float64), on its
        device; 0 for one that no forward uses. Gradients are as precise as the model's dtype.

    Raises:
        ValueError: no images; with ``given``, an image without label. UserError: logits or F not finite. All name the
        task.
    """
    _check_labels(labels)
    indices = chosen_images(task.images, images, seed, name)
    uniform = torch.rand(len(indices), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64)
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    fisher = {
        n: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for n, p in parameters.items()
    }
    with (
        torch.enable_grad(),
        eval_mode(model, task.head),
        _squared_gradients(parameters, fisher) as add_squares,
        progress_bar(f"Fisher of {name}", len(indices), enabled=progress) as advance,
    ):
        for step, index in enumerate(indices):
            item = task.images[index]
            log_p = _log_probabilities(task, model, image_of(item), name)
            p = log_p.detach().double().exp().cpu()
            if labels == "expected":
                chosen = [(c, weight) for c, weight in enumerate(p.tolist()) if weight > 0]
            elif labels == "sampled":
                drawn = int(torch.searchsorted(p.cumsum(0), uniform[step], right=True))
                chosen = [(min(drawn, len(p) - 1), 1.0)]
            else:
                chosen = [(_label_of(item, len(p), name), 1.0)]
            for number, (c, weight) in enumerate(chosen, start=1):
                add_squares(log_p[c], weight / len(indices), number < len(chosen))
            advance(step + 1, "")
    for parameter, f in fisher.items():
        if not bool(torch.isfinite(f).all()):
            raise UserError(f"{name}: expected finite gradients, got NaN or inf in the squares of {parameter}'s")
    return fisher


def _log_probabilities(task: Task, model: nn.Module, image: Tensor, name: str) -> Tensor:
    """Return log p [C] of one image, with its graph."""
    logits = task.head(model(to_model(image[None], model)))
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"{name}: expected logits of shape [1, classes], got {list(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"{name}: expected finite logits, got NaN or inf (are the images finite?)")
    return torch.log_softmax(logits[0].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


@contextlib.contextmanager
def _squared_gradients(parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Iterator[Any]:
    """Give ``add(value, weight, keep_graph)``, which adds weight·(d value / d parameter)² to ``sums``.

    Each gradient is squared and freed as soon as it is complete, so that there is never a whole model of them.
    """
    before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    handles = []
    scale = 0.0

    def square(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        wide = (gradient.to_dense() if gradient.layout != torch.strided else gradient).to(sums[name].dtype)
        with torch.no_grad():
            sums[name].addcmul_(wide, wide, value=scale)

    def add(value: Tensor, weight: float, keep_graph: bool) -> None:
        nonlocal scale
        scale = weight
        if parameters and value.requires_grad:
            # inputs: a head's own parameters must get no gradient
            value.backward(inputs=list(parameters.values()), retain_graph=keep_graph)

    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: square(name, p)))
        yield add
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, gradient in before:
            parameter.grad = gradient
            parameter.requires_grad_(flag)


def _label_of(item: Any, classes: int, name: str) -> int:
    label = int(item[1]) if isinstance(item, tuple | list) else -1
    if not 0 <= label < classes:
        raise UserError(f'{name}: expected a label in [0, {classes}) for every image with labels="given", got {label}')
    return label


def _check_labels(labels: Any) -> None:
    if labels not in ("expected", "sampled", "given"):
        raise ValueError(f"labels: expected expected, sampled or given, got {labels!r}")


def _choices(tasks: int, method: MethodSettings) -> list[Choice]:
    settings = ((True, 1e-6), (False, 1e-6), (True, 1e-4), (True, 1e-8))
    return [{"normalize": normalize, "floor": floor} for normalize, floor in settings]


METHOD = Method("fisher", "Fisher merging", "images", on_images(merge), _choices)
