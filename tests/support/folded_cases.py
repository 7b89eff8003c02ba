"""One folded tower, images and preferences for the tests of the serving suite."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import towers
from benchmarks.serving import folded, suite

CPU = torch.device("cpu")
ITEMS, COUNT = 4, 2


def build(folder: Path, dtype: torch.dtype) -> folded.Case:
    return folded.build_case(towers.TINY.name, suite.TINY_ENCODER, folder, dtype, CPU)


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(ITEMS, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def drawn() -> Tensor:
    return folded.preferences(COUNT)


def request(number: int, count: int = COUNT) -> folded.Request:
    return folded.Request.make(drawn()[number][:count], ITEMS, CPU)
