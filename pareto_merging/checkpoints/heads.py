"""Class embeddings and scales of zero-shot heads are read from files of any format or pickled modules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints.archives import open_archive
from pareto_merging.checkpoints.contents import WEIGHT_DTYPES, NamedTensors
from pareto_merging.checkpoints.formats import format_of
from pareto_merging.checkpoints.modules import ArchivedTensors, walk_modules
from pareto_merging.checkpoints.records import Record, StoredTensor
from pareto_merging.errors import UserError


def open_head(source: str | Path, name: str = "weight") -> tuple[Tensor, float]:
    """Read a zero-shot head as (weight [classes, dim], logit scale).

    A safetensors file, or one of a registered format, holds tensor ``weight`` (or ``name``, the task's) and
    ``logit_scale`` in its metadata (100 where it says none). A pickled head of the task-vectors release (``head_<Dataset>Val.pt``) has class embeddings times
    exp(logit_scale) as rows, normalises its input and has no bias: its rows come with length 1, in float32.

    Raises:
        UserError: no such file or tensor, not a matrix of finite numbers, or no head of that release.
    """
    path = Path(source)
    format = format_of(path)
    return _pickled_head(path) if format.open is ArchivedTensors else _stored_head(path, format.open(path), name)


def metadata_of(tensors: NamedTensors) -> Mapping[str, Any]:
    """Return the metadata of an opened file. It is empty for a format that has none."""
    return getattr(tensors, "metadata", {})


def _stored_head(path: Path, file: NamedTensors, name: str) -> tuple[Tensor, float]:
    own_name = name if name in file.shapes else "weight"
    if own_name not in file.shapes:
        names = ", ".join(sorted(file.shapes)) or "none"
        raise UserError(f"{path}: expected a tensor named weight or {name}, got {names}")
    weight, scale = file.read(own_name), metadata_of(file).get("logit_scale", "100")
    try:
        if "logit_scale" in file.shapes:
            raise ValueError("logit_scale: expected it in the metadata, got a tensor")
        if not weight.is_floating_point():
            raise ValueError(f"weight: expected floating-point numbers, got {weight.dtype}")
        if not 0 < float(scale) < float("inf"):
            raise ValueError(f"logit_scale: expected a positive number, got {scale}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("weight: expected finite numbers, got NaN or inf")
        if weight.ndim != 2 or not len(weight):
            raise ValueError(f"weight: expected shape [classes, dim], got {list(weight.shape)}")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return weight, float(scale)


def _pickled_head(path: Path) -> tuple[Tensor, float]:
    archive = open_archive(path)
    root = archive.root
    heads = [
        record
        for _, record in (walk_modules(root, str(path)) if isinstance(root, Record) else ())
        if record.type.name.rpartition(".")[2] == "ClassificationHead"
    ]
    parameters = heads[0].state.get("_parameters") if len(heads) == 1 else {}
    parameters = parameters if isinstance(parameters, dict) else {}
    weight = parameters.get("weight")
    if not isinstance(weight, StoredTensor) or len(weight.shape) != 2 or 0 in weight.shape:
        raise UserError(f"{path}: expected one ClassificationHead with a weight [classes, dim], got none")
    if weight.dtype not in WEIGHT_DTYPES:
        raise UserError(f"{path}: expected floating-point numbers, got {weight.dtype}")
    if heads[0].state.get("normalize") is not True:
        raise UserError(f"{path}: expected a head that normalises the features, got one that does not")
    bias = parameters.get("bias")
    if isinstance(bias, StoredTensor) and bool(archive.tensor(bias).any()):
        raise UserError(f"{path}: expected a head without a bias (a zero-shot head), got one with a bias")
    rows = archive.tensor(weight).float()
    lengths = rows.norm(dim=1)
    if not bool(torch.isfinite(rows).all()) or not bool((lengths > 0).all()):
        raise UserError(f"{path}: expected finite rows that are not zero, got others")
    scale = lengths.mean()
    if not bool(torch.allclose(lengths, scale, rtol=1e-2, atol=0.0)):
        least, most = float(lengths.min()), float(lengths.max())
        raise UserError(f"{path}: expected rows of one length (logit_scale), got {least:.4g} to {most:.4g}")
    return rows / lengths[:, None], float(scale)


def is_head(path: Path) -> bool:
    """Return whether a file is a pickled ClassificationHead. False stands for what cannot be read at all, too."""
    try:
        root = open_archive(path).root if format_of(path).open is ArchivedTensors else None
    except UserError:
        return False
    return isinstance(root, Record) and root.type.name.rpartition(".")[2] == "ClassificationHead"
