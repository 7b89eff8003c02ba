"""Triton launches recorded instead of run. What decides the code that Triton makes of one is plain JSON.

That is the kernel, of its arguments the types, values and alignment, and the options.
"""

import importlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

# what a recorded value says it is
Encoded = dict[str, Any]


def instead_of_launches(function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Call ``function`` instead of Triton's launch of a kernel, which it gets first."""
    jit = triton.runtime.jit.JITFunction
    before = jit.run
    return mock.patch.object(jit, "run", lambda *arguments, **options: function(before, *arguments, **options))


class AbsentDriver:
    """A driver that says there is a GPU of one architecture. Triton compiles for it and never launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps the kernels of one device apart from those of another
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One distinct launch: ``kernel`` as module and name, the arguments that decide its code, options."""

    kernel: str
    arguments: tuple[Encoded, ...]
    options: dict[str, Encoded]

    def __hash__(self) -> int:
        return hash(json.dumps([self.kernel, self.arguments, self.options], sort_keys=True))

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.kernel.partition(":")[2]

    @classmethod
    def of(cls, kernel: Any, arguments: Iterable[Any], options: dict[str, Any]) -> "Launch":
        """Encode a call of ``kernel.run``. A number that is no constant of the kernel is kept as its class only."""
        constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}

        def one(name: str, value: Any) -> Encoded:
            return encode(value) if constant.get(name, True) else _coarse(encode(value))

        encoded = tuple(one(*named) for named in zip(constant, arguments, strict=False))
        options = {name: one(name, value) for name, value in options.items()}
        return cls(f"{kernel.fn.__module__}:{kernel.fn.__qualname__}", encoded, options)

    @property
    def decoded_options(self) -> dict[str, Any]:
        """Return the options as a launch takes them."""
        return {name: decode(value) for name, value in self.options.items()}

    def compile(self) -> Any:
        """Compile for the active driver's GPU, or take what Triton's cache has. A first launch does the same."""
        return _named(self.kernel).run(*map(decode, self.arguments), grid=(1,), warmup=True, **self.decoded_options)


def encode(value: Any) -> Encoded:
    """Encode what of an argument decides the code: of a tensor its type and alignment."""
    if isinstance(value, Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, triton.language.dtype):
        return {"type": value.name}
    if value is None or isinstance(value, (bool, str, float, int)):
        return {"value": value}
    if isinstance(value, tuple):
        named = type(value) is not tuple
        of = f"{type(value).__module__}:{type(value).__qualname__}" if named else None
        return {"tuple": [encode(item) for item in value], "of": of}
    raise TypeError(f"launch: expected tensors, numbers, strings and Triton's types, got {type(value).__name__}")


def _coarse(value: Encoded) -> Encoded:
    """Put an integer into the class that Triton looks at. They are 1, 16, 2 and the same beyond 32 bits."""
    if "tuple" in value:
        return {**value, "tuple": [_coarse(item) for item in value["tuple"]]}
    number = value.get("value")
    if not isinstance(number, int) or isinstance(number, bool) or number == 1:
        return value
    small = 16 if number % 16 == 0 else 2
    if -(2**31) <= number < 2**31:
        return {"value": small}
    return {"value": 2**40 + (0 if number % 16 == 0 else 2)} if number < 2**63 else value


def decode(value: Encoded) -> Any:
    """Return an argument that Triton makes the same code for."""
    if "tensor" in value:
        dtype = getattr(torch, value["tensor"])
        return torch.empty(17, dtype=dtype)[0 if value["aligned"] else 1 :]
    if "type" in value:
        return getattr(triton.language, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[value["type"]])
    if "tuple" in value:
        items = map(decode, value["tuple"])
        return tuple(items) if value["of"] is None else _named(value["of"])(*items)
    return value["value"]


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
