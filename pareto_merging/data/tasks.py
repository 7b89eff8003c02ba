"""One task: its images, and the zero-shot head that turns the encoder's features into logits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from pareto_merging.checkpoints.heads import open_head


class NoHead(nn.Module):
    """The head of a task that has none: enough for what looks at features alone."""

    def forward(self, features: Tensor) -> Tensor:
        raise ValueError("head: expected a head that turns features into logits, got none")


@dataclass
class Task:
    """One task's images and its frozen head, as merging and evaluation see it.

    Attributes:
        images: a map-style dataset of image tensors or of (image, anything) pairs; evaluation and supervised training
            want (image, label).
        head: maps features to logits [n, classes].
        teacher: for the objectives ``distillation`` and ``features``, what the merged model is to say of each image: a
            tensor of logits [images, classes] (with features behind or instead of them, as the objective wants), or a
            module or function of images that gives features, asked in every step. None: the fine-tuned model.
    """

    images: Dataset[Any]
    head: nn.Module = field(default_factory=NoHead)
    teacher: Tensor | Callable[[Tensor], Tensor] | None = None


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
