"""Where the work is done: a device by name."""

import torch

from pareto_merging.errors import UserError


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name. ``auto`` is a CUDA GPU where there is one, else the CPU. A GPU has its number.

    Raises:
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
