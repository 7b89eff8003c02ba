"""Autocast at the border of an operation: it casts x there and nothing inside."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

# asked for once: torch.compile of the oldest PyTorch we support cannot look into the question
_HAVE_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind))


def autocast_enabled(device_type: str) -> bool:
    """Say whether autocast is on for that kind of device; some kinds have none."""
    return device_type in _HAVE_AUTOCAST and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off: inside an operation a float32 product of small matrices must stay float32."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else _NOTHING


_NOTHING = contextlib.nullcontext()
Backward = TypeVar("Backward", bound=Callable[..., Any])


def without_autocast(backward: Backward) -> Backward:
    """Make a backward that autocast leaves alone. loss.backward() may be called in its region."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, gradient: Tensor, *rest: Any) -> Any:
        with no_autocast(gradient.device.type):
            return backward(ctx, gradient, *rest)

    return cast(Backward, wrapped)
