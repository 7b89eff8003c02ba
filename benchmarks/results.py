"""Results files: what ran where, written whole or not at all. Needs torch and nothing else, so it runs anywhere."""

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pareto_merging.system.files import write_json

RESULTS = Path(__file__).parent / "results"
# whole or not at all
write = write_json


def machine() -> dict[str, Any]:
    """Return hardware, driver and versions: where figures were measured."""
    # a process that only watches a run does without it
    import torch

    from pareto_merging.system.environment import environment

    # what is measured is a commit, not a version of the package
    versions = {name: value for name, value in environment().items() if name != "package"}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        versions |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
        }
    return versions


def clocks() -> dict[str, str | None]:
    """Return the GPU's clocks, temperature and power at this moment, as nvidia-smi says them."""
    return {name: _nvidia_smi(name) for name in ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")}


def _nvidia_smi(query: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0", timeout=20)


def _output(*command: str, **options: Any) -> str | None:
    """Return what a command prints; None where it prints nothing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str:
    """Return the commit that is measured; ``unknown`` outside a checkout."""
    return _output("git", "describe", "--always", "--dirty", cwd=RESULTS.parent) or "unknown"


def header(command: Sequence[str]) -> dict[str, Any]:
    """Return what every results file begins with."""
    return {"command": " ".join(command), "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def gpu_name_of_driver() -> str | None:
    """Return the first GPU's name as files spell it (``nvidia-h200``), as the driver says it. None without one."""
    name = _nvidia_smi("name")
    return None if name is None else gpu_file_name(name)


def gpu_file_name(gpu: str) -> str:
    """Return a GPU's name as files spell it: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def unused(path: Path) -> Path:
    """Return ``path``, or with a number if there is a file already. Nothing that was measured is written over."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
