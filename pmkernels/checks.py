"""The checks of public functions.

An error names the argument, what was expected and what came.
"""

from typing import Any

import torch
from torch import Tensor

from pmkernels.low_rank import Parts


def check_tensor(name: str, value: Any, device: torch.device | None = None, learned: bool = False) -> None:
    """Check that a value is a dense floating-point tensor, on ``device``. ``learned``: in float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if learned and value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (it stays so in 16-bit models), got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, that of weight, got {value.device}")


def check_gamma(gamma: Tensor, x: Tensor, tasks: int) -> None:
    """Check that γ is [K] or has the leading dimensions of x, or 1."""
    lead, to = gamma.shape[:-1], x.shape[:-1]
    fits = gamma.ndim <= 1 or (
        len(lead) == len(to) and all(size in (1, wanted) for size, wanted in zip(lead, to, strict=True))
    )
    if not gamma.ndim or gamma.shape[-1] != tasks or not fits:
        expected = f"[{tasks}] or [*, {tasks}] with {x.ndim} dimensions broadcastable to {tuple(to)}"
        raise ValueError(f"gamma: expected shape {expected}, got {list(gamma.shape)}")


def check_cached(cached: Any, weight: Tensor, dtype: torch.dtype) -> None:
    """Check a W(γ) that is there against ``weight`` and the compute dtype."""
    check_tensor("cached", cached, weight.device)
    if cached.shape != weight.shape or cached.dtype != dtype:
        expected = f"{list(weight.shape)} in {dtype}"
        raise ValueError(f"cached: expected {expected}, got {list(cached.shape)} in {cached.dtype}")
    if cached.requires_grad:
        raise ValueError("cached: expected requires_grad=False (its gradient is that of what it is made of), got True")


def check_parts(parts: Parts) -> None:
    """Check types, devices, shapes and the number of tasks of everything but gamma's leading dimensions."""
    weight, task_vectors, lam, A, G, B, gamma, A_c, B_c = parts
    check_tensor("weight", weight)
    device = weight.device
    _check_together(task_vectors=task_vectors, lam=lam)
    _check_together(A_c=A_c, B_c=B_c)
    tasks: int | None = None
    if task_vectors is not None and lam is not None:
        check_tensor("task_vectors", task_vectors, device)
        check_tensor("lam", lam, device, learned=True)
        if task_vectors.shape[1:] != weight.shape or task_vectors.ndim != weight.ndim + 1:
            raise ValueError(
                f"task_vectors: expected shape [K, {', '.join(map(str, weight.shape))}], got {list(task_vectors.shape)}"
            )
        tasks = task_vectors.shape[0]
        if lam.shape != (tasks,):
            raise ValueError(f"lam: expected shape [{tasks}], one per task vector, got {list(lam.shape)}")
    low_rank = {"A": A, "G": G, "B": B, "gamma": gamma}
    absent = [name for name, value in low_rank.items() if value is None]
    if absent and len(absent) < 4 and absent != ["G", "gamma"]:
        given = ", ".join(name for name in low_rank if name not in absent)
        raise ValueError(f"{absent[0]}: expected together with {given}, got None")
    for name, value in (("G", G), ("gamma", gamma)):
        if value is not None:
            check_tensor(name, value, device, learned=True)
    _check_factors(weight, A=A, B=B)
    _check_factors(weight, A_c=A_c, B_c=B_c)
    if G is not None and gamma is not None and A is not None:
        rank = A.shape[1]
        if G.ndim != 3 or G.shape[:2] != (rank, rank) or (tasks is not None and G.shape[2] != tasks):
            expected = f"[{rank}, {rank}, {'K' if tasks is None else tasks}]"
            raise ValueError(f"G: expected shape {expected}, got {list(G.shape)}")
        if gamma.ndim == 0 or gamma.shape[-1] != G.shape[2]:
            raise ValueError(f"gamma: expected shape [{G.shape[2]}] or [*, {G.shape[2]}], got {list(gamma.shape)}")
    check_frozen(weight=weight, task_vectors=task_vectors)


def _check_together(**pair: Tensor | None) -> None:
    """Check that of two arguments, by name, both are given or neither."""
    absent = [name for name, value in pair.items() if value is None]
    if len(absent) == 1:
        (given,) = pair.keys() - absent
        raise ValueError(f"{absent[0]}: expected together with {given}, got None")


def _check_factors(weight: Tensor, **pair: Tensor | None) -> None:
    """Check the two factors of a low-rank term, by name, against ``weight``."""
    (left, A), (right, B) = pair.items()
    if A is None or B is None:
        return
    for name, value in pair.items():
        check_tensor(name, value, weight.device, learned=True)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected 2 dimensions for a low-rank term, got {list(weight.shape)}")
    n, d = weight.shape
    if A.ndim != 2 or A.shape[0] != n or A.shape[1] < 1:
        raise ValueError(f"{left}: expected shape [{n}, R], got {list(A.shape)}")
    if B.shape != (d, A.shape[1]):
        raise ValueError(f"{right}: expected shape [{d}, {A.shape[1]}], got {list(B.shape)}")


def check_frozen(**tensors: Tensor | None) -> None:
    """Check that nobody asks for gradients of the tensors, given by name."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name}: expected requires_grad=False (it is frozen), got requires_grad=True")
