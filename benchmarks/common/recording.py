"""Record the Triton launches of code for a CUDA GPU, on a machine without one.

    with recording("nvidia-h100-80gb-hbm3") as launches:
        step()
    launches.write(path)

The code runs as it would on that GPU, but a launch is noted instead of executed (:mod:`benchmarks.common.launches`) and
no memory of the GPU is there (:mod:`benchmarks.common.recording_device`). A list of launches can be compiled by another
Triton under another Python (:mod:`benchmarks.gpu_kernels`).
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from benchmarks.common.launches import Launch, instead_of_launches
from benchmarks.common.recording_cuda import GPUS, Gpu, absent_gpu


@dataclass
class Launches:
    """The distinct launches in the order of their first calls, and how many of each."""

    gpu: str = ""
    calls: Counter[Launch] = field(default_factory=Counter)

    def note(self, kernel: Any, arguments: Iterable[Any], options: dict[str, Any]) -> None:
        """Note a call of ``kernel.run``."""
        given = tuple(arguments)
        if any(isinstance(value, Tensor) and value.device.type != "cuda" for value in (*given, *options.values())):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        self.calls[Launch.of(kernel, given, options)] += 1

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.calls)

    def names(self) -> dict[str, int]:
        """Return kernel name -> how many distinct launches."""
        return dict(sorted(Counter(launch.name for launch in self).items()))

    def add(self, other: Iterable[Launch]) -> None:
        """Take the launches of another recording in as well."""
        self.calls.update(other)

    def write(self, path: Path, **notes: Any) -> None:
        """Write the launches to a JSON file, and what else there is to say."""
        path.write_text(json.dumps({"gpu": self.gpu, **notes, "launches": [asdict(launch) for launch in self]}))


def read(path: Path) -> Launches:
    """Read what :meth:`Launches.write` wrote."""
    text = json.loads(path.read_text(encoding="utf-8"))
    launches = Launches(text["gpu"])
    launches.add(Launch(entry["kernel"], tuple(entry["arguments"]), entry["options"]) for entry in text["launches"])
    return launches


@contextlib.contextmanager
def recording(gpu: str | Gpu = "nvidia-h100-80gb-hbm3") -> Iterator[Launches]:
    """Record what runs within as it would run on that GPU. Nothing of it is launched, or computed there.

    Raises:
        ValueError: a GPU that is not in :data:`GPUS`, or kernels that are interpreted.
    """
    if isinstance(gpu, str) and gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected unset, kernels that are interpreted are not launched")
    launches = Launches(gpu if isinstance(gpu, str) else gpu.title)

    def note(_: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.note(kernel, arguments, options)

    with instead_of_launches(note), absent_gpu(GPUS[gpu] if isinstance(gpu, str) else gpu):
        yield launches
