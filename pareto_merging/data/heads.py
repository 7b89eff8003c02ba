"""Zero-shot heads: frozen class embeddings that turn an encoder's features into logits."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.checkpoints.heads import open_head


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
