"""What pickles are read as: references, records, tensors, and what torch's functions would make."""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pareto_merging.errors import UserError

MAX_DIMENSIONS = 16


class ForbiddenGlobal(UserError):
    """A pickle names, or calls, something that could run code."""


class Global(NamedTuple):
    """A class or function by reference: never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_class(self) -> bool:
        """Return whether it is named like a class. Then an inert record can stand for an instance."""
        return self.name.rpartition(".")[2].lstrip("_")[:1].isupper()

    @property
    def is_script(self) -> bool:
        """Return whether it is a class of TorchScript's."""
        return self.module.partition(".")[0] == "__torch__"


_FLOATS = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16}
_INTEGERS = {"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16}
_BYTES = {"CharStorage": torch.int8, "ByteStorage": torch.uint8, "UntypedStorage": torch.uint8}
STORAGES = _FLOATS | _INTEGERS | _BYTES | {"BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}

OTHER_DTYPES = {
    str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype | torch.layout)
} - DTYPES.keys()

_BUILTINS = ("builtins", "__builtin__")
_PLAIN_TYPES = ("set", "frozenset", "list", "tuple", "dict", "int", "float", "bool", "str", "bytes", "complex", "slice")
# of forbidden families, what checkpoints hold as data; nothing of it is ever called
INERT = {
    *((module, name) for module in _BUILTINS for name in (*_PLAIN_TYPES, "object", "bytearray", "range")),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
    *(("datetime", name) for name in ("datetime", "date", "timedelta", "timezone")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("typing", "Any"),
    ("collections", "deque"),
    ("torch.torch_version", "TorchVersion"),
    ("torch", "device"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
}
_INERT_FAMILIES = ("torch.nn.modules", "torch.nn.parallel", "torch.optim", "torch.amp", "torch.cuda.amp")
# functions that modules keep as attributes
_REFERENCES = ("torch.nn.functional", "torch._C._nn")
_OTHER_LIBRARIES = {"torch", "numpy", "pip", "setuptools", "pkg_resources", "_distutils_hack", "dill", "cloudpickle"}
_PYTHON_2 = {"__builtin__", "copy_reg", "cPickle", "commands", "popen2", "os2", "nt", "ce", "exceptions", "new", "imp"}
NAMES_TODAY = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess", "posix": "os", "nt": "os"}
_FORBIDDEN = sys.stdlib_module_names | _OTHER_LIBRARIES | _PYTHON_2
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
MAX_NAME = 256


def is_name(text: str) -> bool:
    """Return whether a text is a dotted name of Python's, and not too long."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


def is_allowed(named: Global) -> bool:
    """Return whether a pickle may name this. What could run code if it were called may not be named."""
    module, name = named
    package = module.partition(".")[0]
    # storages and dtypes of numbers that no weights of ours are, too
    if named in INERT or is_storage(named) or (module == "torch" and name in {*DTYPES, *OTHER_DTYPES}):
        return True
    in_family = any(f"{module}.".startswith(f"{family}.") for family in _INERT_FAMILIES)
    if named.is_script or (in_family and named.is_class and "." not in name):
        return True
    if module in _REFERENCES and name.isidentifier() and not name.startswith("__"):
        return True
    return not (package in _FORBIDDEN or package == "__builtins__" or "__" in name)


def is_storage(kind: Global) -> bool:
    """Return whether a reference is a class of storages, of whatever numbers."""
    return kind.module in _STORAGE_MODULES and kind.name.endswith("Storage") and kind.is_class and "." not in kind.name


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
    """Set items of a dictionary whose keys are text, given keys and values in turns."""
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
    dtype = storage.dtype if dtype is None else dtype
    size = storage.size * storage.dtype.itemsize // dtype.itemsize
    numbers = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if numbers > size or (numbers and last >= size):
        raise Broken(f"a tensor of shape {list(shape)} in a storage of {size} numbers")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> StoredTensor | Record:
    kind = arguments[6] if len(arguments) > 6 else None
    if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in {*DTYPES, *OTHER_DTYPES}:
        raise Broken(f"a tensor of type {kind if isinstance(kind, Global) else type(kind).__name__}")
    is_ours = kind.name in DTYPES
    return _rebuild_tensor(arguments, DTYPES[kind.name]) if is_ours else Record(Global("torch", "Tensor"))


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
