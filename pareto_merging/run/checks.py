"""Whether a run's files belong together, and which encoder they describe. What does not fit is a UserError."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import Checkpoint
from pareto_merging.data.sources import FolderImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.errors import UserError
from pareto_merging.run.config import EncoderConfig


def check_copies(pretrained: Checkpoint, tasks: Mapping[str, Checkpoint]) -> None:
    """Raise UserError for a checkpoint that two tasks have. Or for one of another architecture than the pretrained."""
    files = {name: {path.resolve() for path in checkpoint.weights} for name, checkpoint in tasks.items()}
    for name, checkpoint in tasks.items():
        same = [other for other in tasks if files[other] == files[name]]
        if len(same) > 1:
            expected = f"a checkpoint for each task, got {checkpoint.source} for {', '.join(same)}"
            raise UserError(f"tasks.{name}: expected {expected}")
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


def check_classes(tasks: Mapping[str, Task]) -> None:
    """Raise UserError if a folder of images has another number of classes than the head."""
    for name, task in tasks.items():
        assert isinstance(task.head, ZeroShotHead)
        classes = task.head.weight.shape[0]
        if isinstance(task.images, FolderImages) and len(task.images.classes) != classes:
            expected = f"{classes} sub-folders, one for each class of {name}'s head in its order"
            raise UserError(f"{task.images.root}: expected {expected}, got {len(task.images.classes)}")


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


def first_stated(checkpoints: Sequence[Checkpoint], what: str) -> tuple[Any, str]:
    """Return what the checkpoints say of themselves, and which says it; None: none does. UserError if two differ."""
    first, source = None, ""
    for checkpoint in checkpoints:
        value = getattr(checkpoint, what)
        if first is None and value is not None:
            first, source = value, checkpoint.source
        elif value is not None and value != first:
            raise UserError(f"{checkpoint.source}: expected {what} {first} as {source} says, got {value}")
    return first, source


def describe_encoder(
    architecture: dict[str, Any], config: EncoderConfig, checkpoints: Sequence[Checkpoint]
) -> dict[str, Any]:
    """Return how to build the plain encoder, with QuickGELU as the checkpoints say. UserError if they do not agree."""
    stated, source = first_stated(checkpoints, "heads")
    heads = architecture.get("arguments", {}).get("heads")
    if None not in (heads, stated) and heads != stated:
        raise UserError(f"encoder: expected {stated} attention heads as {source} says, got {heads}")
    stated, source = first_stated(checkpoints, "quick_gelu")
    named = config.architecture is not None and encoders.has_quick_gelu(architecture)
    for key, value in (("quick_gelu", config.quick_gelu), ("architecture", named or None)):
        if None not in (stated, value) and stated != value:
            expected, got = (("QuickGELU" if gelu else "GELU") for gelu in (stated, value))
            raise UserError(f"encoder.{key}: expected {expected} as {source} says, got {got}")
    chosen = config.quick_gelu
    if named and chosen is False:
        raise UserError("encoder.quick_gelu: expected true as the architecture has it, got false")
    return {**architecture, "quick_gelu": bool(stated if chosen is None else chosen) or named}
