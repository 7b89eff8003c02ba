"""Training and evaluation modes of modules, put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside (no dropout, fixed batch-norm statistics); each inner module's mode restored."""
    before = {inner: inner.training for module in modules for inner in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for inner, mode in before.items():
            inner.training = mode
