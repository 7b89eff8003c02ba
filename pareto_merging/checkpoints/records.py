"""Records and tensors that pickles are read as, and what torch's functions would make."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pareto_merging.checkpoints.references import DTYPES, OTHER_DTYPES, Global

MAX_DIMENSIONS = 16


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object of the file, with its class, its arguments, its attributes and its items."""

    type: Global
    arguments: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)


class Storage(NamedTuple):
    """The memory of one or more tensors, with its key in the file."""

    key: str
    dtype: torch.dtype
    size: int


class StoredTensor(NamedTuple):
    """A tensor that has not been read. It lies within ``storage`` and is no larger (both checked)."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Broken(Exception):
    """What is wrong with a pickle, said without its name."""


def is_size(value: Any) -> bool:
    """Return whether a value is a number of things that could be there."""
    # True is an int in Python
    return type(value) is int and 0 <= value < 2**50


def set_items(target: dict[str, Any], pairs: list[Any]) -> None:
    """Set those items of a dictionary whose keys are text, of keys and values in turns."""
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # no checkpoint needs other keys, and hashing what a stranger made can take for ever
        if type(key) is str:
            if key in target:
                raise Broken(f"the key {key[:80]!r} twice")
            target[key] = value


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS or not all(map(is_size, value)):
        raise Broken(f"a tensor with a broken {what}")
    return tuple(value)


def _rebuild_tensor(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> StoredTensor | Record:
    if arguments and isinstance(arguments[0], Record) and arguments[0].type.name.endswith("Storage"):
        # complex or 8-bit numbers, which no weights of ours are: kept as a record
        return Record(Global("torch", "Tensor"))
    if len(arguments) < 4 or not isinstance(arguments[0], Storage) or not is_size(arguments[1]):
        raise Broken("a tensor without a storage")
    storage, offset = arguments[0], arguments[1]
    shape, stride = _sizes(arguments[2], "shape"), _sizes(arguments[3], "stride")
    if len(shape) != len(stride):
        raise Broken("a tensor with a broken stride")
    if dtype is None:
        dtype, size = storage.dtype, storage.size
    else:
        size = storage.size * storage.dtype.itemsize // dtype.itemsize
    numbers = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if numbers > size or (numbers and last >= size):
        raise Broken(f"a tensor of shape {list(shape)} in a storage of {size} numbers")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> StoredTensor | Record:
    kind = arguments[6] if len(arguments) > 6 else None
    if isinstance(kind, Global) and kind.module == "torch" and kind.name in OTHER_DTYPES:
        return Record(Global("torch", "Tensor"))
    if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in DTYPES:
        raise Broken(f"a tensor of type {kind if isinstance(kind, Global) else type(kind).__name__}")
    return _rebuild_tensor(arguments, DTYPES[kind.name])


def _rebuild_from_type(arguments: tuple[Any, ...]) -> Any:
    # a tensor with attributes of Python's: (function, class, its arguments, attributes)
    function = arguments[0] if len(arguments) == 4 and isinstance(arguments[0], Global) else None
    if function not in CALLS or not str(function).startswith("torch._utils._rebuild_"):
        raise Broken("a call of torch._tensor._rebuild_from_type_v2 of what rebuilds no tensor")
    if not isinstance(arguments[2], tuple):
        raise Broken("a tensor that is rebuilt without a tuple of arguments")
    return CALLS[function](arguments[2])


def _rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor | Record:
    if not arguments or not isinstance(arguments[0], StoredTensor | Record):
        raise Broken("a parameter without a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    ordered: dict[str, Any] = {}
    for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Broken("a dictionary that is no list of pairs")
        set_items(ordered, list(pair))
    return ordered


def _first(arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        raise Broken("a call without arguments")
    return arguments[0]


def _reconstruct(arguments: tuple[Any, ...]) -> Record:
    cls = _first(arguments)
    if not isinstance(cls, Global) or not cls.is_class:
        raise Broken("an object of what is no class")
    return Record(cls)


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text = _first(arguments)
    if not isinstance(text, str) or arguments[1:] not in (("latin1",), ("latin-1",)):
        raise Broken("bytes in an unknown encoding")
    return text.encode("latin-1")


CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda arguments: _sizes(_first(arguments), "size"),
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda arguments: {},
    ("collections", "Counter"): lambda arguments: {},
    # bytes in protocol 2, objects in protocol 0 and 1
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copy_reg", "_reconstructor"): _reconstruct,
    # TorchScript's lists
    **{
        ("torch.jit._pickle", name): _first
        for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    },
}
