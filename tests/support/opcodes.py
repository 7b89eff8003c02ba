"""Pickles written opcode by opcode."""

import struct
from collections.abc import Callable
from typing import Any

MARK, STOP, REDUCE, BUILD, TUPLE, DICT, NONE, POP, DUP = b"(", b".", b"R", b"b", b"t", b"}", b"N", b"0", b"2"
TUPLE1, TUPLE2, STACK_GLOBAL, NEWOBJ, NEWOBJ_EX, MEMOIZE = b"\x85", b"\x86", b"\x93", b"\x81", b"\x92", b"\x94"
BINPERSID, SETITEM, EMPTY_TUPLE, EMPTY_LIST, APPEND = b"Q", b"s", b")", b"]", b"a"


def text(value: str) -> bytes:
    """BINUNICODE; lone surrogates are allowed, as pickle allows them."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """LONG1, or BININT where it fits."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def raw_bytes(value: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(value)) + value


def value(item: Any) -> bytes:
    """Opcodes of plain values; bytes are taken to be opcodes already."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, bool):
        return b"\x88" if item else b"\x89"
    if isinstance(item, int):
        return number(item)
    if isinstance(item, float):
        return b"G" + struct.pack(">d", item)
    if isinstance(item, str):
        return text(item)
    if item is None:
        return NONE
    if isinstance(item, tuple):
        return MARK + b"".join(map(value, item)) + TUPLE
    if isinstance(item, list):
        return EMPTY_LIST + MARK + b"".join(map(value, item)) + b"e"
    if isinstance(item, dict):
        return DICT + MARK + b"".join(value(k) + value(v) for k, v in item.items()) + b"u"
    raise TypeError(f"item: expected plain data, got {type(item).__name__}")


def named(dotted: str) -> bytes:
    """GLOBAL of ``module:name``."""
    module, _, name = dotted.partition(":")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def stack_named(dotted: str) -> bytes:
    """STACK_GLOBAL of ``module:name``."""
    module, _, name = dotted.partition(":")
    return text(module) + text(name) + STACK_GLOBAL


def memo_named(dotted: str) -> bytes:
    """STACK_GLOBAL whose two strings come out of the memo."""
    module, _, name = dotted.partition(":")
    return text(module) + b"q\xf0" + POP + text(name) + b"r\xf1\0\0\0" + POP + b"h\xf0" + b"j\xf1\0\0\0" + STACK_GLOBAL


def call(dotted: str, *arguments: Any) -> bytes:
    """``module:name`` called by REDUCE."""
    return named(dotted) + value(tuple(arguments)) + REDUCE


# how a global can be reached and called: all leave the result on the stack
FORMS: dict[str, Callable[[str, tuple[Any, ...]], bytes]] = {
    "reduce": lambda dotted, arguments: call(dotted, *arguments),
    "stack-global": lambda dotted, arguments: stack_named(dotted) + value(arguments) + REDUCE,
    "memo": lambda dotted, arguments: memo_named(dotted) + value(arguments) + REDUCE,
    "inst": lambda dotted, arguments: MARK + b"".join(map(value, arguments)) + b"i" + named(dotted)[1:],
    "obj": lambda dotted, arguments: MARK + named(dotted) + b"".join(map(value, arguments)) + b"o",
    "newobj": lambda dotted, arguments: named(dotted) + value(arguments) + NEWOBJ,
    "newobj-ex": lambda dotted, arguments: named(dotted) + value(arguments) + DICT + NEWOBJ_EX,
    "build": lambda dotted, arguments: named(dotted) + value({"state": "x"}) + BUILD,
    "never-called": lambda dotted, arguments: named(dotted),
    "dropped": lambda dotted, arguments: call(dotted, *arguments) + POP + NONE,
}
# where the result goes: all take opcodes of one value and leave one value
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "dict-value": lambda inner: DICT + text("a") + inner + SETITEM,
    "dict-key": lambda inner: DICT + inner + NONE + SETITEM,
    "deep-value": lambda inner: (DICT + text("a")) * 30 + inner + SETITEM * 30,
    "deep-key": lambda inner: DICT + inner + TUPLE1 * 20 + NONE + SETITEM,
    "list": lambda inner: EMPTY_LIST + inner + APPEND,
    "set": lambda inner: b"\x8f" + MARK + inner + b"\x90",
    "frozenset": lambda inner: MARK + inner + b"\x91",
    "persistent-id": lambda inner: inner + BINPERSID,
    "storage-key": lambda inner: storage(key=inner),
    "storage-size": lambda inner: storage(numel=inner),
    "storage-type": lambda inner: value(("storage", inner, "0", "cpu", 4)) + BINPERSID,
    "tensor-size": lambda inner: tensor(size=(inner,)),
    "tensor-hooks": lambda inner: tensor(hooks=inner),
    "module-state": lambda inner: (
        named("torch.nn.modules.linear:Linear") + EMPTY_TUPLE + NEWOBJ + value({"weight": inner}) + BUILD
    ),
    "record-state": lambda inner: named("src.modeling:Encoder") + EMPTY_TUPLE + NEWOBJ + inner + BUILD,
    "record-arguments": lambda inner: call("src.modeling:Encoder", inner),
    "after-a-frame": lambda inner: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + inner,
    "callable": lambda inner: inner + EMPTY_TUPLE + REDUCE,
}


def storage(kind: str = "torch:FloatStorage", key: Any = "0", device: Any = "cpu", numel: Any = 4) -> bytes:
    """A persistent id as torch.save writes it."""
    return value(("storage", named(kind), key, device, numel)) + BINPERSID


def tensor(
    stored: bytes | None = None, offset: Any = 0, size: Any = (2, 2), stride: Any = (2, 1), hooks: Any = None
) -> bytes:
    """A tensor as torch.save writes it."""
    hooks = call("collections:OrderedDict") if hooks is None else hooks
    stored = storage() if stored is None else stored
    return call("torch._utils:_rebuild_tensor_v2", stored, offset, size, stride, False, hooks)


def pickled(inner: bytes, protocol: int | None = 2) -> bytes:
    """A whole pickle."""
    return (b"" if protocol is None else b"\x80" + bytes([protocol])) + inner + STOP
