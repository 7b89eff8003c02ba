"""Bytes that objects hold, and bytes that are free."""

import functools
import inspect
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import free_memory


def unused_memory(device: torch.device) -> float:
    """Return bytes that tensors can still take on the device."""
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return math.inf
    return free_memory(device)


def tensor_bytes(*objects: Any) -> int:
    """Return the bytes of all tensors reached from ``objects``. Memory that several of them share is counted once."""
    storages = {}
    for tensor in _tensors(list(objects)):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _tensors(waiting: list[Any]) -> Iterator[Tensor]:
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | str | bytes | int | float):
            continue
        # kept, so that no other object gets its address
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += list(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            waiting += list(inspect.getclosurevars(value).nonlocals.values())
        else:
            waiting.append(getattr(value, "__dict__", {}))
            waiting += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
