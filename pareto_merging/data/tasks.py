"""One task: its images, and the zero-shot head that turns the encoder's features into logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pareto_merging.checkpoints.heads import open_head


@dataclass
class Task:
    """One task's images and its frozen head, as merging and evaluation see it.

    Attributes:
        images: a map-style dataset of image tensors or of (image, anything) pairs; evaluation and supervised training
            want (image, label).
        head: maps features to logits [n, classes].
    """

    images: Dataset[Any]
    head: nn.Module


class ZeroShotHead(nn.Module):
    """logits = scale · normalise(features) · weightᵀ. Features [n, dim] become [n, classes] with weight [classes, dim].

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
    """Read a head from a file, as :func:`pareto_merging.checkpoints.heads.open_head` does.

    Raises:
        UserError: no such file or tensor, or not a matrix of finite numbers.
    """
    return ZeroShotHead(*open_head(path, name))
