"""Class embeddings and scales of zero-shot heads are read from any format, or pickled modules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints.archives import open_archive
from pareto_merging.checkpoints.contents import WEIGHT_DTYPES
from pareto_merging.checkpoints.formats import format_of
from pareto_merging.checkpoints.modules import ArchivedTensors, walk_modules
from pareto_merging.checkpoints.records import Record, StoredTensor
from pareto_merging.checkpoints.tensors import NamedTensors
from pareto_merging.errors import UserError, user_errors


def open_head(source: str | Path, name: str = "weight") -> tuple[Tensor, float]:
    """Read a zero-shot head as (weight [classes, dim], logit scale).

    A safetensors file, or one of a format of one's own, holds tensor ``weight`` (or ``name``, the task's), and
    ``logit_scale`` in its metadata (100 where it says none). A pickled head of the task-vectors release
    (``head_<Dataset>Val.pt``) has class embeddings times exp(logit_scale) as rows, normalises its input and has no
    bias: its rows come with length 1, in float32.

    Raises UserError: no such file or tensor, not a matrix of finite numbers, or no head of that release.
    """
    path = Path(source)
    format = format_of(path)
    return _pickled_head(path) if format.open is ArchivedTensors else _stored_head(path, format.open(path), name)


def _metadata(tensors: NamedTensors) -> Mapping[str, Any]:
    return getattr(tensors, "metadata", {})


def _stored_head(path: Path, file: NamedTensors, name: str) -> tuple[Tensor, float]:
    own_name = name if name in file.shapes else "weight"
    if own_name not in file.shapes:
        names = ", ".join(sorted(file.shapes)) or "none"
        raise UserError(f"{path}: expected a tensor named weight or {name}, got {names}")
    weight, scale = file.read(own_name), _metadata(file).get("logit_scale", "100")
    with user_errors(str(path)):
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
    return weight, float(scale)


def _is_head(root: Any) -> bool:
    return isinstance(root, Record) and root.type.name.rpartition(".")[2] == "ClassificationHead"


def _pickled_head(path: Path) -> tuple[Tensor, float]:
    archive = open_archive(path)
    heads = [record for _, record in walk_modules(archive.root, str(path)) if _is_head(record)]
    parameters = heads[0].state.get("_parameters") if len(heads) == 1 else {}
    parameters = parameters if isinstance(parameters, dict) else {}
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not isinstance(weight, StoredTensor) or len(weight.shape) != 2 or 0 in weight.shape:
        raise UserError(f"{path}: expected one ClassificationHead with a weight [classes, dim], got none")
    if weight.dtype not in WEIGHT_DTYPES:
        raise UserError(f"{path}: expected floating-point numbers, got {weight.dtype}")
    if heads[0].state.get("normalize") is not True:
        raise UserError(f"{path}: expected a head that normalises the features, got one that does not")
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


def find_head(path: Path) -> tuple[Tensor, float, str] | None:
    """Read a file that is a zero-shot head alone, and what it was made from. None stands for every other file."""
    if not path.is_file():
        return None
    format = format_of(path)
    if format.open is not ArchivedTensors:
        file = format.open(path)
        if set(file.shapes) != {"weight"} or "logit_scale" not in _metadata(file):
            return None
        return *_stored_head(path, file, "weight"), _metadata(file).get("source", path.name)
    try:
        root = open_archive(path).root
    except UserError:
        # whoever reads it as an encoder says what is wrong
        return None
    return (*_pickled_head(path), path.name) if _is_head(root) else None
