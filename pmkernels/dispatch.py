"""The :class:`Configs` in force, by which launches and choices go on a device."""

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pmkernels import costs, launch
from pmkernels.configs import Asked, Config, Configs, Entry, read_rates

# of every context that has not ended, in the order in which they were entered
_entered: dict[object, Configs] = {}
_lock = threading.Lock()
_default = _in_force = Configs()


def in_force() -> Configs:
    """Return the configurations that launches and choices go by now."""
    return _in_force


@contextlib.contextmanager
def using(configs: Configs) -> Iterator[Configs]:
    """Put ``configs`` in force, in every thread, until the context ends.

    In every thread, because autograd computes a backward on a GPU in a thread of its own. Of contexts that overlap in
    two threads, the one that was entered last is in force as long as it lasts.
    """
    global _in_force
    context = object()
    with _lock:
        _entered[context] = _in_force = configs
    try:
        yield configs
    finally:
        with _lock:
            del _entered[context]
            _in_force = next(reversed(_entered.values()), _default)


def runs_kernels(device: torch.device) -> bool:
    """Say whether Triton kernels can run on tensors of ``device``."""
    if not launch.HAS_TRITON:
        return False
    if _in_force.runs is not None:
        return _in_force.runs
    return device.type == "cuda" or (launch.INTERPRETING and device.type == "cpu")


def as_on_a_gpu(device: torch.device) -> bool:
    """Say whether ``auto`` may take kernels on ``device``. Interpreted ones it does not."""
    return device.type == "cuda" if _in_force.runs is None else _in_force.runs


@functools.lru_cache(maxsize=64)
def gpu_name(index: int | None) -> str:
    """Return a CUDA device's name as configuration files spell it: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


def gpu_file(device: torch.device) -> str:
    """Return a device's configuration file: its GPU's own, its architecture's, or ``default``."""
    return _gpu_file(_in_force, device) if _in_force.file is None else _in_force.file


@functools.lru_cache(maxsize=64)
def _gpu_file(configs: Configs, device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return next((name for name in (gpu_name(device.index), f"sm_{major}{minor}") if name in configs.files), "default")


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a CUDA device; an H200's off the GPU."""
    return _multiprocessors(device) if _in_force.multiprocessors is None else _in_force.multiprocessors


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rates(name: str, device: torch.device) -> costs.Rates:
    """Return a device's rates: measured ones of a file, known ones, or an estimate."""
    known = costs.GPUS.get(gpu_name(device.index) if device.type == "cuda" else "nvidia-h200")
    if known is None:
        properties = torch.cuda.get_device_properties(device)
        known = costs.estimate(properties.multi_processor_count, (properties.major, properties.minor))
    return replace(known, **read_rates(_in_force.files.get(name, "{}")))


def lookup(name: str, op: str, dtype: str, rows: int, rank: int, aligned: bool) -> Config:
    """Return the configuration of a launch by the first line of a file that fits."""
    asked, configs = Asked(op, dtype, rows, rank, aligned), _in_force
    entry = _entry(configs, name, asked)
    return entry.config if configs.launch is None else configs.launch(asked, entry)


@functools.lru_cache(maxsize=4096)
def _entry(configs: Configs, name: str, asked: Asked) -> Entry:
    for entry in configs.entries(name):
        if entry.fits(asked):
            return entry
    what = f"{asked.op} in {asked.dtype} with rank {asked.rank}"
    raise LookupError(f"configs/{name}.json: expected an entry for {what}, got none")


def config(op: str, like: Tensor, *, rows: int, rank: int, aligned: bool = True) -> Config:
    """Return the configuration of ``op`` for tensors like ``like``.

    ``aligned``: see :func:`pmkernels.launch.is_aligned`. Scattered loads take an address register pair per element and
    want small tiles.
    """
    return lookup(gpu_file(like.device), op, launch.precision_kind(like.dtype), launch.bucket(rows), rank, aligned)
