"""How many threads the small models of the embedded suite are worth."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep to one CPU thread inside. For matrices this small a second one costs more than it brings (on a busy machine
    fifty times more), and results must not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
