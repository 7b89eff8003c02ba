"""What code can ask of a CUDA GPU, answered where there is none."""

import contextlib
import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.recording_device import Mode, absent, contents, says_cuda

# where memory begins
ADDRESS = 2**40
DEVICE = torch.device("cuda", 0)
_DEVICE = torch._C.TensorBase.device.__get__


@dataclass(frozen=True)
class Gpu:
    """What code may ask a CUDA GPU about itself."""

    title: str
    memory: int
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    cache: int = 50 * 2**20


GPUS = {
    "nvidia-h100-80gb-hbm3": Gpu("NVIDIA H100 80GB HBM3", 85_017_493_504),
    "nvidia-h200": Gpu("NVIDIA H200", 150_109_880_320),
}


class _Stream:
    """A stream, an event or a graph on which nothing happens."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = DEVICE, 0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        answers = {"query": True, "elapsed_time": 1.0, "is_capturing": False, "pool": (0, 1)}
        return lambda *_, **__: answers.get(name)


_GENERATOR = torch.Generator


class _Generator(_GENERATOR):
    """A generator of random numbers; the GPU's is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made: _Generator = _GENERATOR.__new__(cls, device="cpu")  # type: ignore[call-arg]
        return made


def _answers(gpu: Gpu) -> dict[str, Any]:
    """Return what ``torch.cuda`` answers in place of a driver."""
    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=gpu.title,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        total_memory=gpu.memory,
        L2_cache_size=gpu.cache,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=227 * 1024,
        uuid="absent",
    )
    mode = [0]

    def of(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def set_sync_debug_mode(chosen: int | str) -> None:
        mode[0] = {"default": 0, "warn": 1, "error": 2}.get(chosen, 0) if isinstance(chosen, str) else chosen

    memory = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    seeds = "manual_seed manual_seed_all set_rng_state"
    answered = {
        "is_available is_initialized _is_compiled is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        f"current_device _exchange_device _maybe_exchange_device {memory}": 0,
        f"_lazy_init init synchronize empty_cache reset_peak_memory_stats _sleep set_device {seeds}": None,
        "get_device_name": gpu.title,
        "get_device_capability": gpu.capability,
        "get_device_properties": properties,
        "mem_get_info": (gpu.memory, gpu.memory),
        "memory_stats": defaultdict[str, int](int),
        "current_stream default_stream": _Stream(),
        "graph_pool_handle": (0, 1),
    }
    answers: dict[str, Any] = {name: of(value) for names, value in answered.items() for name in names.split()}
    answers |= dict.fromkeys(("Stream", "Event", "CUDAGraph", "graph", "stream", "StreamContext"), _Stream)
    answers |= {"default_generators": (_Generator(DEVICE),), "get_rng_state": lambda *_: torch.get_rng_state()}
    return answers | {"set_sync_debug_mode": set_sync_debug_mode, "get_sync_debug_mode": lambda: mode[0]}


def forget(prefixes: tuple[str, ...] = ("pmkernels", "pareto_merging", "benchmarks")) -> None:
    """Clear every function cache of those packages. What it keeps may be about another GPU, or none."""
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.partition(".")[0] in prefixes and module is not None else ():
            clear = getattr(value, "cache_clear", None)
            if callable(clear):
                clear()


def _indexed(value: Any) -> Any:
    """Return a device without a number, for which PyTorch would ask the driver, with one."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return DEVICE if torch.device(value).type == "cuda" else value
    return value


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Move a tensor as ``Tensor.to`` does, without asking a driver which GPU is meant."""
    return _TO(self, *map(_indexed, args), **{name: _indexed(value) for name, value in kwargs.items()})


def _made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make ``torch.tensor`` and its like on the CPU, then move what they make."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if absent(data):
            given = {"device": device, **kwargs}
            moved = _to(data, **{name: value for name, value in given.items() if value is not None})
            return moved.detach().clone() if make.__name__ == "tensor" else moved
        if _indexed(device) != DEVICE:
            return make(data, *args, device=device, **({"requires_grad": True} if requires_grad else {}), **kwargs)
        return _to(make(data, *args, **kwargs), DEVICE).requires_grad_(requires_grad)

    return made


def _storage_address(self: torch.UntypedStorage) -> int:
    """Return the address of a tensor's memory. No two are alike, and each is aligned as the allocator's."""
    return ADDRESS + (self._cdata << 8) if self.device.type == "meta" else _STORAGE_ADDRESS(self)


def _data_ptr(self: Tensor) -> int:
    if not absent(self):
        return _ADDRESS(self)
    return _storage_address(self.untyped_storage()) + int(self.storage_offset()) * self.element_size()


def _numpy(self: Tensor, *, force: bool = False) -> Any:
    if absent(self) and not force:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _NUMPY(contents(self), force=force)


def _repr(self: Tensor, *, tensor_contents: Any = None) -> str:
    if absent(self):
        return f"tensor(..., device='{DEVICE}', size={tuple(self.shape)}, dtype={self.dtype})"
    return _REPR(self, tensor_contents=tensor_contents)  # type: ignore[call-arg]


_REPR = Tensor.__repr__
_TO, _TOLIST, _NUMPY, _ADDRESS = Tensor.to, Tensor.tolist, Tensor.numpy, Tensor.data_ptr
_STORAGE_ADDRESS = torch.UntypedStorage.data_ptr
_RUN = threading.Thread.run


def _run(thread: threading.Thread) -> None:
    """Run a thread's work under the same mode as the thread that recording began in."""
    with Mode():
        _RUN(thread)


@contextlib.contextmanager
def absent_gpu(gpu: Gpu) -> Iterator[None]:
    """Within: ``cuda`` is that GPU, and nothing is computed on it."""
    patches = [mock.patch.object(torch.cuda, name, value, create=True) for name, value in _answers(gpu).items()]
    patches += [
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(Tensor, "to", _to),
        mock.patch.object(Tensor, "cuda", lambda self, *_, **__: _to(self, DEVICE)),
        mock.patch.object(Tensor, "pin_memory", lambda self, *_: self.clone()),
        mock.patch.object(Tensor, "is_pinned", return_value=False),
        mock.patch.object(Tensor, "device", property(lambda self: DEVICE if says_cuda(self) else _DEVICE(self))),
        mock.patch.object(Tensor, "is_cuda", property(says_cuda)),
        mock.patch.object(Tensor, "is_meta", property(lambda self: absent(self) and not says_cuda(self))),
        mock.patch.object(Tensor, "get_device", lambda self: 0 if absent(self) else -1),
        mock.patch.object(Tensor, "data_ptr", _data_ptr),
        mock.patch.object(Tensor, "tolist", lambda self: _TOLIST(contents(self))),
        mock.patch.object(Tensor, "numpy", _numpy),
        mock.patch.object(Tensor, "__repr__", _repr),
        mock.patch.object(Tensor, "record_stream", return_value=None),
        mock.patch.object(torch.UntypedStorage, "data_ptr", _storage_address),
        mock.patch.object(threading.Thread, "run", _run),
        # what a compiled function launches is what it launches without being compiled
        mock.patch.object(torch, "compile", lambda model=None, **_: (lambda f: f) if model is None else model),
        mock.patch.object(torch.accelerator, "current_stream", return_value=_Stream()),
    ]
    patches += [
        mock.patch.object(torch, name, _made_here(getattr(torch, name)))
        for name in ("tensor", "as_tensor", "asarray", "scalar_tensor")
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        forget()
        stack.callback(forget)
        # a parameter that moves to a GPU stays the parameter that it is
        swap, future = torch.__future__.get_swap_module_params_on_conversion(), torch.__future__
        stack.callback(future.set_swap_module_params_on_conversion, swap)
        future.set_swap_module_params_on_conversion(True)
        stack.enter_context(Mode())
        yield
