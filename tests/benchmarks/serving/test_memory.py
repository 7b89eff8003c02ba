"""Bytes that objects hold."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.serving import memory


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_bytes_are_found_wherever_they_are_held_and_counted_once() -> None:
    a, b, c, d = (torch.zeros(n) for n in (1, 10, 100, 1000))

    def closure() -> Tensor:
        return b

    held = {"views": [a, a.view(1, 1)], "function": closure, "partial": functools.partial(torch.add, c)}
    module = torch.nn.Module()
    module.register_buffer("d", d)
    assert memory.tensor_bytes(held, module, d) == 4 * 1111
