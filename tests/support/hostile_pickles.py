"""Pickles that would run code, are broken, or say what no pickle may."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.forbidden import DOTTED, ODD_NAMES, forbidden_calls
from support.heavy_pickles import again_pickles, heavy_pickles
from support.opcodes import (
    BINPERSID,
    BUILD,
    DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FORMS,
    NEWOBJ,
    NONE,
    PLACES,
    POP,
    REDUCE,
    STACK_GLOBAL,
    STOP,
    call,
    named,
    number,
    pickled,
    raw_bytes,
    stack_named,
    storage,
    tensor,
    text,
    value,
)
from support.payloads import ANYTHING, CANARY_MODULE, EXTENSION_CODE, Pickled


def _named_regex(dotted: str) -> str:
    module, _, name = dotted.partition(":")
    either = {"__builtin__": "builtins", "copy_reg": "copyreg", "posix": "os", "_operator": "operator", "_io": "io"}
    modules = {module, either.get(module, module)}
    return "(" + "|".join(map(re.escape, sorted(modules))) + r")\." + re.escape(name)


def pickles(canary: Path) -> Iterator[Pickled]:
    """All hostile pickles; those that could run code would make ``canary``."""
    calls = forbidden_calls(canary)
    for dotted, arguments in calls.items():
        regex = _named_regex(dotted)
        if any(isinstance(a, bytes) and a[:1] == b"c" for a in arguments):
            # the first of the globals may be the one that is named
            inner = [a.split(b"\n")[:2] for a in arguments if isinstance(a, bytes) and a[:1] == b"c"]
            regex = "|".join([regex, *(_named_regex(f"{m[1:].decode()}:{n.decode()}") for m, n in inner)])
        # what protocol 0 rebuilds objects with is known, and refuses what is no class
        regex = ANYTHING if dotted == "copyreg:_reconstructor" else regex
        yield Pickled(f"call-{dotted}", pickled(call(dotted, *arguments)), regex)
    touch = (f"touch {canary}",)
    for form, make in FORMS.items():
        for dotted in ("os:system", "builtins:eval", "torch:load", "torch.storage:_load_from_bytes"):
            yield Pickled(f"form-{form}-{dotted}", pickled(make(dotted, calls[dotted]), 4), _named_regex(dotted))
    # a stranger's function: in the forms that call it
    for form in ("reduce", "stack-global", "memo", "inst", "obj"):
        dotted = f"{CANARY_MODULE}:run"
        yield Pickled(f"form-{form}-{dotted}", pickled(FORMS[form](dotted, ()), 4), _named_regex(dotted))
    for place, wrap in PLACES.items():
        for form in ("reduce", "memo", "inst"):
            data = pickled(wrap(FORMS[form]("os:system", touch)), 4)
            yield Pickled(f"place-{place}-{form}", data, r"os\.system")
        nested = wrap(call(f"{CANARY_MODULE}:run"))
        yield Pickled(f"place-{place}-stranger", pickled(nested, 4), rf"{CANARY_MODULE}\.run")
    for protocol in (*range(6), None):
        yield Pickled(f"protocol-{protocol}", pickled(call("os:system", *touch), protocol), r"os\.system")
    string = b"S" + repr(touch[0]).encode() + b"\n"
    yield Pickled("protocol-0-text", b"cos\nsystem\n(" + string + b"tR.", r"os\.system")
    yield Pickled("protocol-0-put", b"cos\nsystem\np0\n(V" + touch[0].encode() + b"\np1\ntp2\nRp3\n.", r"os\.system")
    yield Pickled("two-protocols", b"\x80\x02\x80\x05" + pickled(call("os:system", *touch), 4), r"os\.system")
    framed = call("os:system", *touch) + STOP
    claims = {"0": 0, "1": 1, "less": len(framed) - 1, "more": len(framed) + 1}
    for name, claim in {**claims, "2e31": 2**31, "2e62": 2**62, "2e64": 2**64 - 1}.items():
        data = b"\x80\x04\x95" + struct.pack("<Q", claim) + framed
        yield Pickled(f"frame-{name}", data, ANYTHING)
        benign = value({"a": 1}) + STOP
        yield Pickled(f"frame-benign-{name}", b"\x80\x04\x95" + struct.pack("<Q", claim) + benign, ANYTHING, "zl", True)
    benign = value({"a": 1}) + POP
    yield Pickled("after-a-value", b"\x80\x02" + benign + call("os:system", *touch) + STOP, r"os\.system")
    for dotted in DOTTED:
        yield Pickled(f"dotted-{dotted}", pickled(stack_named(dotted) + EMPTY_TUPLE + REDUCE, 4), ANYTHING)
        yield Pickled(f"dotted-global-{dotted}", pickled(named(dotted) + EMPTY_TUPLE + NEWOBJ, 2), ANYTHING)
    for index, dotted in enumerate(ODD_NAMES):
        yield Pickled(f"odd-name-{index}", pickled(stack_named(dotted) + value(touch) + REDUCE, 4), ANYTHING)
    for names in ((b"K\x01", text("system")), (text("os"), NONE), (raw_bytes(b"os"), raw_bytes(b"system"))):
        yield Pickled(f"names-{names!r}"[:40], pickled(names[0] + names[1] + STACK_GLOBAL, 4), ANYTHING)
    yield from _extension_pickles(touch)
    yield from _persistent_pickles(touch)
    yield from _state_pickles(touch)
    yield from _broken_pickles()
    yield from heavy_pickles()
    yield from again_pickles()


def _extension_pickles(touch: tuple[str]) -> Iterator[Pickled]:
    arguments = value(touch) + REDUCE
    codes = {
        "ext1": b"\x82" + bytes([EXTENSION_CODE]),
        "ext2": b"\x83" + struct.pack("<H", EXTENSION_CODE),
        "ext4": b"\x84" + struct.pack("<i", EXTENSION_CODE),
        "ext1-unregistered": b"\x82\x05",
        "ext4-negative": b"\x84" + struct.pack("<i", -1),
        "ext1-zero": b"\x82\0",
    }
    for name, code in codes.items():
        regex = ANYTHING if name == "ext4-negative" else r"(?i)ext|os\.system"
        yield Pickled(name, pickled(code + arguments), regex)
        yield Pickled(f"{name}-never-called", pickled(value({"a": 1}) + POP + code + POP + DICT), regex)


def _persistent_pickles(touch: tuple[str]) -> Iterator[Pickled]:
    yield Pickled("persid-line", b"Pos.system\n.", ANYTHING)
    yield Pickled("persid-empty", b"P\n.", ANYTHING)
    yield Pickled("persid-storage", b"Pstorage\n.", ANYTHING)
    payloads: dict[str, Any] = {
        "text": "os.system",
        "none": None,
        "empty": (),
        "module": ("module", named("src.modeling:Encoder"), "x.py", "import os"),
        "module-torch": ("module", named("torch.nn.modules.linear:Linear"), "x.py", "import os"),
        "unknown": ("storages", named("torch:FloatStorage"), "0", "cpu", 4),
        "bytes-tag": (raw_bytes(b"storage"), named("torch:FloatStorage"), "0", "cpu", 4),
        "short": ("storage", named("torch:FloatStorage")),
        "long": ("storage", named("torch:FloatStorage"), "0", "cpu", 4, None, 7, 8),
        "list": ["storage", named("torch:FloatStorage"), "0", "cpu", 4],
        "type-text": ("storage", "FloatStorage", "0", "cpu", 4),
        "type-number": ("storage", 3, "0", "cpu", 4),
        "type-class": ("storage", named("torch.nn.modules.linear:Linear"), "0", "cpu", 4),
        "type-stranger": ("storage", named("src.modeling:FloatStorage"), "0", "cpu", 4),
        "type-record": ("storage", call("src.modeling:Encoder"), "0", "cpu", 4),
        "key-number": ("storage", named("torch:FloatStorage"), 0, "cpu", 4),
        "key-none": ("storage", named("torch:FloatStorage"), None, "cpu", 4),
        "key-tuple": ("storage", named("torch:FloatStorage"), ("0",), "cpu", 4),
        "key-list": ("storage", named("torch:FloatStorage"), ["0"], "cpu", 4),
        "numel-text": ("storage", named("torch:FloatStorage"), "0", "cpu", "4"),
        "numel-float": ("storage", named("torch:FloatStorage"), "0", "cpu", 4.0),
        "numel-bool": ("storage", named("torch:FloatStorage"), "0", "cpu", True),
        "numel-negative": ("storage", named("torch:FloatStorage"), "0", "cpu", -4),
        "numel-huge": ("storage", named("torch:FloatStorage"), "0", "cpu", 2**70),
    }
    for name, payload in payloads.items():
        # what is wrong with a storage may first be known when it is needed
        yield Pickled(f"persistent-{name}", pickled(value(payload) + BINPERSID), ANYTHING, "zl")
        whole = value({"w": tensor(value(payload) + BINPERSID)})
        yield Pickled(f"persistent-tensor-{name}", pickled(whole), ANYTHING, "" if name == "numel-bool" else "zl")
    yield Pickled(
        "persistent-reduce", pickled(value(("storage", call("os:system", *touch))) + BINPERSID), r"os\.system"
    )


def _state_pickles(touch: tuple[str]) -> Iterator[Pickled]:
    ordered = call("collections:OrderedDict")
    system = named("os:system")
    yield Pickled("build-setstate", pickled(ordered + value({"__setstate__": system}) + BUILD), r"os\.system")
    harmless = {
        "build-class": value({"__class__": "os", "__reduce__": "x", "items": 3, "keys": None}),
        "build-slots": value((None, {"__class__": "x", "__dict__": {}})),
        "build-both": value(({"a": 1}, {"items": "x"})),
        "build-number": value(3),
        "build-deep-dunder": value({"__init__": {"__globals__": 1}}),
    }
    for name, state in harmless.items():
        for what, made in {
            "ordered": ordered,
            "dict": DICT,
            "list": EMPTY_LIST,
            "number": number(3),
            "class": named("torch.nn.modules.linear:Linear"),
            "stranger": named("src.modeling:Encoder"),
            "record": named("src.modeling:Encoder") + EMPTY_TUPLE + NEWOBJ,
            "tensor": tensor(),
        }.items():
            yield Pickled(f"{name}-{what}", pickled(made + state + BUILD), ANYTHING, "")
            yield Pickled(
                f"{name}-{what}-beside", pickled(value({"w": tensor(), "x": made + state + BUILD})), places=""
            )
    for name, inner in {
        "reduce-number": number(1) + EMPTY_TUPLE + REDUCE,
        "reduce-text": text("os.system") + value(touch) + REDUCE,
        "reduce-tensor": tensor() + EMPTY_TUPLE + REDUCE,
        "reduce-rebuilt": call("torch._utils:_rebuild_tensor_v2", "x"),
        "reduce-rebuilt-none": call("torch._utils:_rebuild_tensor_v2", None, 0, (1,), (1,), False, None),
        "reduce-no-tuple": named("collections:OrderedDict") + number(3) + REDUCE,
        "reduce-list": named("collections:OrderedDict") + EMPTY_LIST + REDUCE,
        "newobj-instance": number(3) + EMPTY_TUPLE + NEWOBJ,
        "newobj-rebuild": named("torch._utils:_rebuild_tensor_v2") + EMPTY_TUPLE + NEWOBJ,
        "parameter-of-text": call("torch._utils:_rebuild_parameter", "x", True, None),
        "ordered-of-number": call("collections:OrderedDict", 3),
        "ordered-of-triples": call("collections:OrderedDict", [(1, 2, 3)]),
        "ordered-unhashable": call("collections:OrderedDict", [([], 2)]),
        "set-of-number": call("builtins:set", 3),
        "set-unhashable": call("__builtin__:set", [[]]),
        "size-of-text": call("torch:Size", "x"),
        "size-huge": call("torch:Size", (2**80,)),
    }.items():
        yield Pickled(name, pickled(value({"w": tensor(), "x": inner})), ANYTHING, "")
        yield Pickled(f"{name}-alone", pickled(inner), ANYTHING, "")


def _broken_pickles() -> Iterator[Pickled]:
    whole = pickled(value({"w": tensor(), "x": [1, 2.5, "three", None]}))
    for at in range(0, len(whole) - 1, 7):
        yield Pickled(f"cut-{at}", whole[:at])
    stopped = {
        "stop-alone": b".",
        "mark-alone": b"(.",
        "pop-empty": b"0.",
        "tuple-no-mark": b"K\x01t.",
        "dup-empty": b"2.",
        "setitem-short": b"}.s",
        "setitem-on-number": b"K\x01K\x02K\x03s.",
        "setitems-odd": b"}(K\x01u.",
        "append-to-number": b"K\x01K\x02a.",
        "append-to-dict": b"}K\x02a.",
        "additems-to-list": b"](K\x01\x90.",
        "get-missing": b"h\x07.",
        "get-text": b"gnine\n.",
        "get-negative": b"g-1\n.",
        "put-negative": b"K\x01p-1\n.",
        "put-text": b"K\x01pnine\n.",
        "put-empty-stack": b"q\0.",
        "memoize-empty": b"\x94.",
        "opcode-unknown": b"\xff.",
        "opcode-zero": b"\0.",
        "protocol-6": b"\x80\x06}.",
        "protocol-255": b"\x80\xff}.",
        "next-buffer": b"\x80\x05\x97.",
        "readonly-buffer": b"\x80\x05\x97\x98.",
        "unhashable-list": b"}]Ns.",
        "unhashable-dict": b"}}Ns.",
        "unhashable-set": b"}\x8fNs.",
        "unhashable-bytearray": b"}\x96" + struct.pack("<Q", 1) + b"x" + b"Ns.",
        "unhashable-in-tuple": b"}]\x85Ns.",
        "frozenset-unhashable": b"(]\x91.",
        "set-unhashable-item": b"\x8f(]\x90.",
        "string-no-quotes": b"Sabc\n.",
        "string-one-quote": b"S'abc\n.",
        "string-not-ascii": b"S'\xff'\n.",
        "unicode-bad": b"X\x02\0\0\0\xff\xfe.",
        "unicode-raw-bad": b"V\\ud8\n.",
        "float-text": b"Fone\n.",
        "int-text": b"Ione\n.",
        "long-text": b"Lone\n.",
        "int-underscores": b"I1_000\n.",
        "global-no-newline": b"cos",
        "global-one-line": b"cos\n.",
        "global-not-utf8": b"c\xff\xfe\nx\n.",
        "build-short": b"}b.",
        "persid-short": b"Q.",
        "inst-no-mark": b"ios\nsystem\n.",
        "obj-empty": b"(o.",
        "not-a-pickle": b"This is a text.\n",
        "empty": b"",
        "zeros": b"\0" * 1000,
        "html": b"<html><body>404</body></html>",
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    # some of these say something that is odd and no harm
    odd = (
        *("unhashable-list", "unhashable-dict", "unhashable-set", "unhashable-bytearray", "unhashable-in-tuple"),
        *("frozenset-unhashable", "set-unhashable-item", "setitem-short", "additems-to-list"),
        "int-underscores",
        "put-negative",
        "get-negative",
        "protocol-6",
        "protocol-255",
        "string-not-ascii",
    )
    for name, data in stopped.items():
        yield Pickled(f"broken-{name}", data, ANYTHING, "zl" if name in odd else "rzl")
    for name, odd_text in {
        "surrogate": "\ud800",
        "newline": "a\nb\r\nc",
        "escape": "\x1b[2J\x1b]0;title\x07",
        "null": "a\0b",
        "bidi": "\u202etxt.exe",
        "long": "n" * 1_000_000,
    }.items():
        # no harm, unless the message repeats it
        yield Pickled(f"name-{name}", pickled(value({odd_text: tensor(size=(3, 3))})), ANYTHING, "zl")
        yield Pickled(f"name-twice-{name}", pickled(value({odd_text: tensor(storage(key=odd_text))})), ANYTHING, "zl")
        yield Pickled(f"class-{name}", pickled(stack_named(f"{odd_text}:{odd_text}") + EMPTY_TUPLE + REDUCE), places="")
