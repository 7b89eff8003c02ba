"""Where the work is done: a device by name, and threads for small models."""

import contextlib
from collections.abc import Iterator

import torch

from pareto_merging.errors import UserError


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name, a GPU with its number. ``auto`` is a CUDA GPU where there is one, else the CPU.

    UserError: no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta tensors have no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device: expected one that is here, got {name}") from error
    # "cuda" alone is another GPU in another thread
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


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
