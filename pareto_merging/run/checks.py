"""Whether a run's files belong together; what does not is a UserError that names it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pareto_merging.checkpoints.checkpoint import Checkpoint
from pareto_merging.data.heads import ZeroShotHead
from pareto_merging.data.sources import FolderImages
from pareto_merging.data.tasks import Task
from pareto_merging.errors import UserError


def check_different(tasks: Mapping[str, Checkpoint]) -> None:
    """Raise UserError if two tasks have one and the same checkpoint file."""
    files = {name: {path.resolve() for path in checkpoint.weights} for name, checkpoint in tasks.items()}
    for name, checkpoint in tasks.items():
        same = [other for other in tasks if files[other] == files[name]]
        if len(same) > 1:
            raise UserError(
                f"tasks.{name}: expected a checkpoint for each task, got {checkpoint.source} for {', '.join(same)}"
            )


def check_copies(pretrained: Checkpoint, tasks: Mapping[str, Checkpoint]) -> None:
    """Raise UserError naming a task whose checkpoint is of another architecture than the pretrained one."""
    for name, checkpoint in tasks.items():
        if checkpoint.architecture is None or pretrained.architecture is None:
            continue
        expected, got = (
            f"{a.width} wide, {a.layers} layers, {a.image_size} px in patches of {a.patch_size}"
            for a in (pretrained.architecture, checkpoint.architecture)
        )
        if got != expected:
            what = f"expected a fine-tuned copy of the pretrained model ({expected}), got {checkpoint.source} ({got})"
            raise UserError(f"tasks.{name}: {what}")
        if pretrained.architecture.output_dim is None and checkpoint.architecture.output_dim is not None:
            what = f"expected a projection, as {checkpoint.source} has, got a vision model without"
            raise UserError(f"{pretrained.source}: {what} (give the whole CLIP)")


def check_classes(name: str, task: Task, head: ZeroShotHead) -> None:
    """Raise UserError if a folder of images has another number of classes than the head."""
    classes = head.weight.shape[0]
    if isinstance(task.images, FolderImages) and len(task.images.classes) != classes:
        raise UserError(
            f"{task.images.root}: expected {classes} sub-folders, one for each class of {name}'s head in its order, "
            f"got {len(task.images.classes)}"
        )


def check_tensors(path: Path | str, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError naming the tensors of ``path`` that are missing, extra or of another shape."""
    problems = [f"lacks {name}" for name in expected if name not in shapes]
    problems += [f"has an extra {name}" for name in shapes if name not in expected]
    problems += [
        f"has {name} of shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: is not of the encoder's architecture: it {'; it '.join(problems[:5])}{more}")
