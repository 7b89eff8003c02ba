"""A CUDA GPU that is not there: tensors say that they lie on it, have shapes and no memory, and nothing is computed.

What runs on the CPU is really computed; what runs on ``cuda`` gets shapes, strides and types only (by PyTorch's meta
kernels). Reading such a tensor gives zeros, and True where a test asks whether two are equal, except that a few numbers
(preferences, offsets, labels) are kept and computed beside it, as code reads and checks them. Operators of this library
run their real Python, down to the launch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# a tensor with at most so many elements keeps its values beside it
SMALL = 4096
# random numbers on the CPU from so many on are zeros: nothing that is recorded depends on them
MANY = 2**16
# where the memory of every tensor begins, as the caching allocator aligns it
ADDRESS = 2**40
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

UNWRITTEN = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
RANDOM = {aten.randn, aten.rand, aten.randn_like, aten.rand_like, aten.randint}
FILLS = {aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.erfinv_}
# what an operator in place does to a shape has to be done
RESHAPES = {aten.resize_, aten.set_, aten.t_, aten.transpose_, aten.squeeze_, aten.unsqueeze_, aten.as_strided_}


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


class OnGpu(Tensor):
    """A tensor on the absent GPU: a shape without memory; ``values``: its contents on the CPU where they are few."""

    values: Tensor | None
    # NB: PyTorch's C++ sees the meta device, which needs no driver and no streams; Python sees cuda
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, values: Tensor | None = None) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device="meta",
        )
        made.values = values
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return ADDRESS + self.storage_offset() * self.element_size()

    def untyped_storage(self) -> Any:
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride(), strict=True))
        count = self.storage_offset() + last + 1 if self.numel() else 0
        return SimpleNamespace(
            data_ptr=self.data_ptr, nbytes=lambda: count * self.element_size(), device=DEVICE, _cdata=id(self)
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def record_stream(self, stream: Any) -> None:
        return None

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnGpu(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            made = self.detach().clone().requires_grad_(self.requires_grad)
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name != "values"})
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})


def _known(tensor: OnGpu) -> Tensor | None:
    """The values of a tensor where they are known and nobody has given it another shape since."""
    values: Tensor | None = tensor.__dict__.get("values")
    return values if values is not None and values.shape == tensor.shape else None


def contents(tensor: Tensor) -> Tensor:
    """A tensor on the CPU: its values where they are known, else zeros, or True."""
    if not isinstance(tensor, OnGpu):
        return tensor
    values = _known(tensor)
    if values is not None:
        return values.clone()
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).zero_()


def _shape_of(tensor: Tensor) -> Tensor:
    """The same on the meta device, where PyTorch computes shapes."""
    shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    if not offset:
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta")
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if tensor.numel() else -1
    memory = torch.empty(offset + last + 1, dtype=tensor.dtype, device="meta")
    return memory.as_strided(shape, stride, offset)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found.append(value)
    return found


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return _known(value) if isinstance(value, OnGpu) else value


def execute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operator of PyTorch: on the GPU that is not there if it has to do with it, else on the CPU."""
    definition = OPDEFS.get(func._schema.name)
    flat = pytree.arg_tree_leaves(*args, **kwargs)
    on_gpu = [leaf for leaf in flat if isinstance(leaf, OnGpu)]
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == "cuda"
    if definition is not None and (on_gpu or to_gpu):
        with Mode():
            return definition._init_fn(*args, **kwargs)
    packet = func.overloadpacket
    if not on_gpu and not to_gpu:
        return _cpu(func, packet, args, kwargs)
    if packet is aten._local_scalar_dense:
        return contents(args[0]).item()
    if packet is aten.equal:
        known = [leaf if not isinstance(leaf, OnGpu) else _known(leaf) for leaf in args]
        return all(k is None for k in known) or all(k is not None for k in known) and torch.equal(*known)
    if packet is aten.is_pinned:
        return False
    if packet in (aten._to_copy, aten.copy_) and not to_gpu:
        if packet is aten.copy_ and not isinstance(args[0], OnGpu):
            return args[0].copy_(contents(args[1]))
        if packet is aten._to_copy and device is not None and torch.device(device).type == "cpu":
            return contents(args[0]).to(kwargs.get("dtype") or args[0].dtype)
    return _absent(func, packet, args, kwargs, on_gpu)


def _cpu(func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if packet in FILLS and args[0].numel() > MANY:
        return args[0]
    if packet in RANDOM:
        size = next((a for a in args if isinstance(a, (list, tuple, torch.Size))), None)
        count = args[0].numel() if isinstance(args[0], Tensor) else functools.reduce(lambda a, b: a * b, size or (), 1)
        if count > MANY:
            with torch.no_grad():
                kwargs = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "device", "memory_format")}
                return (
                    torch.zeros_like(args[0], **kwargs) if isinstance(args[0], Tensor) else torch.zeros(size, **kwargs)
                )
    return func(*args, **kwargs)


def _absent(func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any], on_gpu: Sequence[OnGpu]) -> Any:
    """Shapes by the meta kernels; values too where all of them are known and few."""
    values = None
    few = all(_known(leaf) is not None for leaf in on_gpu) and packet not in UNWRITTEN
    if few and len(on_gpu) <= 16:
        with contextlib.suppress(Exception):
            values = func(*pytree.tree_map(_on_cpu, tuple(args)), **pytree.tree_map(_on_cpu, kwargs))
    writes = _written(func, args, kwargs)
    if writes and packet not in RESHAPES:
        if values is None:
            for target in pytree.tree_leaves(writes):
                if isinstance(target, OnGpu):
                    target.values = None
        returned = [result for result in func._schema.returns]
        if all(result.alias_info is not None and result.alias_info.is_write for result in returned):
            given = [target for target in writes if target is not None]
            return None if not returned else given[0] if len(returned) == 1 else tuple(given)

    def shape(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if isinstance(value, torch.Generator):
            return None
        if isinstance(value, OnGpu) or (isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim):
            return _shape_of(value)
        return value

    given = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    made = func(*pytree.tree_map(shape, tuple(args)), **pytree.tree_map(shape, given))
    if packet in RESHAPES:
        args[0].data = OnGpu(made)
        args[0].values = values
        return args[0]
    shapes, spec = pytree.tree_flatten(made)
    known = pytree.tree_leaves(values) if values is not None else [None] * len(shapes)
    if len(known) != len(shapes):
        known = [None] * len(shapes)
    results = []
    for result, value in zip(shapes, known, strict=True):
        if isinstance(result, Tensor):
            fits = isinstance(value, Tensor) and value.shape == result.shape and value.numel() <= SMALL
            result = OnGpu(result, value if fits else None)
        results.append(result)
    return pytree.tree_unflatten(results, spec)


class Mode(TorchDispatchMode):
    """Sees the operators that have no tensor of the GPU yet: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})


class _Stream:
    """A stream, an event or a graph on which nothing happens."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = DEVICE, 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def is_capturing(self) -> bool:
        return False

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


_GENERATOR = torch.Generator


class _Generator(_GENERATOR):
    """A generator of random numbers; the GPU's is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = _GENERATOR.__new__(cls, device="cpu")
        return made


def _answers(gpu: Gpu) -> dict[str, Any]:
    """What ``torch.cuda`` answers in place of a driver."""
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
    stream, mode = _Stream(), [0]

    def of(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def set_sync_debug_mode(chosen: int | str) -> None:
        mode[0] = {"default": 0, "warn": 1, "error": 2}.get(chosen, 0) if isinstance(chosen, str) else chosen

    found: dict[str, Any] = {
        name: of(value)
        for name, value in {
            "is_available": True,
            "is_initialized": True,
            "_is_compiled": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": gpu.title,
            "get_device_capability": gpu.capability,
            "get_device_properties": properties,
            "is_bf16_supported": True,
            "mem_get_info": (gpu.memory, gpu.memory),
            "memory_stats": {},
            "current_stream": stream,
            "default_stream": stream,
            "graph_pool_handle": (0, 1),
            "is_current_stream_capturing": False,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
        }.items()
    }
    zero = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    nothing = "_lazy_init init synchronize empty_cache reset_peak_memory_stats _sleep set_device manual_seed"
    found |= {name: of(0) for name in zero.split()} | {name: of(None) for name in f"{nothing} manual_seed_all".split()}
    found |= {name: _Stream for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "StreamContext")}
    found |= {
        "default_generators": (_Generator(DEVICE),),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": of(None),
    }
    found |= {"set_sync_debug_mode": set_sync_debug_mode, "get_sync_debug_mode": lambda: mode[0]}
    return found


def forget(prefixes: tuple[str, ...] = ("pmkernels", "pareto_merging", "benchmarks")) -> None:
    """Clear every function cache of those packages: what it keeps may be about another GPU, or none."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in prefixes and module is not None:
            for value in list(vars(module).values()):
                clear = getattr(value, "cache_clear", None)
                if callable(clear):
                    clear()


def _indexed(value: Any) -> Any:
    """A device without a number, for which PyTorch would ask the driver, with one."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return DEVICE if torch.device(value).type == "cuda" else value
    return value


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` that takes a tensor on the absent GPU for what it says it is."""
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, OnGpu):
        args = (other.device, other.dtype, *args[1:])
        kwargs = {name: value for name, value in kwargs.items() if name != "other"}
    return _TO(self, *map(_indexed, args), **{name: _indexed(value) for name, value in kwargs.items()})


def _made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and its like: made on the CPU, then moved."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if isinstance(data, OnGpu) and make.__name__ != "tensor":
            return _to(data, **{k: v for k, v in {"device": device, **kwargs}.items() if v is not None})
        data = contents(data) if isinstance(data, OnGpu) else data
        if _indexed(device) != DEVICE:
            return make(data, *args, device=device, **({"requires_grad": True} if requires_grad else {}), **kwargs)
        return _to(make(data, *args, **kwargs), DEVICE).requires_grad_(requires_grad)

    return made


_TO = Tensor.to
_RUN = threading.Thread.run


def _run(thread: threading.Thread) -> None:
    """A thread's work, under the same mode as the thread that recording began in."""
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
        mock.patch.object(Tensor, "type_as", lambda self, other: _to(self, other)),
        mock.patch.object(Tensor, "pin_memory", lambda self, *_: self.clone()),
        mock.patch.object(Tensor, "is_pinned", lambda self, *_: False),
        mock.patch.object(threading.Thread, "run", _run),
        mock.patch.object(torch.accelerator, "current_stream", lambda *_: _Stream()),
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
        stack.enter_context(Mode())
        yield
