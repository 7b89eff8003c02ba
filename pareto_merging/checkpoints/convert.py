"""Any checkpoint as one plain safetensors file: the vision encoder in open_clip's names, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints.files import checksum, write_tensors
from pareto_merging.checkpoints.readers import is_head, open_checkpoint, open_head
from pareto_merging.progress import progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_checkpoint(
    source: str | Path, target: Path, *, dtype: torch.dtype | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write the vision encoder, or the zero-shot head, of any checkpoint to a safetensors file, atomically.

    The header keeps how to build the encoder, how its images are made, where it came from, and a checksum of every
    tensor, which is compared when it is read again.

    Args:
        source: as for :func:`pareto_merging.checkpoints.readers.open_checkpoint`. dtype: of the numbers written;
            default: as they are.

    Returns:
        What was found: ``kind`` (encoder or head), ``format``, ``tensors``, ``numbers``, ``encoder``, ``text``…

    Raises:
        UserError: the checkpoint cannot be read, or is not a CLIP vision transformer; then nothing is written.
    """
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors" and is_head(path):
        weight, scale = open_head(path)
        weight = weight if dtype is None else weight.to(dtype)
        metadata = {"logit_scale": repr(scale), "source": path.name, "checksums": {"weight": checksum(weight)}}
        write_tensors(target, {"weight": weight}, metadata)
        found = {"kind": "head", "classes": weight.shape[0], "dim": weight.shape[1], "logit_scale": scale}
        return {"source": str(source), "target": str(target), **found}
    checkpoint = open_checkpoint(source)
    tensors: dict[str, Tensor] = {}
    with progress_bar("converting", len(checkpoint), enabled=progress) as advance:
        for number, name in enumerate(checkpoint, start=1):
            tensor = checkpoint[name]
            tensors[name] = tensor if dtype is None else tensor.to(dtype)
            advance(number, name)
    metadata = {
        "format": "pt",
        "encoder": checkpoint.encoder or {},
        **({} if checkpoint.preprocessing is None else {"preprocessing": checkpoint.preprocessing}),
        "source": path.name if path.exists() else str(source),
        "source_format": checkpoint.format,
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
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


def say(found: Mapping[str, Any]) -> str:
    """What :func:`convert_checkpoint` found, for a reader, in one or two lines."""
    if found["kind"] == "head":
        return (
            f"{found['target']}: a zero-shot head of {found['classes']} classes, {found['dim']} features, "
            f"logit scale {found['logit_scale']:.4g}"
        )
    encoder = found["encoder"]
    name = encoder.get("architecture") or "{width}-wide, {layers} layers, {image_size} px".format(
        **encoder["arguments"]
    )
    gelu = {True: "QuickGELU", False: "GELU", None: "GELU or QuickGELU (the checkpoint does not say)"}
    lines = [f"{found['target']}: {name}, {gelu[encoder['quick_gelu']]}, {found['numbers']:,} numbers"]
    if not found["projection"]:
        lines.append("no projection in it: the pretrained model's is used")
    if found["text_tower"]:
        lines.append("its text tower was left out")
    return "; ".join(lines)
