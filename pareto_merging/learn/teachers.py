"""What the fine-tuned models say of each image: kept, or asked in every step.

A fine-tuned model is needed once per image, one after another, and is not in memory while the merged model learns:
what stays is its outputs in float16, [images, classes] of each task.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors, write_tensors
from pareto_merging.data.sources import images_in_order
from pareto_merging.data.tasks import NoHead, Task
from pareto_merging.errors import UserError
from pareto_merging.learn.distillation import ask, needs_head, outputs_of
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.copies import Weights
from pareto_merging.model.digests import TensorDigest, tensor_digest
from pareto_merging.model.experts import Expert, experts_of, named_experts
from pareto_merging.model.state import pareto_state
from pareto_merging.system.modes import eval_mode
from pareto_merging.system.progress import progress_bar

TEACHERS_NAME, FORMAT = "teachers.safetensors", "pareto-teachers"
# what outputs are kept in
KEPT_DTYPE = torch.float16
# images read twice: an augmentation may leave one as it is
_LOOKS = 16
# share of the highest entropy above which a teacher is called unsure
UNSURE = 0.6


def with_teachers(
    model: nn.Module,
    tasks: Mapping[str, Task],
    settings: MethodSettings,
    finetuned: Sequence[Weights] | Mapping[str, Weights] | None = None,
    *,
    folder: Path | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Task]:
    """Return the tasks, each with a teacher. Its own where it has one, else its fine-tuned model.

    Args:
        model: a Pareto model. tasks: by name, in its order.
        finetuned: the copies that :func:`parametrize` was given; None: W0 + τ_k, where that is the fine-tuned model.
        folder: where the outputs are kept for a run that goes on, in ``teachers.safetensors``. What is there is used
            where it is of the same models, heads and images (their number, and sixteen of them).

    Raises:
        ValueError: no copies where the model does not hold them; a task without a head where logits are compared.
        UserError: outputs that are not finite, of another width than the merged model's, or of other images.
    """
    if needs_head(settings.loss):
        for name, task in tasks.items():
            if isinstance(task.head, NoHead):
                hint = "(the objective features compares without one)"
                raise ValueError(f"tasks: expected a head for {name}, got none {hint}")
    tasks = dict(tasks)
    in_step = {name for name, task in tasks.items() if task.teacher is None and _is_asked_in_step(task, settings)}
    if in_step:
        if finetuned is None:
            fixed = settings.loss.teacher_outputs == "in-step"
            why = "teacher_outputs is in-step" if fixed else "they differ each time they are read"
            whose = f"images of {', '.join(sorted(in_step))} in every step ({why})"
            raise ValueError(f"finetuned: expected the fine-tuned copies, to ask them about the {whose}, got none")
        for name, one in named_experts(model, finetuned).items():
            if name in in_step:
                tasks[name] = replace(tasks[name], teacher=one)
    lacking = [name for name, task in tasks.items() if task.teacher is None]
    if lacking:
        tasks |= _kept(
            model, {name: tasks[name] for name in lacking}, settings, finetuned, folder, batch_size, progress
        )
    _check_widths(model, tasks, settings)
    return tasks


def _count(task: Task) -> int:
    return len(task.images)  # type: ignore[arg-type]


def _is_asked_in_step(task: Task, settings: MethodSettings) -> bool:
    """Tell if a task's teacher is asked in every step. As the settings say, or where an image read twice differs."""
    if settings.loss.teacher_outputs != "auto":
        return settings.loss.teacher_outputs == "in-step"
    count = min(_LOOKS, _count(task))
    once, again = (torch.cat(list(images_in_order(task.images, count, count))) for _ in range(2))
    return not torch.equal(once, again)


def _kept(
    model: nn.Module,
    tasks: Mapping[str, Task],
    settings: MethodSettings,
    finetuned: Sequence[Weights] | Mapping[str, Weights] | None,
    folder: Path | None,
    batch_size: int,
    progress: bool,
) -> dict[str, Task]:
    """Return the tasks with their fine-tuned models' outputs, read from the folder or computed."""
    identity = _identity(model, tasks, settings)
    # without digests nothing says which models a file is of
    path = None if folder is None or not pareto_state(model).digests else folder / TEACHERS_NAME
    outputs = {} if path is None else _read(path, identity, tasks)
    if not outputs:
        total = sum(_count(task) for task in tasks.values())
        done = 0
        with progress_bar("asking the fine-tuned models", total, enabled=progress) as advance:
            for name, module in experts_of(model, finetuned, tasks):
                outputs[name] = teacher_outputs(module, tasks[name], settings, batch_size)
                # before it is on disk
                _check(name, tasks[name], outputs[name])
                done += len(outputs[name])
                advance(done, name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, outputs, {"format": FORMAT, "identity": identity})
    device = next(model.parameters()).device
    return {name: replace(task, teacher=outputs[name].to(device)) for name, task in tasks.items()}


@torch.no_grad()
def teacher_outputs(module: nn.Module, task: Task, settings: MethodSettings, batch_size: int = 256) -> Tensor:
    """Return what a model says of every image of a task. float16 [images, C + D], on the CPU.

    In eval mode. C classes where logits are compared, D features where those are.
    """
    first = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    rows = []
    with eval_mode(module, task.head):
        for images in images_in_order(task.images, batch_size):
            placed = images.to(first.device, first.dtype if images.is_floating_point() else None)
            rows.append(outputs_of(module(placed), task.head, settings.loss).joined().float().cpu())
    outputs = torch.cat(rows)
    narrow = outputs.to(KEPT_DTYPE)
    # logits beyond what 16 bits hold
    return narrow if bool((torch.isfinite(narrow) == torch.isfinite(outputs)).all()) else outputs


def _identity(model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> dict[str, Any]:
    """Return what kept outputs must agree on."""
    digests = pareto_state(model).digests
    about = {name: {"weights": digests.get(name, ""), **task_identity(task)} for name, task in tasks.items()}
    loss = settings.loss
    kind = [loss.objective == "features" or loss.features_weight > 0, needs_head(loss)]
    return {"tasks": about, "features and logits": kind}


def task_identity(task: Task) -> dict[str, Any]:
    """Return what tells a task from one with another head or other images.

    Plain JSON. Of the images their number and the digest of sixteen spread evenly; none where they differ when read
    twice.
    """
    head, size = TensorDigest(), _count(task)
    for key, tensor in task.head.state_dict().items():
        if isinstance(tensor, Tensor):
            head.add(key, tensor)
    spread = Subset(task.images, sorted({round(at * (size - 1) / (_LOOKS - 1)) for at in range(_LOOKS)}))
    samples = [tensor_digest(torch.cat(list(images_in_order(spread, _LOOKS)))) for _ in range(2)]
    sample = samples[0] if samples[0] == samples[1] else ""
    scale = getattr(task.head, "logit_scale", None)
    scale = scale if isinstance(scale, float) else None
    return {"head": head.hexdigest(), "scale": scale, "images": size, "sample": sample}


def _read(path: Path, identity: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Tensor]:
    """Return what a folder has kept. Nothing where it is of other models, heads or images, or damaged."""
    if not path.exists():
        return {}
    try:
        metadata = read_metadata(path)
        same = metadata.get("format") == FORMAT and json.loads(metadata.get("identity", "null")) == identity
        outputs = read_tensors(path) if same else {}
        for name, task in tasks.items():
            _check(name, task, outputs[name])
        return outputs
    except (UserError, ValueError, KeyError):
        return {}


def _check(name: str, task: Task, outputs: Tensor) -> None:
    """Raise UserError unless there are finite numbers for each image of a task."""
    size = _count(task)
    if outputs.ndim != 2 or len(outputs) != size or not outputs.is_floating_point():
        got = f"{list(outputs.shape)} {outputs.dtype}"
        raise UserError(f"task {name}: expected a teacher's outputs [{size}, *], one row for each image, got {got}")
    finite = torch.isfinite(outputs).all(dim=1)
    if not bool(finite.all()):
        which = int((~finite).nonzero()[0])
        raise UserError(
            f"task {name}: expected finite outputs of its fine-tuned model, got NaN or inf for image {which} "
            f"({int((~finite).sum())} of {size})"
        )


@torch.no_grad()
def _check_widths(model: nn.Module, tasks: Mapping[str, Task], settings: MethodSettings) -> None:
    """Raise UserError for a teacher whose outputs are not as wide as the model's."""
    first = next(model.parameters())
    for name, task in tasks.items():
        teacher, loss = task.teacher, settings.loss
        # what reads its copies has their architecture
        if isinstance(teacher, Expert) or teacher is None:
            continue
        if isinstance(teacher, Tensor):
            _check(name, task, teacher)
        image = next(images_in_order(task.images, 1, 1))
        image = image.to(first.device, first.dtype if image.is_floating_point() else None)
        with eval_mode(model, task.head):
            width = outputs_of(model(image), task.head, loss).joined().shape[1]
            try:
                got = list((teacher if isinstance(teacher, Tensor) else ask(teacher, image, task.head, loss)).shape)
            except Exception as error:
                # a module of the caller's may fail in any way
                reason = " ".join(str(error).split())
                kind = type(teacher).__name__
                raise UserError(
                    f"task {name}: expected a teacher of this task's images, got {kind}: {reason}"
                ) from error
        if got[1:] != [width]:
            expected = f"{width} outputs for an image, as many as the merged model has"
            raise UserError(f"task {name}: expected a teacher of {expected}, got {list(got[1:])}")


def describe_teachers(
    tasks: Mapping[str, Task], settings: MethodSettings, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return what the log says of the teachers. Warn of those whose predictions say little.

    One that is nearly uniform, or puts nearly all images into few classes, knows its task badly or was given another
    task's images: what it teaches is learned all the same.
    """
    about: dict[str, Any] = {}
    for name, task in tasks.items():
        entry: dict[str, Any] = {"images": _count(task)}
        about[name] = entry
        if not isinstance(task.teacher, Tensor):
            entry["outputs"] = "in-step"
            continue
        entry |= {"outputs": "cached", "bytes": task.teacher.nbytes}
        classes = _classes(task, settings)
        if not classes:
            continue
        predictions = torch.softmax(task.teacher[:, :classes].double(), dim=1)
        entropy = float(torch.special.entr(predictions).sum(dim=1).mean())
        mean_entropy = float(torch.special.entr(predictions.mean(dim=0)).sum())
        entry |= {"classes": classes, "entropy": round(entropy, 4), "mean_prediction_entropy": round(mean_entropy, 4)}
        highest, reachable = math.log(max(2, classes)), math.log(max(2, min(classes, len(task.teacher))))
        if entropy > UNSURE * highest:
            warn(
                f"task {name}: its fine-tuned model is unsure of these images (entropy {entropy:.2f} of at most "
                f"{highest:.2f}); are they this task's?"
            )
        elif mean_entropy < settings.log.collapse_threshold * reachable:
            warn(
                f"task {name}: its fine-tuned model puts most of these images into few classes (entropy of its mean "
                f"prediction {mean_entropy:.2f} of at most {reachable:.2f}); are they this task's?"
            )
    return [{"event": "teachers", "tasks": about}]


def _classes(task: Task, settings: MethodSettings) -> int:
    """Return how many of a teacher's outputs are logits."""
    if not needs_head(settings.loss):
        return 0
    assert isinstance(task.teacher, Tensor)
    weight = getattr(task.head, "weight", None)
    if settings.loss.objective == "distillation" and not settings.loss.features_weight:
        return task.teacher.shape[1]
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0
