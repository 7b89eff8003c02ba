"""Where figures were measured, and what a piece of work takes."""

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
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return the result of ``work``, its seconds, and its peak memory in bytes.

    With a CUDA GPU the peak is what torch had allocated there; without, it is the resident memory of the whole process
    (libraries included), so compare differences and not ratios.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    _resident(reset=True)
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, torch.cuda.max_memory_allocated() if on_gpu else _resident()


def _resident(reset: bool = False) -> int:
    """Return the process's peak resident memory in bytes. ``reset`` lets it start from now where it can."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        # not Linux, or not allowed: the peak since the process began
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
