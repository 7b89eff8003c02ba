"""A CUDA GPU that is not there. Tensors say that they lie on it, have shapes and no memory, and nothing is computed.

What runs on the CPU is really computed; what runs on ``cuda`` gets shapes, strides and types only (by PyTorch's meta
kernels). Reading a number of it gives 1, and whether two are equal True, except that a few numbers (preferences,
offsets, labels) are kept and computed beside their tensor, as code reads and checks them. Operators of this library run
their real Python, down to the launch.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
aten = torch.ops.aten

UNWRITTEN = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
RANDOM = {aten.randn, aten.rand, aten.randn_like, aten.rand_like, aten.randint}
FILLS = {aten.normal_, aten.uniform_, aten.random_, aten.exponential_, aten.erfinv_}
# what these do in place to a shape has to be done
RESHAPES = {aten.resize_, aten.set_, aten.t_, aten.transpose_, aten.squeeze_, aten.unsqueeze_, aten.as_strided_}
_IS_META = torch._C.TensorBase.is_meta.__get__  # type: ignore[attr-defined]


def absent(value: Any) -> bool:
    """Say whether a value is a tensor of the GPU that is not there.

    To PyTorch's C++ it is on the meta device, which wants neither driver nor streams.
    """
    return isinstance(value, Tensor) and _IS_META(value)


def _known(tensor: Tensor) -> Tensor | None:
    """Return the values of a tensor where they are known. Nobody may have given it another shape since."""
    values: Tensor | None = tensor.__dict__.get(VALUES)
    return values if values is not None and values.shape == tensor.shape else None


def contents(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU. Unknown values are ones and True, zeros in large ones and integers."""
    if not absent(tensor):
        return tensor
    values = _known(tensor)
    if values is not None:
        return values.clone()
    if tensor.numel() > MANY or not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.ones(tensor.shape, dtype=tensor.dtype)


class _Schema(NamedTuple):
    """Which arguments an operator writes to, and whether it returns those alone, or views."""

    writes: list[tuple[int, str]]
    returned: int
    only_written: bool
    new: bool


@functools.cache
def _schema(func: Any) -> _Schema:
    arguments, returns = func._schema.arguments, func._schema.returns
    writes = [(n, a.name) for n, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    written = all(result.alias_info is not None and result.alias_info.is_write for result in returns)
    new = not writes and all(result.alias_info is None for result in returns)
    return _Schema(writes, len(returns), bool(writes) and written, new)


def _leaves(values: Iterable[Any]) -> list[Any]:
    """Return arguments with those of lists; operators nest no deeper."""
    return [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else (value,))]


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
    """Run one operator of PyTorch. It is on the GPU that is not there if it has to do with it, else on the CPU."""
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


# what an operator returns for arguments of those shapes: types, shapes and strides
_CACHE: dict[Any, Any] = {}


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride()
    return type(leaf), leaf


def _shapes(
    func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any], leaves: list[Any], on_gpu: list[Tensor]
) -> Any:
    """Compute shapes by PyTorch's meta kernels, and values where all are known and few."""
    values = None
    if packet not in UNWRITTEN and len(on_gpu) <= 16 and all(_known(leaf) is not None for leaf in on_gpu):
        # not all that is known can be computed
        with contextlib.suppress(Exception):
            on_cpu, named = _map(_on_cpu, args, kwargs)
            values = func(*on_cpu, **named)
    schema = _schema(func)
    if schema.writes:
        values_given = (args[n] if n < len(args) else kwargs.get(name) for n, name in schema.writes)
        targets = [value for value in values_given if value is not None]
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
            values, named = _map(_on_meta, args, given)
            return func(*values, **named)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "meta" not in str(error).lower():
            raise
        # a shape that depends on values: what there is instead of them decides
        read = functools.partial(_on_cpu, read=contents)
        values, named = _map(read, args, given)
        made = func(*values, **named)
        return pytree.tree_map_only(Tensor, _on_meta, made)


def _remembered(func: Any, args: Sequence[Any], kwargs: dict[str, Any], leaves: list[Any]) -> Any:
    """Return what a function returns, computed once for arguments of one kind."""
    try:
        lengths = tuple(len(value) if isinstance(value, (list, tuple)) else -1 for value in args)
        key = (func, tuple(map(_signature, leaves)), tuple(kwargs), len(args), lengths)
        layout = _CACHE.get(key)
    except TypeError:
        return _computed(func, args, kwargs)
    if layout is None:
        made = _computed(func, args, kwargs)
        results, spec = pytree.tree_flatten(made)
        plain = all(isinstance(result, Tensor) and not result.storage_offset() for result in results)
        if plain and len(_CACHE) < 100_000:
            _CACHE[key] = [(r.shape, r.stride(), r.dtype) for r in results], spec
        return made
    made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in layout[0]]
    return pytree.tree_unflatten(made, layout[1])


_LOCAL = threading.local()


class _Inside:
    """A block in which tensors say that they are on the meta device. PyTorch's own shape functions have to know."""

    def __enter__(self) -> None:
        _LOCAL.inside = getattr(_LOCAL, "inside", 0) + 1

    def __exit__(self, *_: Any) -> None:
        _LOCAL.inside -= 1


def says_cuda(tensor: Tensor) -> bool:
    """Say whether code that asks a tensor is told ``cuda``."""
    return _IS_META(tensor) and not getattr(_LOCAL, "inside", 0)


class Mode(TorchDispatchMode):
    """Sees every operator of PyTorch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})
