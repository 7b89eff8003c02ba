"""SHA-256 of weights: which a Pareto set belongs to."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from pareto_merging.model.pieces import pieces_of


class TensorDigest:
    """SHA-256 over named tensors. 16-bit values count as the float32 they stand for, so precision changes nothing."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self.parts[name] = tensor_digest(tensor)

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(self.parts.items())).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Digest a tensor's dtype, shape and numbers, as :class:`TensorDigest` takes them. Copies a piece at a time."""
    value = tensor.detach()
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    digest = hashlib.sha256(f"{dtype} {list(value.shape)} ".encode())
    for index in pieces_of(value.shape):
        piece = value[index].cpu().to(dtype).contiguous()
        # not view(-1): the strides of a single number may be anything
        raw: Any = piece.as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()
