"""A CUDA GPU that is not there: tensors say that they lie on it, have shapes and no memory, and nothing is computed.

What runs on the CPU is really computed; what runs on ``cuda`` gets shapes, strides and types only (by PyTorch's meta
kernels). Reading a number of it gives 1, and whether two are equal True, except that a few numbers (preferences,
offsets, labels) are kept and computed beside their tensor, as code reads and checks them. Operators of this library run
their real Python, down to the launch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# a tensor with at most so many elements keeps its values beside it, as this attribute
SMALL, VALUES = 4096, "_values_on_cpu"
# random numbers on the CPU from so many on are all the same, but not those of the call before: nothing that is recorded
# depends on them, but on whether a copy of a model differs from it
MANY = 2**16
_CONSTANTS = itertools.cycle(n / 1000 for n in range(1, 98))
# where memory begins
ADDRESS = 2**40
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

UNWRITTEN = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
RANDOM = {aten.randn, aten.rand, aten.randn_like, aten.rand_like, aten.randint}
FILLS = {aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.erfinv_}
# what these do in place to a shape has to be done
RESHAPES = {aten.resize_, aten.set_, aten.t_, aten.transpose_, aten.squeeze_, aten.unsqueeze_, aten.as_strided_}
_IS_META, _DEVICE = torch._C.TensorBase.is_meta.__get__, torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


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


def absent(value: Any) -> bool:
    """Whether a value is a tensor of the GPU that is not there: to PyTorch's C++ it is on the meta device, which wants
    neither driver nor streams."""
    return isinstance(value, Tensor) and _IS_META(value)


def _known(tensor: Tensor) -> Tensor | None:
    """The values of a tensor where they are known and nobody has given it another shape since."""
    values: Tensor | None = tensor.__dict__.get(VALUES)
    return values if values is not None and values.shape == tensor.shape else None


def contents(tensor: Tensor) -> Tensor:
    """A tensor on the CPU: its values where they are known, else ones and True; zeros where it is large or integers."""
    if not absent(tensor):
        return tensor
    values = _known(tensor)
    if values is not None:
        return values.clone()
    if tensor.numel() > MANY or not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.ones(tensor.shape, dtype=tensor.dtype)


@dataclass(frozen=True)
class _Schema:
    """Of an operator: which arguments it writes to, whether it returns those alone, and whether it returns views."""

    writes: tuple[tuple[int, str], ...]
    returned: int
    only_written: bool
    new: bool

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that are written to, of those given."""
        found = [args[place] if place < len(args) else kwargs.get(name) for place, name in self.writes]
        return [value for value in found if value is not None]


@functools.cache
def _schema(func: Any) -> _Schema:
    arguments, returns = func._schema.arguments, func._schema.returns
    writes = [(n, a.name) for n, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    written = all(result.alias_info is not None and result.alias_info.is_write for result in returns)
    new = not writes and all(result.alias_info is None for result in returns)
    return _Schema(tuple(writes), len(returns), bool(writes) and written, new)


def _leaves(values: Iterable[Any]) -> list[Any]:
    """Arguments with those of lists; operators nest no deeper."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += value
        else:
            found.append(value)
    return found


def _map(
    function: Callable[[Any], Any], values: Sequence[Any], named: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    def one(value: Any) -> Any:
        return [function(item) for item in value] if isinstance(value, (list, tuple)) else function(value)

    return [one(value) for value in values], {name: one(value) for name, value in named.items()}


def _on_cpu(value: Any, read: Callable[[Tensor], Any] = _known) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return read(value) if absent(value) else value


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, Tensor) and value.ndim and not _IS_META(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def execute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operator of PyTorch: on the GPU that is not there if it has to do with it, else on the CPU."""
    leaves = _leaves([*args, *kwargs.values()])
    on_gpu = [leaf for leaf in leaves if absent(leaf)]
    device = kwargs.get("device")
    to = None if device is None else torch.device(device).type
    packet = func.overloadpacket
    if not on_gpu and to not in ("cuda", "meta"):
        return _cpu(func, packet, args, kwargs)
    definition = OPDEFS.get(func._schema.name)
    if definition is not None and func.namespace != "prims":
        with Mode():
            return definition._init_fn(*args, **kwargs)
    if packet is aten._local_scalar_dense:
        return contents(args[0]).item()
    if packet is aten.equal:
        one, other = (_known(leaf) if absent(leaf) else leaf for leaf in args)
        return one is None or other is None or torch.equal(one, other)
    if packet is aten._to_copy and to == "cpu":
        return contents(args[0]).to(kwargs.get("dtype") or args[0].dtype)
    if packet is aten.copy_ and not absent(args[0]):
        return args[0].copy_(contents(args[1]))
    return _shapes(func, packet, args, kwargs, leaves, on_gpu)


def _cpu(func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if packet in FILLS and args[0].numel() > MANY:
        return args[0].fill_(next(_CONSTANTS))
    if packet in RANDOM:
        like = args[0] if isinstance(args[0], Tensor) else None
        size = like.shape if like is not None else next(a for a in args if isinstance(a, (list, tuple)))
        if math.prod(size) > MANY:
            given = {k: v for k, v in kwargs.items() if k in ("dtype", "layout", "device", "memory_format")}
            made = torch.empty(size, **given) if like is None else torch.empty_like(like, **given)
            return made.fill_(next(_CONSTANTS))
    return func(*args, **kwargs)


def _few_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result where every value is known: None where it is not, or cannot be computed."""
    try:
        args, kwargs = _map(_on_cpu, args, kwargs)
        return func(*args, **kwargs)
    except Exception:
        return None


# what an operator returns for arguments of those shapes: types, shapes and strides
_CACHE: dict[Any, Any] = {}


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride()
    return type(leaf), leaf


def _shapes(
    func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any], leaves: list[Any], on_gpu: list[Tensor]
) -> Any:
    """Shapes by PyTorch's meta kernels; values too where all of them are known and few."""
    values = None
    if packet not in UNWRITTEN and len(on_gpu) <= 16 and all(_known(leaf) is not None for leaf in on_gpu):
        values = _few_values(func, args, kwargs)
    schema = _schema(func)
    if schema.writes:
        targets = schema.written(args, kwargs)
        for target in _leaves(targets) if values is None else ():
            if absent(target):
                target.__dict__[VALUES] = None
        if schema.only_written and packet not in RESHAPES:
            return None if not schema.returned else targets[0] if schema.returned == 1 else tuple(targets)
    made = _remembered(func, args, kwargs, leaves) if schema.new else _computed(func, args, kwargs)
    if values is not None:
        results, known = ([one] if isinstance(one, Tensor) else pytree.tree_leaves(one) for one in (made, values))
        for result, value in zip(results, known, strict=False):
            if isinstance(result, Tensor) and isinstance(value, Tensor) and value.numel() <= SMALL:
                result.__dict__[VALUES] = value
    return made


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    try:
        with _Inside():
            there, named = _map(_on_meta, args, given)
            return func(*there, **named)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "meta" not in str(error).lower():
            raise
        # a shape that depends on values: what there is instead of them decides
        read = functools.partial(_on_cpu, read=contents)
        there, named = _map(read, args, given)
        made = func(*there, **named)
        return pytree.tree_map_only(Tensor, _on_meta, made)


def _remembered(func: Any, args: Sequence[Any], kwargs: dict[str, Any], leaves: list[Any]) -> Any:
    """What a function returns, computed once for arguments of one kind."""
    try:
        key = (func, tuple(map(_signature, leaves)), tuple(kwargs), len(args), tuple(map(_length, args)))
        found = _CACHE.get(key)
    except TypeError:
        return _computed(func, args, kwargs)
    if found is None:
        made = _computed(func, args, kwargs)
        results, spec = pytree.tree_flatten(made)
        plain = all(isinstance(result, Tensor) and not result.storage_offset() for result in results)
        if plain and len(_CACHE) < 100_000:
            _CACHE[key] = [(r.shape, r.stride(), r.dtype) for r in results], spec
        return made
    made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in found[0]]
    return pytree.tree_unflatten(made, found[1])


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else -1


_LOCAL = threading.local()


class _Inside:
    """Within: a tensor says that it is on the meta device, as PyTorch's own shape functions have to know."""

    def __enter__(self) -> None:
        _LOCAL.inside = getattr(_LOCAL, "inside", 0) + 1

    def __exit__(self, *_: Any) -> None:
        _LOCAL.inside -= 1


def _says_cuda(tensor: Tensor) -> bool:
    return _IS_META(tensor) and not getattr(_LOCAL, "inside", 0)


class Mode(TorchDispatchMode):
    """Sees every operator of PyTorch."""

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
        made: _Generator = _GENERATOR.__new__(cls, device="cpu")  # type: ignore[call-arg]
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
            "memory_stats": defaultdict(int),
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
    found |= dict.fromkeys(("Stream", "Event", "CUDAGraph", "graph", "stream", "StreamContext"), _Stream)
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
    """``Tensor.to`` that asks no driver which GPU is meant."""
    return _TO(self, *map(_indexed, args), **{name: _indexed(value) for name, value in kwargs.items()})


def _made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and its like: made on the CPU, then moved."""

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
    """The address of a tensor's memory: no two alike on the absent GPU, aligned as the caching allocator aligns."""
    return ADDRESS + (self._cdata << 8) if self.device.type == "meta" else _STORAGE_ADDRESS(self)


def _data_ptr(self: Tensor) -> int:
    if not _IS_META(self):
        return _ADDRESS(self)
    return _storage_address(self.untyped_storage()) + int(self.storage_offset()) * self.element_size()


def _numpy(self: Tensor, *, force: bool = False) -> Any:
    if _IS_META(self) and not force:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _NUMPY(contents(self), force=force)


def _repr(self: Tensor, *, tensor_contents: Any = None) -> str:
    if _IS_META(self):
        return f"tensor(..., device='{DEVICE}', size={tuple(self.shape)}, dtype={self.dtype})"
    return _REPR(self, tensor_contents=tensor_contents)  # type: ignore[call-arg]


_REPR = Tensor.__repr__
_TO, _TOLIST, _NUMPY, _ADDRESS = Tensor.to, Tensor.tolist, Tensor.numpy, Tensor.data_ptr
_STORAGE_ADDRESS = torch.UntypedStorage.data_ptr
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
        mock.patch.object(Tensor, "pin_memory", lambda self, *_: self.clone()),
        mock.patch.object(Tensor, "is_pinned", return_value=False),
        mock.patch.object(Tensor, "device", property(lambda self: DEVICE if _says_cuda(self) else _DEVICE(self))),
        mock.patch.object(Tensor, "is_cuda", property(_says_cuda)),
        mock.patch.object(Tensor, "is_meta", property(lambda self: _IS_META(self) and not _says_cuda(self))),
        mock.patch.object(Tensor, "get_device", lambda self: 0 if _IS_META(self) else -1),
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
        stack.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(Mode())
        yield
