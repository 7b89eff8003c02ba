"""Digests of weights."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pareto_merging.model import pieces
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.parametrize import parametrize

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_digests_and_differences_do_not_depend_on_the_pieces(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    for shape in ((), (0,), (5,), (4, 3), (2, 3, 5), (1, 1, 11), (11, 1, 1)):
        value = (5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
        for tensor in (value, value.movedim(0, -1) if value.ndim else value):
            # what files in the wild carry: the whole tensor at once, 16-bit values as float32
            whole = tensor.float() if dtype in (torch.float16, torch.bfloat16) else tensor
            part = hashlib.sha256(f"{whole.dtype} {list(whole.shape)} ".encode() + whole.numpy().tobytes())
            ours = TensorDigest()
            ours.add("w", tensor)
            assert ours.hexdigest() == hashlib.sha256(f"w {part.hexdigest()}".encode()).hexdigest(), shape
            cut = [tensor[index] for index in pieces.pieces_of(tensor.shape)]
            assert all(0 < piece.numel() <= chunk for piece in cut)
            assert torch.equal(torch.cat([torch.empty(0, dtype=dtype), *(p.flatten() for p in cut)]), tensor.flatten())
            if dtype in (torch.float16, torch.bfloat16):
                model = nn.ParameterDict({"w": tensor})
                other = {"w": tensor.float() * 1.01 + 1e-3}
                tau = parametrize(model, [other], low_rank="none").state_dict().get("w_task_vectors")
                expected = (other["w"] - tensor.float()).to(dtype)
                assert torch.equal(tau[0], expected) if tensor.numel() else tau is None
