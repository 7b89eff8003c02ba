"""Record the Triton launches of code that is meant for a CUDA GPU, on a machine without one.

    with recording("nvidia-h100-80gb-hbm3") as launches:
        step()
    launches.write(path)

The code runs as it would on that GPU, but a launch is noted instead of executed and no memory of the GPU is there
(:mod:`benchmarks.common.recording_device`). A launch is what decides the code that Triton makes: the kernel, of its
arguments the types, values and alignment, and the options. A list of launches is plain JSON: it can be compiled by
another Triton under another Python (:mod:`benchmarks.gpu_kernels`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.common.recording_cuda import GPUS, Gpu, absent_gpu

# what a recorded value says it is
Encoded = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One distinct launch: ``kernel`` as module and name, what of its arguments decides the code, and the options."""

    kernel: str
    arguments: tuple[Encoded, ...]
    options: dict[str, Encoded]

    def __hash__(self) -> int:
        return hash(json.dumps([self.kernel, self.arguments, self.options], sort_keys=True))

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.partition(":")[2]

    @classmethod
    def of(cls, kernel: Any, arguments: Iterable[Any], options: dict[str, Any]) -> Launch:
        """Of a call of ``kernel.run``."""
        encoded = {name: encode(value) for name, value in options.items()}
        return cls(f"{kernel.fn.__module__}:{kernel.fn.__qualname__}", tuple(map(encode, arguments)), encoded)

    def function(self) -> Any:
        """The kernel itself."""
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)

    def compile(self) -> Any:
        """Compile for the active driver's GPU, or take what Triton's cache has: what a first launch does."""
        arguments = [decode(value) for value in self.arguments]
        options = {name: decode(value) for name, value in self.options.items()}
        return self.function().run(*arguments, grid=(1,), warmup=True, **options)


def encode(value: Any) -> Encoded:
    """What of an argument decides the code: of a tensor its type and alignment, of an integer no more than Triton
    looks at (whether it is 1, a multiple of 16, of more than 32 bits)."""
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return {"tensor": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, triton.language.dtype):
        return {"type": value.name}
    if value is None or isinstance(value, (bool, str, float)):
        return {"value": value}
    if isinstance(value, int):
        return {"value": value}
    raise TypeError(f"launch: expected tensors, numbers, strings and Triton's types, got {type(value).__name__}")


def _coarse(value: Encoded) -> Encoded:
    """An integer argument that is no constant of the kernel, by its class: 1, 16, 2 and the same beyond 32 bits."""
    number = value.get("value")
    if not isinstance(number, int) or isinstance(number, bool) or number == 1:
        return value
    small = 16 if number % 16 == 0 else 2
    if -(2**31) <= number < 2**31:
        return {"value": small}
    return {"value": 2**40 + (0 if number % 16 == 0 else 2)} if number < 2**63 else value


def decode(value: Encoded) -> Any:
    """An argument that Triton makes the same code for."""
    if "tensor" in value:
        dtype = getattr(torch, value["tensor"])
        return torch.empty(17, dtype=dtype)[0 if value["aligned"] else 1 :]
    if "type" in value:
        return getattr(triton.language, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[value["type"]])
    return value["value"]


@dataclass
class Launches:
    """The distinct launches in the order of their first calls, and how often each was called."""

    gpu: str = ""
    calls: dict[Launch, int] = field(default_factory=dict)

    def note(self, kernel: Any, arguments: Iterable[Any], options: dict[str, Any]) -> None:
        """Note a call of ``kernel.run``."""
        launch = _specialised(kernel, Launch.of(kernel, arguments, options))
        self.calls[launch] = self.calls.get(launch, 0) + 1

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.calls)

    def names(self) -> dict[str, int]:
        """Kernel name -> how many distinct launches."""
        found: dict[str, int] = {}
        for launch in self:
            found[launch.name] = found.get(launch.name, 0) + 1
        return dict(sorted(found.items()))

    def add(self, other: Iterable[Launch]) -> None:
        """Take the launches of another recording in as well."""
        for launch in other:
            self.calls[launch] = self.calls.get(launch, 0) + 1

    def write(self, path: Path, **notes: Any) -> None:
        """Write the launches to a JSON file, and what else there is to say."""
        path.write_text(json.dumps({"gpu": self.gpu, **notes, "launches": [asdict(launch) for launch in self]}))


def read(path: Path) -> Launches:
    """Read what :meth:`Launches.write` wrote."""
    text = json.loads(path.read_text(encoding="utf-8"))
    found = Launches(text["gpu"])
    found.add(Launch(entry["kernel"], tuple(entry["arguments"]), entry["options"]) for entry in text["launches"])
    return found


def _specialised(kernel: Any, launch: Launch) -> Launch:
    """The same launch with every number that is no constant of the kernel put into its class."""
    parameters = kernel.params
    arguments = [
        value if parameters[place].is_constexpr else _coarse(value) for place, value in enumerate(launch.arguments)
    ]
    constants = {parameter.name for parameter in parameters if parameter.is_constexpr}
    names = {parameter.name for parameter in parameters}
    options = {
        name: _coarse(value) if name in names and name not in constants else value
        for name, value in launch.options.items()
    }
    return Launch(launch.kernel, tuple(arguments), options)


@contextlib.contextmanager
def recording(gpu: str | Gpu = "nvidia-h100-80gb-hbm3") -> Iterator[Launches]:
    """Record what runs within as it would run on that GPU; nothing of it is launched, or computed there.

    Raises:
        ValueError: a GPU that is not in :data:`GPUS`, or kernels that are interpreted.
    """
    if isinstance(gpu, str) and gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected unset, kernels that are interpreted are not launched")
    found = Launches(gpu if isinstance(gpu, str) else gpu.title)

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.note(kernel, arguments, options)

    function, before = triton.runtime.jit.JITFunction, triton.runtime.jit.JITFunction.run
    function.run = run
    try:
        with absent_gpu(GPUS[gpu] if isinstance(gpu, str) else gpu):
            yield found
    finally:
        function.run = before
