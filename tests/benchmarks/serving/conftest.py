"""A folded tower for every file; nothing here is learned."""

from collections.abc import Iterator

import pytest
import torch
from support.folded_cases import build

from benchmarks.serving import folded


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> folded.Case:
    return build(tmp_path_factory.mktemp("single"), torch.float32)
