"""Zero-shot heads: frozen class embeddings that turn an encoder's features into logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.checkpoints.readers import is_safetensors, open_head
from pareto_merging.errors import UserError
from pareto_merging.system.files import SafetensorsFile


class ZeroShotHead(nn.Module):
    """logits = scale · normalise(features) · weightᵀ: features [n, dim] -> [n, classes], weight [classes, dim].

    The rows of ``weight`` are normalised here; nothing is trained.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, logit_scale: float = 100.0) -> None:
        super().__init__()
        if weight.ndim != 2 or not len(weight):
            raise ValueError(f"weight: expected shape [classes, dim], got {list(weight.shape)}")
        self.register_buffer("weight", F.normalize(weight.float(), dim=-1))
        self.logit_scale = float(logit_scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale * F.normalize(features.float(), dim=-1) @ self.weight.float().t()

    def extra_repr(self) -> str:
        return f"classes={self.weight.shape[0]}, dim={self.weight.shape[1]}, logit_scale={self.logit_scale:g}"


def read_head(path: str | Path, name: str = "weight") -> ZeroShotHead:
    """A head from a safetensors file: tensor ``weight`` (or the task's name) [classes, dim], metadata ``logit_scale``
    (100 where it says none); or from a pickled one of the task-vectors release (``head_<Dataset>Val.pt``), as data.

    Raises:
        UserError: no such file or tensor, or not a matrix of finite numbers.
    """
    path = Path(path)
    if not is_safetensors(path):
        return ZeroShotHead(*open_head(path))
    file = SafetensorsFile(path)
    found = name if name in file.shapes else "weight"
    if found not in file.shapes:
        names = ", ".join(sorted(file.shapes)) or "none"
        raise UserError(f"{path}: expected a tensor named weight or {name}, got {names}")
    weight, scale = file.read(found), file.metadata.get("logit_scale", "100")
    try:
        if "logit_scale" in file.shapes:
            raise ValueError("logit_scale: expected it in the metadata, got a tensor")
        if not weight.is_floating_point():
            raise ValueError(f"weight: expected floating-point numbers, got {weight.dtype}")
        if not 0 < float(scale) < float("inf"):
            raise ValueError(f"logit_scale: expected a positive number, got {scale}")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("weight: expected finite numbers, got NaN or inf")
        return ZeroShotHead(weight, float(scale))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
