"""Traditional multi-task learning on labels: min_W Σ_k γ_k CE_k(W), all weights trained (Caruana 1997).

The upper bound among single models: it needs what merging does without, labelled images of every task and a training
run of the whole encoder. Heads stay frozen, as in the fine-tuning of the individual models. The paper's "multi-task
learning + preference" is one such run per γ.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.data.sources import labelled_stream
from pareto_merging.data.tasks import Task
from pareto_merging.errors import TrainingError, UserError
from pareto_merging.methods.interface import Choice, Copies, Merged, Method, Problem, learning_rates, task_names
from pareto_merging.methods.per_task import to_model
from pareto_merging.model.copies import named_tensors
from pareto_merging.model.stored import PretrainedWeights, copy_of
from pareto_merging.preferences import Preference, check_preference, equal_preference
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar


def merge(
    pretrained: nn.Module,
    finetuned: Copies,
    *,
    training: Mapping[str, Task],
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.05,
    gamma: Preference | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Merged:
    """Train a copy of ``pretrained`` on all tasks together. Of ``finetuned`` only the task names are used.

    AdamW with a linear warm-up over a tenth of the steps and a cosine decay; dropout off and batch-norm statistics
    fixed. Weights are trained in float32 (float64 where ``pretrained`` is), from the pretrained ones as stored, and
    rounded to the dtype of ``pretrained`` once at the end.

    Args:
        training: by task name, labelled images and the frozen head. steps, batch_size: per step, a batch of every task.
        gamma: the tasks' weights in the loss, by default equal.

    Raises:
        ValueError: no labelled images of a task. UserError: a label that its head does not have. TrainingError: a loss
            or a trained parameter that is not finite.
    """
    names = task_names(finetuned)
    missing = [name for name in names if name not in training or not len(training[name].images)]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"training: expected labelled images of every task, got none of {', '.join(missing)}")
    weights = equal_preference(len(names)) if gamma is None else check_preference(gamma, names, per_item=False)
    model = copy_of(pretrained)
    with _wide(model, PretrainedWeights(pretrained)) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        streams = [
            labelled_stream(training[name].images, batch_size, steps, (seed, 3, index))
            for index, name in enumerate(names)
        ]
        heads = [training[name].head for name in names]
        with eval_mode(model, *heads), progress_bar("multi-task training", steps, enabled=progress) as advance:
            for step in range(1, steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _schedule(step, steps)
                losses = []
                for name, weight, batches in zip(names, weights.tolist(), streams, strict=True):
                    loss = weight * _loss(training[name], name, model, *next(batches))
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        what = f"task {name}: the loss of multi-task training is {losses[-1]}"
                        raise TrainingError(f"step {step}, {what}", name, step, "the loss")
                    # a head's own parameters must get no gradient
                    loss.backward(inputs=parameters)
                optimizer.step()
                optimizer.zero_grad()
                advance(step, f"loss {math.fsum(losses):.4f}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"step {steps}: {name} is not finite after multi-task training", None, steps, name)
    return Merged(names, lambda gamma: model)


@contextlib.contextmanager
def _wide(model: nn.Module, as_stored: PretrainedWeights) -> Iterator[list[Tensor]]:
    """Give the parameters to train, in float32 instead of 16 bits. Afterwards they are rounded once."""
    stored = [(tensor, tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
    names_by_tensor = {id(tensor): group for group, tensor in named_tensors(model)}
    for tensor, dtype in stored:
        if dtype in (torch.float16, torch.bfloat16):
            wide = as_stored(names_by_tensor.get(id(tensor), ()), tensor)
            tensor.data = wide.to(tensor.device, torch.float32, copy=True)
    yield [p.requires_grad_(True) for p in model.parameters() if p.is_floating_point()]
    for tensor, dtype in stored:
        tensor.data = tensor.data.to(dtype)


def _loss(task: Task, name: str, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of one task's batch."""
    logits = task.head(model(to_model(images, model)))
    labels = labels.to(logits.device)
    foreign = labels[(labels < 0) | (labels >= logits.shape[-1])]
    if len(foreign):
        expected = f"a label in [0, {logits.shape[-1]}) for every training image"
        raise UserError(f"task {name}: expected {expected}, got {int(foreign[0])}")
    return F.cross_entropy(logits.float(), labels)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, step / max(1.0, 0.1 * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def _run(problem: Problem, choice: Choice) -> Merged:
    method, training = problem.method, problem.training or {}
    own: dict[str, Any] = {"batch_size": method.batch_size, "seed": method.seed, "progress": problem.progress}
    choice = {"steps": method.steps_for(len(problem.task_names)), **choice}
    return merge(problem.pretrained, problem.finetuned, training=training, **own, **choice)


METHOD = Method("multitask", "Multi-task training", "labels", _run, learning_rates(1e-4), is_bound=True, learns=True)
