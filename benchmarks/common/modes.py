"""Modes of PyTorch that measurements and checks run under."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def precision(kind: str) -> AbstractContextManager[None]:
    """Multiply float32 as that kind of entry does: TF32 or exact."""
    return _set(torch.backends.cuda.matmul, "fp32_precision", "tf32" if kind == "tf32" else "ieee")


def no_tf32() -> AbstractContextManager[None]:
    """Compute convolutions in exact float32 as well; elsewhere PyTorch has it so."""
    return _set(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # type: ignore[attr-defined]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that is allocated here with NaN, until something is written to it."""
    enabled, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with _set(torch.utils.deterministic, "fill_uninitialized_memory", True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
