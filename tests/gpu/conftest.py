"""Where only torch, triton and pytest are installed, the tests of whole models are left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Parts, note_parts

collect_ignore = (
    []
    if importlib.util.find_spec("pydantic") and importlib.util.find_spec("pymoo")
    else ["test_models.py", "test_methods.py", "test_engine.py"]
)


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
