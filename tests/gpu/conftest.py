"""Where only torch, triton and pytest are installed, the tests of whole models are left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Parts, note_parts
from smoke import mark_smoke, smoke_rank

collect_ignore = (
    []
    if importlib.util.find_spec("pydantic") and importlib.util.find_spec("pymoo")
    else ["test_models.py", "test_methods.py", "test_engine.py"]
)


def pytest_itemcollected(item: pytest.Item) -> None:
    mark_smoke(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Smoke tests first, by rank: pytest-xdist deals them to its processes in that order, two each."""
    items.sort(key=smoke_rank)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32 but where a test asks for it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """The parts that products are cut into from here on."""
    return note_parts(monkeypatch)
