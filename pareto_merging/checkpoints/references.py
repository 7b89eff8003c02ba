"""Classes and functions that a pickle may name. They stand for data, and nothing calls them."""

import re
import sys
from typing import Any, NamedTuple

import torch

from pareto_merging.errors import UserError


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


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}

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


def storage_dtype(kind: Any) -> torch.dtype | None:
    """Return the type of the numbers in a class of storages. None stands for any other class."""
    if not isinstance(kind, Global) or kind.module not in _STORAGE_MODULES:
        return None
    return _STORAGES.get(kind.name)


def is_storage(kind: Global) -> bool:
    """Return whether a reference is a class of storages, of whatever numbers."""
    return kind.module in _STORAGE_MODULES and kind.name.endswith("Storage") and kind.is_class and "." not in kind.name
