"""What every public function checks at its border: the error names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

# asked for once: torch.compile of the oldest PyTorch we support cannot look into the question
_HAVE_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for that kind of device; some kinds have none."""
    return device_type in _HAVE_AUTOCAST and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The casts are made at the border; inside, a float32 product of small matrices must stay float32."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else _NOTHING


_NOTHING = contextlib.nullcontext()


Backward = TypeVar("Backward", bound=Callable[..., Any])


def without_autocast(backward: Backward) -> Backward:
    """A backward(ctx, gradient, …) that autocast leaves alone: loss.backward() may be called inside its region."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, gradient: Tensor, *rest: Any) -> Any:
        with no_autocast(gradient.device.type):
            return backward(ctx, gradient, *rest)

    return cast(Backward, wrapped)


def check_tensor(name: str, value: Any, device: torch.device, learned: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if learned and value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (it stays so in 16-bit models), got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, that of weight, got {value.device}")


def check_parameters(
    weight: Tensor,
    task_vectors: Tensor | None,
    lam: Tensor | None,
    A: Tensor | None,
    G: Tensor | None,
    B: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """Types, devices, shapes and the number of tasks of everything but x, bias and the leading dimensions of gamma."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    device = weight.device
    check_tensor("weight", weight, device)
    if (task_vectors is None) != (lam is None):
        given, missing = ("task_vectors", "lam") if lam is None else ("lam", "task_vectors")
        raise ValueError(f"{missing}: expected together with {given}, got None")
    tasks: int | None = None
    if task_vectors is not None and lam is not None:
        check_tensor("task_vectors", task_vectors, device)
        check_tensor("lam", lam, device, learned=True)
        if task_vectors.shape[1:] != weight.shape or task_vectors.ndim != weight.ndim + 1:
            raise ValueError(f"task_vectors: expected shape [K, {_dims(weight)}], got {list(task_vectors.shape)}")
        tasks = task_vectors.shape[0]
        if lam.shape != (tasks,):
            raise ValueError(f"lam: expected shape [{tasks}], one per task vector, got {list(lam.shape)}")
    low_rank = {"A": A, "G": G, "B": B, "gamma": gamma}
    absent = [name for name, value in low_rank.items() if value is None]
    if len(absent) == 4:
        pass
    elif absent and absent != ["G", "gamma"]:
        given = ", ".join(name for name in low_rank if name not in absent)
        raise ValueError(f"{absent[0]}: expected together with {given}, got None")
    else:
        assert A is not None and B is not None
        for name, value in low_rank.items():
            if value is not None:
                check_tensor(name, value, device, learned=True)
        if weight.ndim != 2:
            raise ValueError(f"weight: expected 2 dimensions for a low-rank term, got {list(weight.shape)}")
        n, d = weight.shape
        if A.ndim != 2 or A.shape[0] != n or A.shape[1] < 1:
            raise ValueError(f"A: expected shape [{n}, R], got {list(A.shape)}")
        rank = A.shape[1]
        if B.shape != (d, rank):
            raise ValueError(f"B: expected shape [{d}, {rank}], got {list(B.shape)}")
        if G is None or gamma is None:
            _check_frozen(weight, task_vectors)
            return
        if G.ndim != 3 or G.shape[:2] != (rank, rank) or (tasks is not None and G.shape[2] != tasks):
            raise ValueError(
                f"G: expected shape [{rank}, {rank}, {'K' if tasks is None else tasks}], got {list(G.shape)}"
            )
        tasks = G.shape[2]
        if gamma.ndim == 0 or gamma.shape[-1] != tasks:
            raise ValueError(f"gamma: expected shape [{tasks}] or [*, {tasks}], got {list(gamma.shape)}")
    _check_frozen(weight, task_vectors)


def _check_frozen(weight: Tensor, task_vectors: Tensor | None) -> None:
    for name, value in (("weight", weight), ("task_vectors", task_vectors)):
        if value is not None and value.requires_grad:
            raise ValueError(f"{name}: expected requires_grad=False (it is frozen), got requires_grad=True")


def _dims(tensor: Tensor) -> str:
    return ", ".join(str(size) for size in tensor.shape)
