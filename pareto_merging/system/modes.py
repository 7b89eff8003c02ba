"""Training and evaluation modes of modules, put back afterwards."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Keep to eval mode inside: no dropout, fixed batch-norm statistics. Each inner module's mode is restored."""
    before = {inner: inner.training for module in modules for inner in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for inner, mode in before.items():
            inner.training = mode
