"""Pickles that take memory, time or the C stack of a careless reader."""

import struct
from collections.abc import Iterator
from functools import partial

from support.opcodes import (
    APPEND,
    BUILD,
    DICT,
    DUP,
    EMPTY_LIST,
    EMPTY_TUPLE,
    MARK,
    MEMOIZE,
    NEWOBJ,
    NONE,
    POP,
    REDUCE,
    SETITEM,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    call,
    named,
    number,
    pickled,
    tensor,
    text,
    value,
)
from support.payloads import ANYTHING, TERABYTE, Pickled


def heavy_pickles() -> Iterator[Pickled]:
    many = 200_000
    heavy = partial(Pickled, heavy=True)
    claim = struct.pack("<Q", 2**60)
    yield heavy("memo-huge", b"Nr\xf0\xff\xff\xff0}.", ANYTHING, "zl")
    yield heavy("memo-huge-put", b"Np" + b"9" * 30 + b"\n0}.", ANYTHING, "zl")
    yield heavy("memo-digits", b"Np" + b"9" * many + b"\n0}.")
    for name, code in {"binbytes8": b"\x8e", "binunicode8": b"\x8d", "bytearray8": b"\x96"}.items():
        yield heavy(f"{name}-claims", code + claim + b"x.")
        yield heavy(f"{name}-claims-1tb", code + struct.pack("<Q", TERABYTE) + b"x.")
        yield heavy(f"{name}-claims-all", code + b"\xff" * 8 + b"x.")
    for name, code in {"binbytes": b"B", "binunicode": b"X", "binstring": b"T", "long4": b"\x8b"}.items():
        yield heavy(f"{name}-claims", code + b"\xff\xff\xff\x7f" + b"x.")
        yield heavy(f"{name}-negative", code + b"\xff\xff\xff\xff" + b"x.")
    yield heavy("long4-million", b"\x8b" + struct.pack("<i", many) + b"\x7f" * many + b".", ANYTHING, "zl")
    yield heavy("long-digits", b"L" + b"9" * many + b"L\n.")
    yield heavy("int-digits", b"I" + b"9" * many + b"\n.")
    yield heavy("float-digits", b"F" + b"9" * many + b"\n.", ANYTHING, "zl")
    yield heavy("tuples-deep", EMPTY_TUPLE + TUPLE1 * many + STOP, ANYTHING, "zl")
    yield heavy("tuples-deep-value", DICT + text("w") + EMPTY_TUPLE + TUPLE1 * many + b"s.", ANYTHING, "zl")
    yield heavy("tuples-deep-key", DICT + EMPTY_TUPLE + TUPLE1 * many + b"Ns.", places="zl")
    yield heavy("tuples-deep-set", b"\x8f(" + EMPTY_TUPLE + TUPLE1 * many + b"\x90.", places="zl")
    yield heavy("tuples-deep-frozenset", b"(" + EMPTY_TUPLE + TUPLE1 * many + b"\x91.", places="zl")
    yield heavy("frozensets-deep", b"(" * 100_000 + b"N" + b"\x91" * 100_000 + STOP, ANYTHING, "zl")
    yield heavy(
        "tuples-deep-callable", named("src.modeling:Encoder") + EMPTY_TUPLE + TUPLE1 * many + b"R.", places="zl"
    )
    yield heavy("tuples-deep-record", (named("m:C") * 1 + EMPTY_TUPLE + TUPLE1 * many + NEWOBJ + STOP), places="zl")
    yield heavy("tuples-deep-size", pickled(value({"w": tensor(size=EMPTY_TUPLE + TUPLE1 * many)})), ANYTHING, "zl")
    yield heavy("tuples-deep-persistent", EMPTY_TUPLE + TUPLE1 * many + b"Q.")
    yield heavy(
        "records-deep", named("src.modeling:Encoder") + b"q\0" + NONE + b"\x85h\0".join([b""]) + STOP, places="zl"
    )
    nested = b"".join([named("src.modeling:Encoder") * 100_000, NONE, (TUPLE1 + REDUCE) * 100_000, STOP])
    yield heavy("records-deep-arguments", nested, ANYTHING, "zl")
    yield heavy("record-deep-key", DICT + nested[:-1] + b"Ns.", ANYTHING, "zl")
    yield heavy("lists-deep", EMPTY_LIST * many + APPEND * (many - 1) + STOP, ANYTHING, "zl")
    yield heavy("dicts-deep", (DICT + text("a")) * 100_000 + NONE + SETITEM * 100_000 + STOP, ANYTHING, "zl")
    yield heavy("marks", MARK * many + STOP)
    yield heavy("marks-tuples", MARK * many + TUPLE * many + STOP, ANYTHING, "zl")
    # two bytes double it: a file of 200 bytes whose hash, length or text would take for ever
    doubled = EMPTY_TUPLE + (DUP + TUPLE2) * 90
    yield heavy("laughs-tuple", doubled + STOP, ANYTHING, "zl")
    yield heavy("laughs-key", DICT + doubled + b"Ns.", places="zl")
    yield heavy("laughs-set", b"\x8f(" + doubled + b"\x90.", places="zl")
    yield heavy("laughs-frozenset", b"(" + doubled + b"\x91.", places="zl")
    yield heavy("laughs-size", pickled(value({"w": tensor(size=doubled)})), ANYTHING, "zl")
    yield heavy("laughs-name", pickled(value({"w": tensor(), "x": call("src.modeling:Encoder", doubled)})), places="")
    yield heavy("laughs-persistent", doubled + b"Q.")
    leaf = value({"w": tensor()})
    level = b"q\x01" + POP + DICT + text("a") + b"h\x01" + SETITEM + text("b") + b"h\x01" + SETITEM
    yield heavy("laughs-dicts", pickled(leaf + level * 60), ANYTHING, "zl")
    level = b"q\x01" + POP + EMPTY_LIST + (b"h\x01" + APPEND) * 10
    yield heavy("laughs-lists", pickled(leaf + level * 40), ANYTHING, "zl")
    level = b"q\x01" + POP + named("src.modeling:Encoder") + EMPTY_TUPLE + NEWOBJ
    level += DICT + text("a") + b"h\x01" + SETITEM + text("b") + b"h\x01" + SETITEM + BUILD
    yield heavy("laughs-records", pickled(leaf + level * 60), ANYTHING, "zl")
    level = b"q\x01" + POP + named("torch.nn.modules.container:Sequential") + EMPTY_TUPLE + NEWOBJ + DICT
    level += text("_modules") + DICT + text("0") + b"h\x01" + SETITEM + text("1") + b"h\x01" + SETITEM + SETITEM + BUILD
    module = named("torch.nn.modules.linear:Linear") + EMPTY_TUPLE + NEWOBJ + value({"_parameters": leaf}) + BUILD
    yield heavy("laughs-modules", pickled(module + level * 60), ANYTHING, "zl")
    level = level.replace(text("1") + b"h\x01" + SETITEM, b"")
    yield heavy("modules-deep", pickled(module + level * 20_000), ANYTHING, "zl")
    itself = named("torch.nn.modules.container:Sequential") + EMPTY_TUPLE + NEWOBJ + b"q\x01"
    yield heavy("module-in-itself", pickled(itself + value({"_modules": {"0": b"h\x01"}}) + BUILD), ANYTHING, "zl")
    yield heavy("list-in-itself", b"]q\0h\0a.", ANYTHING, "zl")
    yield heavy("dict-in-itself", b"}q\0" + text("a") + b"h\0s.", ANYTHING, "zl")
    yield heavy("dict-in-itself-tensor", b"}q\0" + text("a") + b"h\0s" + text("w") + tensor() + b"s.", ANYTHING, "")
    yield heavy("tuple-in-itself", b"]q\0" + b"h\0\x85aq\x01}h\0\x85Ns.", ANYTHING, "zl")
    # int hashes are theirs modulo 2^61 - 1, so all of these collide: each insertion looks at all before it
    colliding = b"".join(number(k * (2**61 - 1)) + NONE for k in range(1, 40_000))
    yield heavy("hash-collisions", DICT + MARK + colliding + b"u.", ANYTHING, "zl")
    items = b"".join(number(k * (2**61 - 1)) for k in range(1, 40_000))
    yield heavy("hash-collisions-set", b"\x8f" + MARK + items + b"\x90.", ANYTHING, "zl")
    twos = b"".join(value((k * (2**61 - 1), 0)) for k in range(1, 20_000))
    yield heavy("hash-collisions-tuples", b"\x8f" + MARK + twos + b"\x90.", ANYTHING, "zl")
    floats = b"".join(value(float(2.0 ** (k % 900)) * 3) + NONE for k in range(30_000))
    yield heavy("hash-nans", DICT + MARK + value(float("nan")) * 2 + floats + b"u.", ANYTHING, "zl")
    yield heavy("empty-dicts", DICT * many + STOP, ANYTHING, "zl")
    yield heavy("sets", b"\x8f" * many + STOP, ANYTHING, "zl")
    yield heavy("memo-all", (DICT + MEMOIZE + POP) * 500_000 + b"}.", ANYTHING, "zl")
    strings = text("os") + MEMOIZE + (DUP + DUP + TUPLE2 + POP) * 100_000
    yield heavy("strings-dup", strings + STOP, ANYTHING, "zl")
    yield heavy(
        "ordered-of-itself", call("collections:OrderedDict", [(EMPTY_TUPLE + TUPLE1 * many, 1)]) + STOP, places="zl"
    )
    yield heavy("set-of-deep", call("builtins:set", [EMPTY_TUPLE + TUPLE1 * many]) + STOP, places="zl")
    yield heavy("set-of-laughs", call("builtins:set", [doubled]) + STOP, places="zl")


def again_pickles() -> Iterator[Pickled]:
    """One long value, used again and again out of the memo: each use must cost what its bytes do."""
    times = 100_000
    heavy = partial(Pickled, places="", heavy=True)

    def again(step: bytes, *kept: bytes, count: int = times) -> bytes:
        memo = b"".join(one + b"q" + bytes([index]) + POP for index, one in enumerate(kept))
        return pickled(memo + step * count + DICT, 2)

    pairs = EMPTY_LIST + MARK + b"".join(value((str(index), None)) for index in range(20_000)) + b"e"
    ordered = named("collections:OrderedDict")
    yield heavy("again-ordered", again(b"h\0h\1R0", ordered, pairs + TUPLE1))
    yield heavy("again-ordered-kept", again(b"h\0h\1R", ordered, pairs + TUPLE1))
    long_text = text("x" * 2_000_000)
    latin = long_text + text("latin1") + TUPLE2
    yield heavy("again-encode", again(b"h\0h\1R0", named("_codecs:encode"), latin))
    yield heavy("again-encode-kept", again(b"h\0h\1R", named("_codecs:encode"), latin))
    yield heavy("again-global", again(b"h\0h\1\x930", long_text, text("Encoder")))
    yield heavy("again-global-name", again(b"h\0h\1\x930", text("src"), text("X" + "x" * 2_000_000)))
    state = DICT + MARK + b"".join(text(str(index)) + NONE for index in range(20_000)) + b"u"
    record = named("src.modeling:Encoder") + EMPTY_TUPLE + NEWOBJ
    yield heavy("again-build", again(b"h\0h\1b0", record, state))
    yield heavy("again-build-records", again(b"h\2)\x81h\1b", record, state, named("src.modeling:Encoder")))
    yield heavy(
        "again-size", again(b"h\0h\1R0", named("torch:Size"), EMPTY_LIST + MARK + b"K\1" * 100_000 + b"e" + TUPLE1)
    )
    yield heavy(
        "again-persistent", again(b"h\0Q0", value(("storage", named("torch:FloatStorage"), "9" * 2_000_000, "c", 4)))
    )
    # a tree of modules that is small in the file
    module = named("torch.nn.modules.container:Sequential") + EMPTY_TUPLE + NEWOBJ
    children = DICT + MARK + b"".join(text(str(index)) + b"h\0" for index in range(20_000)) + b"u"
    inside = module + b"q\0" + DICT + text("_modules") + children + SETITEM + BUILD
    yield Pickled("modules-wide-in-themselves", pickled(inside), ANYTHING, "zl", True)
    full = module + DICT + text("_buffers") + state + SETITEM + BUILD + b"q\0" + POP
    wide = module + DICT + text("_modules") + children + SETITEM + BUILD
    yield Pickled("modules-shared-buffers", pickled(full + wide), ANYTHING, "zl", True)
    skipped = value([str(index) for index in range(20_000)])
    full = module + DICT + text("_non_persistent_buffers_set") + call("__builtin__:set", skipped) + SETITEM + BUILD
    yield Pickled("modules-shared-skipped", pickled(full + b"q\0" + POP + wide), ANYTHING, "zl", True)
    script = named("__torch__:Module") + EMPTY_TUPLE + NEWOBJ + state + BUILD + b"q\0" + POP
    root = named("__torch__:Root") + EMPTY_TUPLE + NEWOBJ + children + BUILD
    yield Pickled("modules-shared-script", pickled(script + root), ANYTHING, "zl", True)
    # as many objects as opcodes
    yield heavy("sets-4-million", b"\x8f" * 3_900_000 + STOP)
    yield heavy("dicts-4-million", DICT * 3_900_000 + STOP)
    yield heavy("records-2-million", named("a:B") + b"q\0" + b"h\0)\x81" * 1_300_000 + STOP)
    yield heavy("lists-kept", b"](" + b"]" * 3_900_000 + b"e.")
