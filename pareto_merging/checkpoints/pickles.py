"""A pickle read as data: a machine that follows the opcodes and never imports, calls or builds anything of the file's.

What comes out are dictionaries with strings as keys, lists, tuples, numbers and text; a :class:`Global` for each class
or function that is named; a :class:`Record` for each object; and a :class:`StoredTensor` for each tensor, which says
where its bytes lie. Python's own ``pickle`` is not used: even a restricted one hashes keys, fills registries and trusts
lengths before it has seen the bytes.
"""

from __future__ import annotations

import copyreg
import math
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from pareto_merging.errors import UserError

# far beyond any checkpoint's: a ViT-L/14 with its optimiser stays below 1 MB and 100,000 opcodes
MAX_BYTES, MAX_OPCODES, MAX_LINE, MAX_NAME = 2**26, 300_000, 2**16, 256
# entries (and 64 characters each of text) copied from what the memo holds, where one byte can mean millions of them
MAX_COPIED = 2**19
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
        """Whether it is named like a class, so that an inert record can stand for an instance."""
        return self.name.rpartition(".")[2].lstrip("_")[:1].isupper()


class Record:
    """An object of the file: its class, what it was made with, its attributes, and its items if it holds some."""

    __slots__ = ("arguments", "items", "state", "type")

    def __init__(self, type_: Global, arguments: tuple[Any, ...] = ()) -> None:
        self.type = type_
        self.arguments = arguments
        self.state: dict[str, Any] = {}
        self.items: list[Any] = []


class Storage(NamedTuple):
    """The memory of one or more tensors: its key in the file, its type and its number of elements."""

    key: str
    dtype: torch.dtype
    size: int


class StoredTensor(NamedTuple):
    """A tensor that has not been read: it lies within ``storage`` and is no larger (both checked)."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(stream: BinaryIO, source: str, storages: dict[str, Storage] | None = None) -> Any:
    """One pickle as data; the stream is left behind it.

    Args:
        stream: positioned at the pickle. source: what to call it in errors. storages: filled with every storage that
            the pickle names, by key.

    Raises:
        ForbiddenGlobal: it names something that could run code, or calls what is no class; the text names it.
        UserError: it is broken, longer than any checkpoint's, or uses what no checkpoint needs.
    """
    return _Machine(stream, source, {} if storages is None else storages).run()


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
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}

_OTHER_DTYPES = {
    str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype | torch.layout)
} - _DTYPES.keys()

_BUILTINS = ("builtins", "__builtin__")
_PLAIN_TYPES = ("set", "frozenset", "list", "tuple", "dict", "int", "float", "bool", "str", "bytes", "complex", "slice")
# of forbidden families, what checkpoints hold as data; nothing of it is ever called
_INERT = {
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
_NAMES_TODAY = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess", "posix": "os", "nt": "os"}
_FORBIDDEN = sys.stdlib_module_names | _OTHER_LIBRARIES | _PYTHON_2
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MARK = object()


class _Broken(Exception):
    """What is wrong with a pickle, said without its name."""


class _Machine:
    """The stack machine of the pickle protocol (0 to 5), over inert values."""

    def __init__(self, stream: BinaryIO, source: str, storages: dict[str, Storage]) -> None:
        self.stream, self.source, self.storages = stream, source, storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.used = self.copied = 0

    def run(self) -> Any:
        try:
            for _ in range(MAX_OPCODES):
                code = self.take(1)[0]
                if code == 0x2E:
                    return self.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise _Broken(f"no pickle opcode 0x{code:02x}")
                operation(self)
            raise _Broken(f"more than {MAX_OPCODES} opcodes")
        except _Broken as error:
            raise UserError(f"{self.source}: expected a checkpoint's pickle, got {error}") from None
        except UserError:
            raise
        except (ValueError, struct.error, OverflowError) as error:
            # a number or a text that cannot be decoded
            what = " ".join(str(error).split())[:120]
            raise UserError(f"{self.source}: expected a checkpoint's pickle, got broken data ({what})") from None

    # --- bytes ---

    def take(self, count: int) -> bytes:
        self.used += count
        if count > MAX_BYTES or self.used > MAX_BYTES:
            raise _Broken(f"more than {MAX_BYTES} bytes of it")
        data = self.stream.read(count)
        if len(data) != count:
            raise _Broken("an end in the middle")
        return data

    def charge(self, *values: Any) -> None:
        """Count what is about to be copied."""
        self.copied += sum(len(value) for value in values if isinstance(value, dict | list | tuple))
        self.copied += sum(len(value) // 64 for value in values if isinstance(value, str | bytes))
        if self.copied > MAX_COPIED:
            raise _Broken(f"more than {MAX_COPIED} copies of what it holds once")

    def line(self, encoding: str = "utf-8") -> str:
        data = self.stream.readline(MAX_LINE)
        self.used += len(data)
        if not data.endswith(b"\n"):
            raise _Broken("a line without an end")
        return data[:-1].decode(encoding)

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if value < 0:
            raise _Broken("a negative length")
        return value

    # --- the stack ---

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Broken("an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Broken("an empty stack")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise _Broken("a missing mark")

    def put(self, index: int) -> None:
        if index >= 2**32:
            raise _Broken("a memo of that size")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Broken("a memo that was not written")
        self.push(self.memo[index])

    # --- containers ---

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if len(pairs) % 2:
            raise _Broken("a key without a value")
        if isinstance(target, Record):
            target.items += zip(pairs[::2], pairs[1::2], strict=True)
        elif isinstance(target, dict):
            for key, value in _string_keys(pairs):
                if key in target:
                    raise _Broken(f"the key {key[:80]!r} twice")
                target[key] = value
        else:
            raise _Broken("items for what is no dictionary")

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Record):
            target.items += values
        elif isinstance(target, list):
            target += values
        else:
            raise _Broken("items for what is no list")

    # --- references, objects and calls ---

    def global_(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise _Broken("the name of a class that is no text")
        found = Global(module[: MAX_NAME + 1], name[: MAX_NAME + 1])
        if max(len(module), len(name)) > MAX_NAME:
            raise self.forbidden(found, "names")
        if not (_NAME.fullmatch(module) and _NAME.fullmatch(name)):
            raise self.forbidden(found, "names")
        key = (module, name)
        if key in _CALLS or key in _INERT or _storage_dtype(found) or (module == "torch" and name in _DTYPES):
            return found
        if module == "__torch__" or module.startswith("__torch__."):
            return found
        if _is_storage(found) or (module == "torch" and name in _OTHER_DTYPES):
            # of numbers that no weights of ours are
            return found
        if _within(module, _INERT_FAMILIES) and found.is_class and "." not in name:
            return found
        if module in _REFERENCES and name.isidentifier() and not name.startswith("__"):
            return found
        if module.partition(".")[0] in _FORBIDDEN or "__" in name or (module + ".").startswith("__builtins__."):
            raise self.forbidden(found, "names")
        return found

    def forbidden(self, found: Global, what: str) -> ForbiddenGlobal:
        shown = str(found) if len(str(found)) <= MAX_NAME and _NAME.fullmatch(str(found)) else repr(str(found)[:120])
        if found.module in _NAMES_TODAY and _NAME.fullmatch(str(found)):
            # protocols up to 2 write Python 2's names, and os is spelled by the system's own module
            shown += f" ({_NAMES_TODAY[found.module]}.{found.name})"
        return ForbiddenGlobal(f"{self.source}: refused: its pickle {what} {shown}, which could run code; nothing ran")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            raise _Broken("a call of what is no class")
        if not isinstance(arguments, tuple):
            raise _Broken(f"a call of {str(function)[:120]} without a tuple of arguments")
        handler = _CALLS.get((function.module, function.name))
        if handler is not None:
            self.charge(arguments, *arguments)
            return handler(arguments)
        return self.instance(function, arguments)

    def instance(self, cls: Any, arguments: Any) -> Record:
        if not isinstance(cls, Global):
            raise _Broken("an object of what is no class")
        if not isinstance(arguments, tuple):
            raise _Broken(f"an object of {str(cls)[:120]} without a tuple of arguments")
        is_script = cls.module.partition(".")[0] == "__torch__"
        if not (cls.is_class or is_script or (cls.module, cls.name) in _INERT):
            raise self.forbidden(cls, "calls")
        return Record(cls, arguments)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            # (attributes, slots) of an object with both
            for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
                if isinstance(part, dict):
                    self.charge(part)
                    twice = target.state.keys() & part.keys()
                    if twice:
                        raise _Broken(f"the attribute {min(twice)[:80]!r} twice")
                    target.state.update(part)
        elif not isinstance(target, dict | StoredTensor):
            raise _Broken("attributes for what is no object")

    def persistent(self, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
            _, kind, key, _, size = identity[:5]
            dtype = _storage_dtype(kind)
            if dtype is None and isinstance(kind, Global) and _is_storage(kind):
                return Record(kind)
            if dtype is None:
                raise _Broken(f"a storage of type {kind if isinstance(kind, Global) else type(kind).__name__}")
            if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,20}", key, re.ASCII):
                raise _Broken(f"a storage with the key {key[:80] if isinstance(key, str) else type(key).__name__!r}")
            if not _is_size(size):
                raise _Broken("a storage of no size")
            if len(identity) == 6 and identity[5] is not None:
                raise _Broken("a view of a storage (torch before 0.4)")
            storage = Storage(key, dtype, size)
            if self.storages.setdefault(key, storage) != storage:
                raise _Broken(f"two sizes or types for storage {key}")
            return storage
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            # the legacy format keeps a module's source beside its class
            cls = identity[1]
            if not isinstance(cls, Global):
                raise _Broken("a module without a class")
            return cls
        shown = identity[:80] if isinstance(identity, str) else type(identity).__name__
        raise _Broken(f"an unknown persistent id ({shown!r})")

    def extension(self, form: str) -> None:
        code = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        # only to name it: the registry of this process says what the code would have meant here
        known = getattr(copyreg, "_inverted_registry", {}).get(code)
        raise self.forbidden(Global(*known) if known else Global("copyreg", f"extension_{code}"), "names")


def _within(module: str, families: tuple[str, ...]) -> bool:
    return any(module == family or module.startswith(f"{family}.") for family in families)


def _storage_dtype(kind: Any) -> torch.dtype | None:
    if not isinstance(kind, Global) or kind.module not in _STORAGE_MODULES:
        return None
    return _STORAGES.get(kind.name)


def _is_storage(kind: Global) -> bool:
    return kind.module in _STORAGE_MODULES and kind.name.endswith("Storage") and kind.is_class and "." not in kind.name


def _is_size(value: Any) -> bool:
    # True is an int in Python
    return type(value) is int and 0 <= value < 2**50


def _string_keys(pairs: list[Any]) -> list[tuple[str, Any]]:
    # no checkpoint needs others, and hashing what a stranger made can take for ever
    return [(key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True) if type(key) is str]


# --- what torch's own functions would have made ---


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise _Broken(f"a tensor with a broken {what}")
    return tuple(value)


def _rebuild_tensor(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> StoredTensor | Record:
    if arguments and isinstance(arguments[0], Record) and arguments[0].type.name.endswith("Storage"):
        # complex or 8-bit numbers, which no weights of ours are: kept as a record
        return Record(Global("torch", "Tensor"))
    if len(arguments) < 4 or not isinstance(arguments[0], Storage) or not _is_size(arguments[1]):
        raise _Broken("a tensor without a storage")
    storage, offset = arguments[0], arguments[1]
    shape, stride = _sizes(arguments[2], "shape"), _sizes(arguments[3], "stride")
    if len(shape) != len(stride):
        raise _Broken("a tensor with a broken stride")
    if dtype is None:
        dtype, size = storage.dtype, storage.size
    else:
        size = storage.size * storage.dtype.itemsize // dtype.itemsize
    numbers = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if numbers > size or (numbers and last >= size):
        raise _Broken(f"a tensor of shape {list(shape)} in a storage of {size} numbers")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> StoredTensor | Record:
    kind = arguments[6] if len(arguments) > 6 else None
    if isinstance(kind, Global) and kind.module == "torch" and kind.name in _OTHER_DTYPES:
        return Record(Global("torch", "Tensor"))
    if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in _DTYPES:
        raise _Broken(f"a tensor of type {kind if isinstance(kind, Global) else type(kind).__name__}")
    return _rebuild_tensor(arguments, _DTYPES[kind.name])


def _rebuild_from_type(arguments: tuple[Any, ...]) -> Any:
    # a tensor with attributes of Python's: (function, class, its arguments, attributes)
    function = (
        _CALLS.get((arguments[0].module, arguments[0].name))
        if len(arguments) == 4 and isinstance(arguments[0], Global)
        else None
    )
    if function is None or not str(arguments[0]).startswith("torch._utils._rebuild_"):
        raise _Broken("a call of torch._tensor._rebuild_from_type_v2 of what rebuilds no tensor")
    if not isinstance(arguments[2], tuple):
        raise _Broken("a tensor that is rebuilt without a tuple of arguments")
    return function(arguments[2])


def _rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor | Record:
    if not arguments or not isinstance(arguments[0], StoredTensor | Record):
        raise _Broken("a parameter without a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if arguments and isinstance(arguments[0], list):
        for pair in arguments[0]:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise _Broken("a dictionary that is no list of pairs")
            for key, value in _string_keys(list(pair)):
                if key in found:
                    raise _Broken(f"the key {key[:80]!r} twice")
                found[key] = value
    return found


def _first(arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        raise _Broken("a call without arguments")
    return arguments[0]


def _reconstruct(arguments: tuple[Any, ...]) -> Record:
    cls = _first(arguments)
    if not isinstance(cls, Global) or not cls.is_class:
        raise _Broken("an object of what is no class")
    return Record(cls)


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text = _first(arguments)
    if not isinstance(text, str) or arguments[1:] not in (("latin1",), ("latin-1",)):
        raise _Broken("bytes in an unknown encoding")
    return text.encode("latin-1")


_CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
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


# --- the opcodes ---


def _text_line(machine: _Machine) -> str:
    text = machine.line().strip()
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0] or "\\" in text:
        raise _Broken("a text without quotes, or with escapes")
    return text[1:-1]


def _int_line(machine: _Machine) -> int | bool:
    text = machine.line()
    if text in ("00", "01"):
        return text == "01"
    return int(text.removesuffix("L"))


def _long(machine: _Machine, form: str) -> int:
    return int.from_bytes(machine.take(machine.number(form)), "little", signed=True)


def _text(machine: _Machine, form: str, encoding: str = "utf-8") -> str:
    return machine.take(machine.number(form)).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")


def _tuple(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return operation


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, arguments))


def _new_object(machine: _Machine) -> None:
    arguments, cls = machine.pop(), machine.pop()
    machine.push(machine.call(cls, arguments))


def _new_object_ex(machine: _Machine) -> None:
    machine.pop()
    _new_object(machine)


def _obj(machine: _Machine) -> None:
    values = machine.since_mark()
    if not values:
        raise _Broken("an object without a class")
    machine.push(machine.call(values[0], tuple(values[1:])))


def _inst(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    cls = machine.global_(module, name)
    machine.push(machine.call(cls, tuple(machine.since_mark())))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.global_(module, name))


def _dict(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.push({})
    machine.set_items(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.append([value])


def _frozenset(machine: _Machine) -> None:
    record = Record(Global("builtins", "frozenset"))
    record.items += machine.since_mark()
    machine.push(record)


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.take(1),  # type: ignore[dict-item]  # PROTO
    0x95: lambda m: m.take(8),  # type: ignore[dict-item]  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.stack.pop() if m.stack and m.stack[-1] is _MARK else m.pop(),
    ord("1"): lambda m: m.since_mark(),  # type: ignore[dict-item]
    ord("2"): lambda m: m.push(m.top()),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("I"): lambda m: m.push(_int_line(m)),
    ord("L"): lambda m: m.push(_int_line(m)),
    ord("J"): lambda m: m.push(struct.unpack("<i", m.take(4))[0]),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(_long(m, "<B")),
    0x8B: lambda m: m.push(_long(m, "<i")),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("S"): lambda m: m.push(_text_line(m)),
    ord("T"): lambda m: m.push(_text(m, "<i", "latin-1")),
    ord("U"): lambda m: m.push(_text(m, "<B", "latin-1")),
    ord("V"): lambda m: m.push(m.line("raw-unicode-escape")),
    ord("X"): lambda m: m.push(_text(m, "<I")),
    0x8C: lambda m: m.push(_text(m, "<B")),
    0x8D: lambda m: m.push(_text(m, "<Q")),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("a"): _append,
    ord("e"): lambda m: m.append(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x8F: lambda m: m.push(Record(Global("builtins", "set"))),
    0x90: lambda m: m.append(m.since_mark()),
    0x91: _frozenset,
    ord("p"): lambda m: m.put(int(m.line())),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("g"): lambda m: m.get(int(m.line())),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("c"): lambda m: m.push(m.global_(m.line(), m.line())),
    0x93: _stack_global,
    ord("R"): _reduce,
    ord("b"): lambda m: m.build(),
    ord("i"): _inst,
    ord("o"): _obj,
    0x81: _new_object,
    0x92: _new_object_ex,
    ord("P"): lambda m: m.push(m.persistent(m.line())),
    ord("Q"): lambda m: m.push(m.persistent(m.pop())),
    0x82: lambda m: m.extension("<B"),
    0x83: lambda m: m.extension("<H"),
    0x84: lambda m: m.extension("<i"),
}
