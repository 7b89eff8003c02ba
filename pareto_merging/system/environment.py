"""Where figures were measured, and what a piece of work takes."""

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pareto_merging.version import VERSION


def environment() -> dict[str, Any]:
    """Return where figures are measured."""
    return {
        "package": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _proc(file: str, name: str) -> str | None:
    """Return what one of Linux's files says of ``name``. None on other systems, or where it is not allowed."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return the result of ``work``, its seconds, and its peak memory in bytes.

    With a CUDA GPU the peak is what torch had allocated there; without, it is the resident memory of the whole process
    (libraries included), so compare differences and not ratios.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        # lets the peak start from now
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, torch.cuda.max_memory_allocated() if on_gpu else _resident()


def _resident() -> int:
    """Return the process's peak resident memory in bytes. Where it cannot be reset it counts from the start."""
    peak = _proc("self/status", "VmHWM:")
    if peak is not None:
        return int(peak.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
