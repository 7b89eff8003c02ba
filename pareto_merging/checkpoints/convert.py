"""A checkpoint of any format becomes one plain safetensors file. It has open_clip's names and what is known of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.heads import find_head
from pareto_merging.checkpoints.safetensors import write_tensors
from pareto_merging.errors import UserError
from pareto_merging.system.progress import progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_checkpoint(
    source: str | Path, target: Path, *, dtype: torch.dtype | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write the vision encoder or zero-shot head of any checkpoint to a safetensors file, atomically.

    The header keeps how to build the encoder, how its images are made, where it came from, and a checksum of every
    tensor, which is compared when it is read again.

    Args:
        source: as for :func:`.checkpoint.open_checkpoint`. dtype: of the numbers written; default: as they are.

    Returns:
        What was found: ``kind`` (encoder or head), ``format``, ``tensors``, ``numbers``, ``encoder``, ``text``…

    Raises:
        UserError: the checkpoint cannot be read, or is not a CLIP vision transformer; then nothing is written.
    """
    path = Path(source)
    head = find_head(path)
    if head is not None:
        _check_target(target, [path])
        weight, scale, origin = head
        weight = _rounded(weight, dtype, f"{source}: weight")
        write_tensors(target, {"weight": weight}, {"logit_scale": repr(scale), "source": origin})
        facts = {"kind": "head", "classes": weight.shape[0], "dim": weight.shape[1], "logit_scale": scale}
        return {"source": str(source), "target": str(target), **facts}
    checkpoint = open_checkpoint(source)
    _check_target(target, checkpoint.files)
    tensors: dict[str, Tensor] = {}
    with progress_bar("converting", len(checkpoint), enabled=progress) as advance:
        for number, name in enumerate(checkpoint, start=1):
            tensors[name] = _rounded(checkpoint[name], dtype, f"{source}: {name}")
            advance(number, name)
    metadata = {
        "format": "pt",
        "encoder": checkpoint.encoder or {},
        **({} if checkpoint.preprocessing is None else {"preprocessing": checkpoint.preprocessing}),
        "source": path.name if path.exists() else str(source),
        "source_format": checkpoint.format,
        # converted once more, it is still made from what it was
        **checkpoint.origin,
    }
    write_tensors(target, tensors, metadata)
    return {
        "kind": "encoder",
        "source": str(source),
        "target": str(target),
        "format": checkpoint.format,
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
        "encoder": checkpoint.encoder,
        "preprocessing": checkpoint.preprocessing,
        "projection": "proj" in checkpoint,
        "text_tower": bool(checkpoint.text),
    }


def _check_target(target: Path, files: Sequence[Path]) -> None:
    if target.exists() and any(target.samefile(file) for file in files):
        raise UserError(f"{target}: expected another file than the one that is read")


def _rounded(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    rounded = tensor if dtype is None else tensor.to(dtype)
    if dtype is not None and not bool(torch.isfinite(torch.stack(torch.aminmax(rounded))).all()):
        raise UserError(f"{name}: expected numbers that {str(dtype).removeprefix('torch.')} can hold, got larger ones")
    return rounded


def say(facts: Mapping[str, Any]) -> str:
    """Say in one or two lines what :func:`convert_checkpoint` did."""
    if facts["kind"] == "head":
        what = "a zero-shot head of {classes} classes, {dim} features, logit scale {logit_scale:.4g}"
        return f"{facts['target']}: {what.format(**facts)}"
    encoder = facts["encoder"]
    sizes = "{width}-wide, {layers} layers, {image_size} px"
    name = encoder.get("architecture") or sizes.format(**encoder["arguments"])
    gelu = {True: "QuickGELU", False: "GELU", None: "GELU or QuickGELU (the checkpoint does not say)"}
    lines = [f"{facts['target']}: {name}, {gelu[encoder['quick_gelu']]}, {facts['numbers']:,} numbers"]
    lines += [] if facts["projection"] else ["no projection in it: the pretrained model's is used"]
    lines += ["its text tower was left out"] if facts["text_tower"] else []
    return "; ".join(lines)
