"""Hostile checkpoints: every trick we know to run code, to take memory or time, or to read what is not in the file.

``cases()`` lists them all. A payload that would run makes a file named ``canary`` beside the checkpoint, so that a test
needs no patches to see it; :data:`RUNS` names those that really do so under ``pickle.loads``, which a test proves.

``python tests/hostile_files.py FOLDER`` opens those that take memory or crash C code, each in a process of its own with
little memory, and prints one line of JSON for each.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

CANARY = "canary"
CANARY_MODULE = "hostile_canary_module"
EXTENSION_CODE = 200

ANYTHING = None
TERABYTE = 2**40

# --- pickle, opcode by opcode ---------------------------------------------------------------------------------------

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


# --- globals that must never be reached -----------------------------------------------------------------------------


def forbidden_calls(canary: Path) -> dict[str, tuple[Any, ...]]:
    """``module:name`` -> arguments with which it would make the canary, as far as it can."""
    touch, made = f"touch {canary}", str(canary)
    source = f"open({made!r}, 'w').close()"
    module_file = str(canary.with_name(f"{CANARY_MODULE}.py"))
    inner = pickled(call("os:system", touch))
    return {
        "os:system": (touch,),
        "posix:system": (touch,),
        "nt:system": (touch,),
        "os:popen": (touch,),
        "os:execvp": ("touch", ["touch", made]),
        "os:posix_spawnp": ("touch", ["touch", made], {}),
        "os:remove": (made,),
        "subprocess:Popen": (["touch", made],),
        "subprocess:check_output": (["touch", made],),
        "subprocess:run": (["touch", made],),
        "subprocess:getoutput": (touch,),
        "builtins:eval": (source,),
        "builtins:exec": (source,),
        "builtins:__import__": (CANARY_MODULE,),
        "builtins:getattr": (named("os:path"), "os"),
        "builtins:open": (made, "w"),
        "builtins:compile": (source, "x", "exec"),
        "builtins:map": (named("builtins:eval"), [source]),
        "builtins:type": ("X", (), {}),
        "builtins:globals": (),
        "builtins:breakpoint": (),
        "__builtin__:eval": (source,),
        "__builtin__:execfile": (module_file,),
        "__builtin__:__import__": (CANARY_MODULE,),
        "__builtin__:getattr": ("x", "__class__"),
        "__builtin__:apply": (named("__builtin__:eval"), (source,)),
        "__builtin__:file": (made, "w"),
        "importlib:import_module": (CANARY_MODULE,),
        "importlib:__import__": (CANARY_MODULE,),
        "importlib.util:spec_from_file_location": ("x", module_file),
        "functools:partial": (text("os"), touch),
        "functools:reduce": (text("x"), [source, source]),
        "operator:attrgetter": ("system",),
        "operator:methodcaller": ("system", touch),
        "operator:itemgetter": (0,),
        "_operator:attrgetter": ("system",),
        "torch:load": (made, None, None),
        "torch:save": ({}, made),
        "torch.hub:load": ("user/repository", "model"),
        "torch.hub:_load_local": (str(canary.parent), "model"),
        "torch.jit:load": (made,),
        "torch.serialization:load": (made,),
        "torch.serialization:_legacy_load": (made,),
        "torch.storage:_load_from_bytes": (raw_bytes(legacy(inner)),),
        "torch.utils.cpp_extension:load": ("x", [made]),
        "torch.utils.model_zoo:load_url": ("http://127.0.0.1:9/x",),
        "torch.package:PackageImporter": (made,),
        "torch.ops:load_library": (made,),
        "torch.classes:load_library": (made,),
        "torch._utils:_rebuild_from_type_v2": (text("os"), None, (touch,), None),
        "torch._tensor:_rebuild_from_type_v2": (text("os"), None, (touch,), None),
        "torch._utils:_import_dotted_name": ("os.system",),
        "torch:from_file": (made, True, 4),
        "torch._dynamo.guards:CheckFunctionManager": (),
        "numpy:load": (made, None, True),
        "numpy:fromfile": (made,),
        "numpy:memmap": (made,),
        "numpy.testing._private.utils:runstring": (source, {}),
        "runpy:run_path": (module_file,),
        "runpy:run_module": (CANARY_MODULE,),
        "pty:spawn": (["touch", made],),
        "webbrowser:open": ("http://127.0.0.1:9/",),
        "ctypes:CDLL": (made,),
        "shutil:rmtree": (made,),
        "shutil:copyfile": (module_file, made),
        "timeit:timeit": ("pass", source),
        "codecs:decode": (raw_bytes(b"x"), "utf-8"),
        "codecs:encode": ("x", "utf-8"),
        "codecs:open": (made, "w"),
        "types:FunctionType": (NONE, {}),
        "types:CodeType": (0, 0, 0, 0, 0, 0),
        "marshal:loads": (raw_bytes(b"N"),),
        "pickle:loads": (raw_bytes(inner),),
        "_pickle:loads": (raw_bytes(inner),),
        "copyreg:_reconstructor": (named("builtins:object"), named("builtins:object"), None),
        "copy_reg:_reconstructor": (named("os:error"), named("__builtin__:object"), None),
        "copyreg:__newobj__": (named("subprocess:Popen"), ["touch", made]),
        "copyreg:add_extension": ("os", "system", 77),
        "sys:modules": (),
        "sys:exit": (3,),
        "io:open": (made, "w"),
        "_io:FileIO": (made, "w"),
        "logging.config:fileConfig": (made,),
        "multiprocessing.process:BaseProcess": (),
        "socket:create_connection": (("127.0.0.1", 9),),
        "urllib.request:urlopen": ("http://127.0.0.1:9/",),
        "code:InteractiveInterpreter": (),
        "cProfile:run": (source,),
        "bdb:Bdb": (),
        "pdb:run": (source,),
        "doctest:debug_script": (source,),
        "pydoc:pipepager": ("x", touch),
        "collections:namedtuple": ("X", "a"),
        "atexit:register": (text("x"),),
        "signal:alarm": (1,),
        "gc:get_objects": (),
        "inspect:currentframe": (),
        # of no known module, and named like a function
        "pip:main": (["install", made],),
        "pip._internal:main": (["install", made],),
        "dill:loads": (raw_bytes(inner),),
        "cloudpickle:loads": (raw_bytes(inner),),
        "joblib:load": (made,),
        f"{CANARY_MODULE}:run": (),
    }


# those of the above that do make the canary when pickle.loads gets them
RUNS = [
    "os:system",
    "posix:system",
    "os:popen",
    "os:execvp",
    "os:posix_spawnp",
    "subprocess:Popen",
    "subprocess:check_output",
    "subprocess:run",
    "subprocess:getoutput",
    "builtins:eval",
    "builtins:exec",
    "builtins:__import__",
    "builtins:open",
    "__builtin__:eval",
    "__builtin__:__import__",
    "importlib:import_module",
    "importlib:__import__",
    "numpy.testing._private.utils:runstring",
    "runpy:run_path",
    "runpy:run_module",
    "shutil:copyfile",
    "timeit:timeit",
    "codecs:open",
    "pickle:loads",
    "_pickle:loads",
    "io:open",
    "_io:FileIO",
    "cProfile:run",
    "torch.storage:_load_from_bytes",
    f"{CANARY_MODULE}:run",
]

# in STACK_GLOBAL a name may have dots, which pickle follows; these and their like must not be resolved
DOTTED = (
    "os:path.join",
    "os:path.os.system",
    "collections:OrderedDict.__init__.__globals__",
    "collections:OrderedDict.__class__",
    "collections:abc.sys.modules",
    "builtins:set.__class__",
    "torch:hub.load",
    "torch:nn.modules.module.torch.os.system",
    "torch:FloatStorage.from_file",
    "torch:FloatStorage.__init__.__globals__",
    "torch:Size.__class__",
    "torch:float32.__reduce__",
    "torch._utils:torch.load",
    "torch._utils:_rebuild_tensor_v2.__globals__",
    "torch._utils:_rebuild_parameter.__code__",
    "torch.nn.modules:linear.__builtins__",
    "torch.nn.modules.linear:__builtins__",
    "torch.nn.modules.linear:__loader__",
    "torch.nn.modules.linear:Linear.forward.__globals__",
    "torch.nn.modules.linear:Linear.__init__",
    "torch.nn.modules.linear:Linear.__subclasses__",
    "torch.nn.modules.linear:torch.load",
    "torch.nn.modules.module:torch.os.system",
    "torch.nn.modules.module:warnings.sys.modules",
    "torch.nn.modules.module:register_module_forward_hook",
    "torch.nn.modules.linear:math",
    "torch.nn.modules...:Linear",
    "numpy:core.multiarray.sys",
    "src.modeling:ImageEncoder.__init__.__globals__",
    "__main__:__builtins__",
    "__main__:__dict__",
)

# names of no module, or that look like another's: whatever is said of them is one line of plain text
ODD_NAMES = (
    "os :system",
    " os:system",
    "os\n:system",
    "os:system\n",
    "os\0:system",
    "os\r\nsystem:\x1b[2J",
    "\u043es:system",  # Cyrillic
    "\uff4f\uff53:system",  # full width, which an import statement would fold to os
    "\ud800:\udfff",
    ":",
    ":eval",
    "os:",
    ".os:system",
    "os.:system",
    "..:..",
    "OS:system",
    "builtins\u200b:eval",
    "é" * 100_000 + ":run",
    "a" * 100_000 + ":run",
    "a:" + "b" * 100_000,
    "src." + ".".join("ab" for _ in range(50_000)) + ":run",
)


# --- pickles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pickled:
    """A hostile pickle.

    Attributes:
        expected: a regular expression for the error. places: where it must be one: r(aw machine), z(ip), l(egacy);
            elsewhere it may be read, to no harm. heavy: takes memory, or could crash C code.
    """

    name: str
    data: bytes
    expected: str | None = ANYTHING
    places: str = "rzl"
    heavy: bool = False


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
    yield from _heavy_pickles()
    yield from _again_pickles()


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


def _heavy_pickles() -> Iterator[Pickled]:
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


def _again_pickles() -> Iterator[Pickled]:
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


# --- tensors that claim what is not there ---------------------------------------------------------------------------


def tensors() -> Iterator[Pickled]:
    """State dicts of one storage "0" with 4 floats, and something wrong with a tensor of it."""
    huge = storage(numel=TERABYTE // 4)
    bad: dict[str, bytes] = {
        "size-1e12-stride-0": tensor(size=(10**12,), stride=(0,)),
        "size-1e6x1e6-stride-0": tensor(size=(10**6, 10**6), stride=(0, 0)),
        "size-2e63": tensor(size=(2**63,), stride=(0,)),
        "size-2e64": tensor(size=(2**64,), stride=(1,)),
        "size-overflow": tensor(size=(2**32, 2**32), stride=(0, 0)),
        "size-overflow-to-zero": tensor(size=(2**32, 2**32, 0), stride=(1, 1, 1), offset=2**62),
        "size-overflow-to-one": tensor(size=(2**63 + 1, 2), stride=(1, 1)),
        "size-negative": tensor(size=(-1,), stride=(1,)),
        "size-two-negatives": tensor(size=(-2, -2), stride=(1, 1)),
        "stride-negative": tensor(stride=(-1, 1)),
        "stride-beyond": tensor(stride=(3, 1)),
        "stride-huge": tensor(stride=(2**62, 2**62)),
        "stride-2e64": tensor(stride=(2**64, 1)),
        "offset-negative": tensor(offset=-1),
        "offset-beyond": tensor(offset=1),
        "offset-huge": tensor(offset=2**63 - 1),
        "offset-2e64": tensor(offset=2**64),
        "storage-1tb": tensor(huge, size=(TERABYTE // 4,), stride=(1,)),
        "storage-1tb-small": tensor(huge),
        "storage-more": tensor(storage(numel=5), size=(5,), stride=(1,)),
        "storage-none": tensor(storage(numel=0), size=(1,), stride=(1,)),
        "size-bool": tensor(size=(True, 2)),
        "size-float": tensor(size=(2.0, 2)),
        "size-text": tensor(size=("2", 2)),
        "size-none": tensor(size=None),
        "size-number": tensor(size=4),
        "stride-text": tensor(stride=("2", 1)),
        "stride-short": tensor(stride=(1,)),
        "stride-long": tensor(stride=(2, 1, 1)),
        "stride-none": tensor(stride=None),
        "offset-text": tensor(offset="0"),
        "offset-float": tensor(offset=0.0),
        "offset-none": tensor(offset=None),
        "storage-text": tensor(text("0")),
        "storage-tensor": tensor(tensor()),
        "storage-missing": tensor(storage(key="7")),
        "storage-doubles": tensor(storage("torch:DoubleStorage")),
        "storage-complex": tensor(storage("torch:ComplexDoubleStorage")),
        "storage-unknown": tensor(storage("torch:HyperStorage")),
        "storage-class": tensor(storage("torch:Tensor")),
        "storage-base": tensor(storage("torch.storage:TypedStorage")),
        "key-path": tensor(storage(key="../../../../../../etc/passwd")),
        "key-absolute": tensor(storage(key="/etc/passwd")),
        "key-dots": tensor(storage(key="..")),
        "key-other-record": tensor(storage("torch:ByteStorage", key="../data.pkl"), size=(2, 2)),
        "key-other-record-root": tensor(storage("torch:ByteStorage", key="../version"), size=(1, 1), stride=(1, 1)),
        "key-empty": tensor(storage(key="")),
        "key-null": tensor(storage(key="0\0")),
        "key-long": tensor(storage(key="9" * 100_000)),
        "key-space": tensor(storage(key=" 0")),
        "key-other-digits": tensor(storage(key="\u0660")),
        "numel-text": tensor(storage(numel="4")),
        "numel-negative": tensor(storage(numel=-4)),
    }
    for name, data in bad.items():
        yield Pickled(f"tensor-{name}", pickled(value({"w": data})), ANYTHING, "zl", heavy=True)
    million = 100_000
    for name, size in {"100000-ones": (1,) * million, "100000-zeros": (0,) * million, "many": (1,) * 65}.items():
        data = pickled(value({"w": tensor(size=size, stride=(1,) * len(size))}))
        yield Pickled(f"tensor-dimensions-{name}", data, ANYTHING, "zl" if len(size) > 100 else "", heavy=True)
    lots = {f"w{index}": tensor(size=(2**30,), stride=(0,)) for index in range(300)}
    yield Pickled("tensor-all-1tb", pickled(value(lots)), ANYTHING, "zl", heavy=True)
    # the same record as two types, and a state dict whose names clash once they are paths
    both = {"w": tensor(), "v": tensor(storage("torch:LongStorage", numel=4), size=(4,), stride=(1,))}
    yield Pickled("tensor-two-types", pickled(value(both)), ANYTHING, "zl", heavy=True)
    clash = {"a.b": tensor(), "a": {"b": tensor(size=(4,), stride=(1,))}}
    yield Pickled("tensor-names-clash", pickled(value(clash)), ANYTHING, "", heavy=True)
    again = DICT + text("w") + tensor() + SETITEM + text("w") + tensor(size=(4,), stride=(1,)) + SETITEM
    yield Pickled("tensor-name-twice", pickled(again), ANYTHING, "", heavy=True)
    for name, other in {
        "sparse": call("torch._utils:_rebuild_sparse_tensor", named("torch:sparse_coo"), (tensor(), tensor(), (2, 2))),
        "quantised": call("torch._utils:_rebuild_qtensor", storage("torch:QInt8Storage"), 0, (2,), (1,), (1, 1.0, 0)),
        "meta": call("torch._utils:_rebuild_meta_tensor_no_storage", named("torch:float32"), (10**12,), (1,), False),
        "subclass": call("torch._utils:_rebuild_wrapper_subclass", named("m:C"), named("torch:float32"), (10**12,)),
        "device": call("torch._utils:_rebuild_device_tensor_from_numpy", "x", named("torch:float32"), "cpu", False),
        "device-cpu": call("torch._utils:_rebuild_device_tensor_from_cpu_tensor", tensor(), "x", "cuda:9", False),
    }.items():
        yield Pickled(f"tensor-{name}", pickled(value({"w": other})), ANYTHING, "", heavy=True)


# --- containers: legacy ---------------------------------------------------------------------------------------------

FLOATS = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
MAGIC = pickled(number(0x1950A86A20F9469CFC6C))
PROTOCOL = pickled(number(1001))
SYSTEM = pickled(
    value(
        {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4},
        }
    )
)
KEYS = pickled(value(["0"]))
BENIGN = pickled(value({"w": tensor()}))


def legacy(
    data: bytes = BENIGN,
    magic: bytes = MAGIC,
    protocol: bytes = PROTOCOL,
    system: bytes = SYSTEM,
    keys: bytes = KEYS,
    storages: bytes = struct.pack("<q", 4) + FLOATS,
) -> bytes:
    """torch.save's format before zip: five pickles, then each storage with its number of elements before it."""
    return magic + protocol + system + data + keys + storages


def legacy_files(canary: Path) -> Iterator[tuple[str, bytes, str | None, bool]]:
    """Something hostile in each part of a legacy file."""
    evil = pickled(call("os:system", f"touch {canary}"))
    stranger = pickled(call(f"{CANARY_MODULE}:run"))
    for part in ("magic", "protocol", "system", "keys"):
        yield f"legacy-{part}", legacy(**{part: evil}), r"os\.system", True
        yield f"legacy-{part}-stranger", legacy(**{part: stranger}), rf"{CANARY_MODULE}\.run", True
        yield (
            f"legacy-{part}-extension",
            legacy(**{part: pickled(b"\x82\xc8" + value(("x",)) + REDUCE)}),
            r"(?i)ext",
            True,
        )
        yield f"legacy-{part}-persistent", legacy(**{part: pickled(storage())}), ANYTHING, True
        yield f"legacy-{part}-none", legacy(**{part: pickled(NONE)}), ANYTHING, True
        yield f"legacy-{part}-deep", legacy(**{part: pickled(EMPTY_TUPLE + TUPLE1 * 100_000)}), ANYTHING, True
        yield f"legacy-{part}-cut", legacy(**{part: b"\x80\x02"}), ANYTHING, True
        yield f"legacy-{part}-empty", legacy(**{part: b""}), ANYTHING, True
    yield "legacy-no-magic", BENIGN, ANYTHING, True
    yield "legacy-protocol-9999", legacy(protocol=pickled(number(9999))), ANYTHING, True
    big = pickled(value({"protocol_version": 1001, "little_endian": False, "type_sizes": {}}))
    yield "legacy-big-endian", legacy(system=big), ANYTHING, True
    for name, keys in {
        "missing": [],
        "other": ["1"],
        "twice": ["0", "0"],
        "number": [0],
        "text": "0",
        "dict": {"0": 0},
        "nested": [["0"]],
        "huge": ["0"] + ["1"] * 10_000,
        "path": ["../../etc/passwd"],
    }.items():
        yield f"legacy-keys-{name}", legacy(keys=pickled(value(keys))), ANYTHING, True
    for name, storages in {
        "none": b"",
        "count-alone": struct.pack("<q", 4),
        "short": struct.pack("<q", 4) + FLOATS[:-1],
        "negative": struct.pack("<q", -4) + FLOATS,
        "huge": struct.pack("<q", 2**62) + FLOATS,
        "1tb": struct.pack("<q", TERABYTE // 4) + FLOATS,
        "fewer": struct.pack("<q", 3) + FLOATS,
        "more": struct.pack("<q", 5) + FLOATS + b"\0\0\0\0",
        "half-count": b"\x04\0\0",
    }.items():
        yield f"legacy-storage-{name}", legacy(storages=storages), ANYTHING, True
    view = value(("storage", named("torch:FloatStorage"), "0", "cpu", 4, ("v", 3, 4))) + BINPERSID
    yield "legacy-view-beyond", legacy(pickled(value({"w": tensor(view)}))), ANYTHING, True
    view = value(("storage", named("torch:FloatStorage"), "0", "cpu", 4, ("v", -1, 4))) + BINPERSID
    yield "legacy-view-negative", legacy(pickled(value({"w": tensor(view)}))), ANYTHING, True
    view = value(("storage", named("torch:FloatStorage"), "0", "cpu", 4, call("os:system", "x"))) + BINPERSID
    yield "legacy-view-call", legacy(pickled(value({"w": tensor(view)}))), r"os\.system", True
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, data in {"sys_info": SYSTEM, "pickle": evil, "storages": evil, "tensors": evil}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    yield "legacy-tar", tar.getvalue(), ANYTHING, True


# --- containers: zip ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One record of a zip file, and what is said of it: everything can be a lie."""

    name: str | bytes
    data: bytes = b""
    deflate: bool = False
    flags: int = 0
    attributes: int = 0
    crc: int | None = None
    size: int | None = None
    stored_size: int | None = None
    local_name: str | bytes | None = None
    local_size: int | None = None
    local_crc: int | None = None
    local_flags: int | None = None
    offset: int | None = None
    extra: bytes = b""
    method: int | None = None
    listed: bool = True
    present: bool = True


def zipped(entries: Sequence[Entry], comment: bytes = b"", **end: int) -> bytes:
    """A zip file as the entries say; ``end`` (count, size, offset) changes the last record."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        local = entry.local_name if entry.local_name is not None else name
        local = local.encode() if isinstance(local, str) else local
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = packer.compress(entry.data) + packer.flush() if entry.deflate else entry.data
        method = (8 if entry.deflate else 0) if entry.method is None else entry.method
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        stored_size = len(stored) if entry.stored_size is None else entry.stored_size
        offset = len(body) if entry.offset is None else entry.offset
        if entry.present:
            flags = entry.flags if entry.local_flags is None else entry.local_flags
            sizes = (
                min(stored_size, 2**32 - 1),
                min(size, 2**32 - 1) if entry.local_size is None else entry.local_size,
            )
            local_crc = crc if entry.local_crc is None else entry.local_crc
            body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, flags, method, 0, 33, local_crc, *sizes, len(local), 0)
            body += local + stored
        extra = entry.extra
        if max(size, stored_size, offset) >= 2**32 - 1:
            extra = struct.pack("<HHQQQ", 1, 24, size, stored_size, offset) + extra
            size = stored_size = offset = 2**32 - 1
        if entry.listed:
            directory += struct.pack(
                "<4sHHHHHHIIIHHHHHII",
                *(b"PK\1\2", 0x0314, 20, entry.flags, method, 0, 33, crc, stored_size, size),
                *(len(name), len(extra), 0, 0, 0, entry.attributes, offset),
            )
            directory += name + extra
    listed = end.get("count", sum(entry.listed for entry in entries))
    size, offset = end.get("size", len(directory)), end.get("offset", len(body))
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, listed, listed, size, offset, len(comment))
    return bytes(body + directory + tail + comment)


def records(data: bytes = BENIGN, **others: bytes) -> dict[str, bytes]:
    """The records of a torch.save file: name without root -> content."""
    return {"data.pkl": data, "byteorder": b"little", "data/0": FLOATS, "version": b"3\n", **others}


def entries(data: bytes = BENIGN, root: str = "archive", **changes: Entry) -> list[Entry]:
    """The entries of a torch.save file; ``changes`` by record name (``data_0`` for data/0)."""
    short = {"data.pkl": "pickle", "data/0": "storage", "byteorder": "byteorder", "version": "version"}
    return [changes.get(short[name], Entry(f"{root}/{name}", content)) for name, content in records(data).items()]


def torch_zip(data: bytes = BENIGN) -> bytes:
    """A torch.save file with this pickle."""
    return zipped(entries(data))


def _bomb(name: str, pattern: bytes, size: int, start: bytes) -> Entry:
    """An entry of ``size`` bytes in a thousandth of that."""
    packer, checksum, packed = zlib.compressobj(9, zlib.DEFLATED, -15), 0, []
    chunk = start + pattern * (2**20 // len(pattern))
    left = size
    while left > 0:
        chunk = chunk[:left]
        checksum = zlib.crc32(chunk, checksum)
        packed.append(packer.compress(chunk))
        left -= len(chunk)
        chunk = pattern * (2**20 // len(pattern))
    packed.append(packer.flush())
    return Entry(name, b"".join(packed), method=8, crc=checksum, size=size)


def zip_files(canary: Path) -> Iterator[tuple[str, bytes | Callable[[], bytes], str | bool | None, bool]]:
    """(name, content or what makes it, expected error or False if it may be read, whether it takes memory)."""
    evil = pickled(call("os:system", f"touch {canary}"))
    system = r"os\.system"
    pickle_name, storage_name = "archive/data.pkl", "archive/data/0"
    for name in ("../x", "archive/../../x", "/etc/passwd", "..\\x", "C:\\x", "archive\\data.pkl", "archive/data/../0"):
        yield f"path-{name}".replace("/", "|"), zipped([*entries(), Entry(name, b"x")]), False, False
        yield f"path-only-{name}".replace("/", "|"), zipped([Entry(name, BENIGN)]), ANYTHING, False
        moved = entries(pickled(value({"w": tensor(storage(key=name))})), storage=Entry(f"archive/data/{name}", FLOATS))
        yield f"path-storage-{name}".replace("/", "|"), zipped(moved), ANYTHING, False
    yield "path-root", zipped(entries(root="../archive")), ANYTHING, False
    yield "path-root-absolute", zipped(entries(root="/archive")), ANYTHING, False
    yield "path-root-dots", zipped(entries(root="..")), ANYTHING, False
    for order in ((BENIGN, evil), (evil, BENIGN)):
        which = "evil-last" if order[1] is evil else "evil-first"
        twice = [Entry(pickle_name, order[0]), *entries(order[1])]
        yield f"twice-pickle-{which}", zipped(twice), ANYTHING, False
        two_roots = [*entries(order[0]), Entry("other/data.pkl", order[1])]
        yield f"two-roots-{which}", zipped(two_roots), ANYTHING, False
        nested = [*entries(order[0]), Entry("archive/archive/data.pkl", order[1])]
        yield f"nested-root-{which}", zipped(nested), False, False
        hidden = [Entry(pickle_name, order[0], listed=False), *entries(order[1])]
        yield f"unlisted-{which}", zipped(hidden), system if order[1] is evil else False, False
        case = [Entry("archive/DATA.PKL", order[0]), *entries(order[1])]
        yield f"other-case-{which}", zipped(case), system if order[1] is evil else False, False
    yield "twice-storage", zipped([*entries(), Entry(storage_name, FLOATS[::-1])]), ANYTHING, False
    yield "twice-storage-same", zipped([*entries(), Entry(storage_name, FLOATS)]), ANYTHING, False
    yield "twice-version", zipped([*entries(), Entry("archive/version", b"2\n")]), ANYTHING, False
    size = 400_000_000
    count = size // 4
    big = pickled(value({"w": tensor(storage(numel=count), size=(count,), stride=(1,))}))

    def bombed(part: str, name: str, pattern: bytes, data: bytes = BENIGN, start: bytes = b"") -> Callable[[], bytes]:
        return lambda: zipped(entries(data, **{part: _bomb(name, pattern, size, start)}))

    start = b"X" + struct.pack("<I", size - 5)
    yield "bomb-pickle", bombed("pickle", pickle_name, b"}0"), ANYTHING, True
    yield "bomb-text", bombed("pickle", pickle_name, b"aa", start=start), ANYTHING, True
    yield "bomb-storage", bombed("storage", storage_name, b"\0\0"), ANYTHING, True
    yield "bomb-tensor", bombed("storage", storage_name, b"\0\0", big), ANYTHING, True
    yield "bomb-version", bombed("version", "archive/version", b"\0\0"), False, True
    yield "bomb-byteorder", bombed("byteorder", "archive/byteorder", b"\0\0"), ANYTHING, True
    claimed = Entry(storage_name, b"\0" * 1000, deflate=True, size=TERABYTE, local_size=2**32 - 1)
    claims = pickled(value({"w": tensor(storage(numel=TERABYTE // 4), size=(TERABYTE // 4,), stride=(1,))}))
    yield "claims-1tb-deflated", zipped(entries(claims, storage=claimed)), ANYTHING, True
    claimed = Entry(storage_name, FLOATS, size=TERABYTE, stored_size=TERABYTE)
    yield "claims-1tb", zipped(entries(claims, storage=claimed)), ANYTHING, True
    yield "claims-1tb-small-tensor", zipped(entries(storage=claimed)), ANYTHING, True
    for name, lie in {
        "size-more": Entry(storage_name, FLOATS, size=20),
        "size-less": Entry(storage_name, FLOATS, size=12),
        "sizes-beyond": Entry(storage_name, FLOATS, size=10_000, stored_size=10_000),
        "stored-size-more": Entry(storage_name, FLOATS, stored_size=20),
        "crc": Entry(storage_name, FLOATS, crc=1),
        "method-99": Entry(storage_name, FLOATS, method=99),
        "method-14": Entry(storage_name, FLOATS, method=14),
        "encrypted": Entry(storage_name, FLOATS, flags=1),
        "encrypted-strong": Entry(storage_name, FLOATS, flags=0x41),
        "patched": Entry(storage_name, FLOATS, flags=0x20),
        "offset-beyond": Entry(storage_name, FLOATS, offset=100_000),
        "offset-zip64": Entry(storage_name, FLOATS, offset=2**63),
        "offset-zero": Entry(storage_name, FLOATS, offset=0),
        "local-name": Entry(storage_name, FLOATS, local_name="archive/data/1"),
        "local-name-long": Entry(storage_name, FLOATS, local_name="archive/data/" + "0" * 60_000),
        "deflate-broken": Entry(storage_name, FLOATS, method=8, size=16),
        "absent": Entry(storage_name, FLOATS, listed=False),
        "directory": Entry(f"{storage_name}/", FLOATS),
        "empty": Entry(storage_name, b""),
        "odd-size": Entry(storage_name, FLOATS[:-1]),
        "extra-broken": Entry(storage_name, FLOATS, extra=b"\x01\0\xff\xff"),
        "extra-zip64-short": Entry(storage_name, FLOATS, extra=b"\x01\0\x02\0xx", size=2**32 - 1),
    }.items():
        allowed = False if name == "patched" else ANYTHING
        yield f"storage-{name}", zipped(entries(storage=lie)), allowed, name.endswith("beyond")
    symlink = Entry(storage_name, b"/etc/passwd", attributes=0o120777 << 16)
    yield "symlink", zipped(entries(storage=symlink)), ANYTHING, False
    symlink = Entry(storage_name, FLOATS, attributes=0o120777 << 16)
    yield "symlink-fits", zipped(entries(storage=symlink)), False, False
    # central directory and local header of the pickle disagree: the two readers of a file must not see two files
    disagreeing = Entry(pickle_name, BENIGN, local_name="archive/data.pk1")
    yield "pickle-local-name", zipped(entries(pickle=disagreeing)), ANYTHING, False
    yield "pickle-local-crc", zipped(entries(pickle=Entry(pickle_name, BENIGN, local_crc=7))), False, False
    yield "pickle-local-size", zipped(entries(pickle=Entry(pickle_name, BENIGN, local_size=7))), False, False
    yield "pickle-local-flags", zipped(entries(pickle=Entry(pickle_name, BENIGN, local_flags=1))), False, False
    # two entries over the same bytes
    over = [*entries(), Entry("archive/data/1", b"", offset=0, size=16, stored_size=16, crc=0, present=False)]
    yield "overlap", zipped(over), False, False
    body = zipped(entries())
    at = body.index(b"PK\3\4", body.index(storage_name.encode()) - 30)
    same = Entry(storage_name, FLOATS, offset=at, present=False)
    alias = Entry("archive/data/1", FLOATS, offset=at, present=False)
    yield "overlap-alias", zipped([*entries(), alias]), False, False
    yield "overlap-twice", zipped([*entries(), same]), ANYTHING, False
    quine = [Entry(f"archive/data/{i}", b"", offset=at, size=16, stored_size=16, present=False) for i in range(1, 3000)]
    yield "overlap-3000", zipped([*entries(), *quine]), False, True
    many = [Entry(f"archive/data/{i}", b"") for i in range(1, 60_000)]
    yield "entries-60000", zipped([*entries(), *many]), False, True
    for name, end in {
        "count-less": {"count": 2},
        "count-more": {"count": 9},
        "count-zip64": {"count": 65535},
        "size-zero": {"size": 0},
        "size-huge": {"size": 2**32 - 2},
        "size-zip64": {"size": 2**32 - 1},
        "offset-huge": {"offset": 2**32 - 2},
        "offset-zip64": {"offset": 2**32 - 1},
        "offset-zero": {"offset": 0},
    }.items():
        yield f"end-{name}", zipped(entries(), **end), False, True
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 2**62, 1)
    yield "zip64-locator-lies", body[:-22] + locator + body[-22:], False, True
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, 2**60)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) - 22, 1)
    yield "zip64-counts-lie", body[:-22] + record + locator + body[-22:], False, True
    yield "appended", body + b"garbage" * 100, False, False
    yield "appended-evil", body + evil, False, False
    yield "appended-zip", body + zipped(entries(evil)), False, False
    yield "prepended", b"garbage" * 100 + body, False, False
    yield "prepended-pickle", evil + body, False, False
    yield "prepended-legacy", legacy(evil) + body, False, False
    yield "comment", zipped(entries(), comment=b"PK\5\6" + b"\0" * 18), False, False
    yield "comment-zip", zipped(entries(), comment=zipped(entries(evil))), False, False
    yield "no-entries", zipped([]), ANYTHING, False
    yield "no-pickle", zipped(entries()[1:]), ANYTHING, False
    yield "no-root", zipped([Entry(name, data) for name, data in records().items()]), False, False
    yield "half", body[: len(body) // 2], ANYTHING, False
    yield "end-alone", body[-22:], ANYTHING, False
    yield "no-end", body[:-22], ANYTHING, False
    for order_text in (b"big", b"middle", b"", b"\xff", b"little\n"):
        changed = entries(byteorder=Entry("archive/byteorder", order_text))
        yield f"byteorder-{order_text!r}", zipped(changed), False if b"little" in order_text else ANYTHING, False
    for version in (b"99999999999999999999", b"x", b"", b"-1"):
        yield f"version-{version!r}", zipped(entries(version=Entry("archive/version", version))), False, False
    yield "name-not-utf8", zipped([*entries(), Entry(b"archive/\xff\xfe", b"x", flags=0x800)]), False, False
    yield "name-null", zipped([Entry(b"archive/data.pkl\0.txt", evil), *entries()[1:]]), False, False
    yield "name-empty", zipped([*entries(), Entry("", b"x")]), False, False
    yield "name-newline", zipped([*entries(root="a\nb")]), False, False
    yield "name-escape", zipped([*entries(pickled(value({"w": 1})), root="a\x1b[2Jb")]), ANYTHING, False
    # TorchScript: code/ and constants.pkl are there; they must not be run either
    script = [*entries(), Entry("archive/constants.pkl", evil), Entry("archive/code/__torch__.py", b"import os")]
    yield "torchscript-constants", zipped(script), False, False
    yield "torchscript-evil", zipped([*entries(evil), Entry("archive/constants.pkl", BENIGN)]), system, False
    # a deflated pickle is allowed or not, but never another one
    yield "deflated", zipped(entries(pickle=Entry(pickle_name, BENIGN, deflate=True))), False, False
    yield "deflated-evil", zipped(entries(pickle=Entry(pickle_name, evil, deflate=True))), f"{system}|compress", False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as file:
            file.writestr(pickle_name, BENIGN)
            file.writestr(storage_name, FLOATS)
    yield "lzma", buffer.getvalue(), False, False


# --- safetensors ----------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = FLOATS, length: int | None = None) -> bytes:
    """A safetensors file with this header: a value for JSON, or its text."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def _part(start: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


def safetensors_files() -> Iterator[tuple[str, bytes, str | bool | None, bool]]:
    """As :func:`zip_files`."""
    good = {"w": _part()}
    text_of = json.dumps(good).encode()
    yield "empty", b"", ANYTHING, False
    yield "eight-bytes", b"\0" * 8, ANYTHING, False
    yield "length-2e63", safetensors(good, length=2**63), ANYTHING, True
    yield "length-2e64", safetensors(good, length=2**64 - 1), ANYTHING, True
    yield "length-100mb", safetensors(good, length=100_000_000), ANYTHING, True
    yield "length-short", safetensors(good, length=20), ANYTHING, False
    yield "length-one-more", safetensors(good, length=len(text_of) + 1), ANYTHING, False
    yield "length-all", safetensors(good, length=len(text_of) + 16), ANYTHING, False
    yield "no-data", safetensors(good, b""), ANYTHING, False
    yield "short-data", safetensors(good, FLOATS[:-1]), ANYTHING, False
    yield "trailing-data", safetensors(good, FLOATS + b"x"), ANYTHING, False
    yield "claims-1tb", safetensors({"w": _part(0, TERABYTE, (TERABYTE // 4,))}), ANYTHING, True
    yield "shape-1tb", safetensors({"w": _part(0, 16, (TERABYTE // 4,))}), ANYTHING, True
    yield "shape-overflow", safetensors({"w": _part(0, 16, (2**32, 2**32))}), ANYTHING, True
    yield "shape-overflow-to-fit", safetensors({"w": _part(0, 16, (2**62, 4, 2**62 + 1))}), ANYTHING, True
    yield "shape-zero-and-huge", safetensors({"w": _part(0, 0, (2**63, 0)), "v": _part()}), False, True
    yield "overlapping", safetensors({"w": _part(0, 16), "v": _part(8, 16, (2,))}), ANYTHING, False
    yield "same-place", safetensors({"w": _part(), "v": _part()}), ANYTHING, False
    yield "hole", safetensors({"w": _part(0, 4, (1,)), "v": _part(8, 16, (2,))}), ANYTHING, False
    yield "unsorted", safetensors({"w": _part(8, 16, (2,)), "v": _part(0, 8, (2,))}), False, False
    yield "reversed", safetensors({"w": _part(16, 0)}), ANYTHING, False
    yield "offset-negative", safetensors({"w": _part(-16, 0)}), ANYTHING, False
    yield "offset-float", safetensors(text_of.replace(b"16", b"16.0")), ANYTHING, False
    yield "offset-huge", safetensors({"w": _part(2**64 - 16, 2**64)}), ANYTHING, False
    yield "shape-negative", safetensors({"w": _part(shape=(-4,))}), ANYTHING, False
    yield "shape-text", safetensors({"w": _part(shape=["4"])}), ANYTHING, False
    yield "shape-null", safetensors({"w": {"dtype": "F32", "shape": None, "data_offsets": [0, 16]}}), ANYTHING, False
    yield "shape-million", safetensors({"w": _part(0, 16, (4, *(1,) * 10**6))}), False, True
    yield "dtype-unknown", safetensors({"w": _part(dtype="F33")}), ANYTHING, False
    yield "dtype-number", safetensors({"w": _part(dtype=32)}), ANYTHING, False
    yield "dtype-f4", safetensors({"w": _part(shape=(32,), dtype="F4")}), False, False
    yield "dtype-f6", safetensors({"w": _part(0, 3, (4,), "F6_E2M3"), "v": _part(3, 16, (13,), "U8")}), False, False
    yield "dtype-e8m0", safetensors({"w": _part(shape=(16,), dtype="F8_E8M0")}), False, False
    twice = text_of[:-1] + b", " + text_of[1:]
    yield "key-twice", safetensors(twice), ANYTHING, False
    other = text_of.replace(b"[4]", b"[2, 2]")
    yield "key-twice-other", safetensors(text_of[:-1] + b", " + other[1:]), ANYTHING, False
    yield "field-twice", safetensors(text_of.replace(b'"shape"', b'"shape": [1], "shape"')), ANYTHING, False
    yield "field-unknown", safetensors({"w": {**_part(), "code": "import os"}}), False, False
    yield "nan", safetensors(text_of.replace(b"[4]", b"[NaN]")), ANYTHING, False
    yield "nan-metadata", safetensors(text_of[:-1] + b', "__metadata__": {"a": NaN}}'), ANYTHING, False
    yield "metadata-number", safetensors({**good, "__metadata__": {"a": 1}}), ANYTHING, False
    yield "metadata-list", safetensors({**good, "__metadata__": []}), ANYTHING, False
    yield "metadata-huge", safetensors({**good, "__metadata__": {"a": "x" * 50_000_000}}), False, True
    yield "metadata-many", safetensors({**good, "__metadata__": {str(k): "" for k in range(300_000)}}), False, True
    yield "nested", safetensors(b'{"w":' + b"[" * 100_000), ANYTHING, True
    yield "nested-closed", safetensors(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ANYTHING, True
    yield (
        "nested-metadata",
        safetensors(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
        ANYTHING,
        True,
    )
    yield "header-list", safetensors([1, 2]), ANYTHING, False
    yield "header-number", safetensors(1), ANYTHING, False
    yield "header-text", safetensors(b"import os"), ANYTHING, False
    yield "header-not-utf8", safetensors(b'{"\xff": 1}'), ANYTHING, False
    yield "header-bom", safetensors(b"\xef\xbb\xbf" + text_of), ANYTHING, False
    yield "header-space", safetensors(b" " + text_of), False, False
    yield "header-null", safetensors(text_of + b"\0"), False, False
    yield "header-empty", safetensors({}, b""), False, False
    yield "name-surrogate", safetensors(text_of.replace(b'"w"', b'"\\ud800"')), ANYTHING, False
    yield "name-newline", safetensors({"a\nb\x1b[2J": _part(shape=(5,))}), ANYTHING, False
    yield "name-long", safetensors({"n" * 1_000_000: _part(shape=(5,))}), ANYTHING, False
    yield "name-empty", safetensors({"": _part()}), False, False
    yield "many-tensors", safetensors({str(k): _part(0, 0, (0,)) for k in range(20_000)}, b""), False, True
    yield "a-pickle", pickled(call("os:system", "x")), ANYTHING, False
    yield "a-zip", torch_zip(), False, False


# --- folders --------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 4,
    "hidden_act": "quick_gelu",
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the encoder that :data:`CONFIG` describes, in Hugging Face's names."""
    block = {f"self_attn.{part}_proj": (8, 8) for part in ("q", "k", "v", "out")}
    block |= {"mlp.fc1": (16, 8), "mlp.fc2": (8, 16), "layer_norm1": (8,), "layer_norm2": (8,)}
    layers = {f"encoder.layers.0.{name}": shape for name, shape in block.items()}
    layers |= {"pre_layrnorm": (8,), "post_layernorm": (8,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (8,),
        "embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "embeddings.position_embedding.weight": (5, 8),
    }
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {"visual_projection.weight": (4, 8)} | {f"vision_model.{name}": shape for name, shape in shapes.items()}


def clip_file(names: Iterable[str] | None = None, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of these tensors (all of them by default), each with numbers of its own."""
    shapes, header, data = clip_shapes(), {}, b""
    for name in shapes if names is None else names:
        count = math.prod(shapes[name])
        header[name] = _part(len(data), len(data) + 4 * count, shapes[name])
        data += struct.pack(f"<{count}f", *(len(data) + index / 1024 for index in range(count)))
    return safetensors({**header, **({} if metadata is None else {"__metadata__": dict(metadata)})}, data)


GOOD = clip_file()
NAMES = sorted(clip_shapes())
FIRST, SECOND = NAMES[0], NAMES[-1]
SHARDS = {"one": clip_file(NAMES[:9]), "two": clip_file(NAMES[9:])}
WEIGHT_MAP = {name: "one.safetensors" if name in NAMES[:9] else "two.safetensors" for name in NAMES}


def folders() -> Iterator[tuple[str, dict[str, bytes], str | bool | None, bool]]:
    """(name, file name -> content, expected error or False, whether it takes memory)."""
    config = json.dumps(CONFIG).encode()

    def changed(**values: Any) -> bytes:
        return json.dumps({**CONFIG, **values}).encode()

    # what the tensors are is in the weights: a reader may leave the configuration to those who build the model
    for name, content in {
        "hidden-1e9": changed(hidden_size=10**9),
        "layers-1e9": changed(num_hidden_layers=10**9),
        "image-1e9": changed(image_size=10**9),
        "patch-zero": changed(patch_size=0),
        "heads-zero": changed(num_attention_heads=0),
        "hidden-negative": changed(hidden_size=-8),
        "hidden-text": changed(hidden_size="8"),
        "hidden-float": changed(hidden_size=8.5),
        "hidden-bool": changed(hidden_size=True),
        "hidden-null": changed(hidden_size=None),
        "hidden-nan": config.replace(b'"hidden_size": 8', b'"hidden_size": NaN'),
        "hidden-digits": config.replace(b'"hidden_size": 8', b'"hidden_size": ' + b"9" * 100_000),
        "bert": changed(model_type="bert", architectures=["BertModel"]),
        "auto-map": changed(auto_map={"AutoModel": "modeling.Model"}),
        "vision-config-list": changed(vision_config=[1]),
        "list": b"[]",
        "number": b"7",
        "empty": b"",
        "text": b"import os",
        "twice": config[:-1] + b", " + config[1:],
        "not-utf8": b'{"\xff": 1}',
        "surrogate": changed(model_type="\ud800"),
        "escape": changed(model_type="\x1b[2J\nbert"),
        "nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "nested-list": b"[" * 1_000_000,
        "string-100mb": lambda: b'{"model_type": "' + b"x" * 100_000_000 + b'"}',
        "million-keys": json.dumps({str(key): 0 for key in range(500_000)}).encode(),
    }.items():
        heavy = name.startswith(("nested", "string", "million", "hidden-digits"))
        yield f"config-{name}", {"config.json": content, WEIGHTS: GOOD}, False, heavy
    yield "config-alone", {"config.json": config}, ANYTHING, False
    yield "nothing", {}, ANYTHING, False

    def sharded(weight_map: Any, **shards: bytes) -> dict[str, bytes]:
        index = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        found = {f"{key}.safetensors": content for key, content in (shards or SHARDS).items()}
        return {"config.json": config, INDEX: index, **found}

    outside = "../outside.safetensors"
    for name, shard in {
        "outside": outside,
        "outside-dot": "./../outside.safetensors",
        "outside-folder": f"x/../{outside}",
        "absolute": "/etc/passwd",
        "backslash": "..\\outside.safetensors",
        "null": "one\0.safetensors",
        "empty": "",
        "dot": ".",
        "suffix-alone": ".safetensors",
        "device": "/dev/zero",
        "other-suffix": "config.json",
        "missing-shard": "three.safetensors",
        "wrong-shard": "two.safetensors",
        "number": 1,
        "none": None,
        "nested": {"v": "one.safetensors"},
        "long": "a" * 100_000 + ".safetensors",
        "newline": "a\nb\x1b[2J.safetensors",
        "surrogate": "\ud800.safetensors",
    }.items():
        files = {**sharded({**WEIGHT_MAP, FIRST: shard}), outside: clip_file([FIRST])}
        yield f"index-{name}", files, ANYTHING, name == "device"
    many = {f"w{k}": f"{k}.safetensors" for k in range(100_000)}
    yield "index-many", sharded({**WEIGHT_MAP, **many}), ANYTHING, True
    yield "index-good", sharded(WEIGHT_MAP), False, False
    yield "index-list", sharded(["one.safetensors"]), ANYTHING, False
    yield "index-null", sharded(None), ANYTHING, False
    yield "index-text", sharded("one.safetensors"), ANYTHING, False
    yield "index-no-tensors", sharded({}), ANYTHING, False
    yield "index-tensor-not-listed", sharded({k: v for k, v in WEIGHT_MAP.items() if k != FIRST}), ANYTHING, False
    two = clip_file([FIRST, *NAMES[9:]])
    yield "index-two-shards", sharded(WEIGHT_MAP, one=SHARDS["one"], two=two), ANYTHING, False
    twice = json.dumps({"weight_map": WEIGHT_MAP}).replace("{", '{"' + FIRST + '": "two.safetensors", ', 2).encode()
    yield "index-twice", sharded(twice), ANYTHING, False
    yield "index-deep", sharded(b'{"weight_map":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001), ANYTHING, True
    yield "index-not-json", sharded(b"import os"), ANYTHING, False
    yield "index-blank", sharded(b""), ANYTHING, False
    yield "index-is-a-list", sharded(b"[]"), ANYTHING, False
    yield "index-and-single", {**sharded(WEIGHT_MAP), WEIGHTS: clip_file([FIRST])}, False, False
    nan = bytearray(GOOD)
    nan[-4:] = struct.pack("<f", float("nan"))
    yield "nan", {"config.json": config, WEIGHTS: bytes(nan)}, ANYTHING, False
    nan[-4:] = struct.pack("<f", float("-inf"))
    yield "inf", {"config.json": config, WEIGHTS: bytes(nan)}, ANYTHING, False
    yield "good", {"config.json": config, WEIGHTS: GOOD}, False, False
    evil = torch_zip(pickled(call("os:system", "touch canary")))
    yield "pickle", {"config.json": config, "pytorch_model.bin": evil}, r"os\.system", False
    index = json.dumps({"weight_map": {"w": "pytorch_model-1.bin"}}).encode()
    files = {"config.json": config, "pytorch_model.bin.index.json": index, "pytorch_model-1.bin": evil}
    yield "pickle-sharded", files, r"os\.system", False
    yield "pickle-as-safetensors", {"config.json": config, WEIGHTS: evil}, f"os\\.system|{WEIGHTS}", False
    clip = {"model_cfg": {"embed_dim": 4, "vision_cfg": {"layers": 1, "width": 8, "patch_size": 4, "image_size": 8}}}
    for name, content in {
        "layers-1e9": json.dumps({"model_cfg": {**clip["model_cfg"], "vision_cfg": {"layers": 10**9}}}).encode(),
        "timm": json.dumps(
            {"model_cfg": {"vision_cfg": {"timm_model_name": "x", "timm_model_pretrained": True}}}
        ).encode(),
        "hf-text": json.dumps({"model_cfg": {"text_cfg": {"hf_model_name": "../../x"}}}).encode(),
        "list": b"[]",
        "nested": b'{"model_cfg":' * 100_000,
        "empty": b"",
    }.items():
        yield f"open-clip-{name}", {"open_clip_config.json": content, "open_clip_model.safetensors": GOOD}, False, False


def metadata_files() -> Iterator[tuple[str, bytes]]:
    """Safetensors files that look like ours, whose metadata asks for a model without end."""
    arguments = {"width": 8, "layers": 1, "heads": 2, "image_size": 8, "patch_size": 4, "output_dim": 4}
    for name, encoder in {
        "layers-1e9": {"arguments": {**arguments, "layers": 1e9}},
        "layers-int": {"arguments": {**arguments, "layers": 10**9}},
        "width-1e9": {"arguments": {**arguments, "width": 10**9}},
        "image-1e9": {"arguments": {**arguments, "image_size": 10**9}},
        "ratio-1e9": {"arguments": {**arguments, "mlp_ratio": 1e9}},
        "patch-zero": {"arguments": {**arguments, "patch_size": 0}},
        "unknown": {"arguments": {**arguments, "act_layer": "os.system"}},
        "name": {"architecture": "../../etc/passwd"},
        "list": {"arguments": []},
        "none": None,
        "number": 7,
        "deep": "[" * 50_000,
    }.items():
        for key in ("encoder", "preprocessing"):
            value_text = encoder if isinstance(encoder, str) else json.dumps(encoder)
            metadata = {
                "format": "pareto-folded",
                "format_version": "1",
                "task_names": '["a"]',
                "layers": "{}",
                "encoder": json.dumps({"arguments": arguments}),
                key: value_text,
            }
            yield f"{key}-{name}", clip_file(metadata=metadata)
            del metadata["format"]
            yield f"{key}-{name}-converted", clip_file(metadata=metadata)


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One hostile checkpoint.

    Attributes:
        write: puts it into a folder and returns what to open. expected: a regular expression in the error; None: any
            error. harmless: it may also be read. how: ``machine`` for read_pickle, else ``open``. heavy: takes memory,
            time or the C stack where a reader is careless, so it is opened in a process of its own.
    """

    name: str
    write: Callable[[Path], Path] = field(repr=False)
    expected: str | None = ANYTHING
    harmless: bool = False
    how: str = "open"
    heavy: bool = False


def _write(folder: Path, name: str, content: bytes | Callable[[], bytes], wrap: Callable[[bytes], bytes]) -> Path:
    path = folder / name
    path.write_bytes(wrap(content() if callable(content) else content))
    return path


def _write_folder(folder: Path, files: Mapping[str, bytes | Callable[[], bytes]]) -> Path:
    inside = folder / "model"
    inside.mkdir()
    for name, content in files.items():
        (inside / name).write_bytes(content() if callable(content) else content)
    return inside


@cache
def cases(canary: Path) -> tuple[Case, ...]:
    """Every hostile checkpoint; what would run makes ``canary``."""
    found: list[Case] = []
    containers = {"r": ("raw", "x.pkl", bytes), "z": ("zip", "x.pt", torch_zip), "l": ("legacy", "x.pth", legacy)}
    for letters, group in (("rzl", pickles(canary)), ("zl", tensors())):
        for one, letter in itertools.product(group, letters):
            if one.heavy and letter == "l" and one.data[:1] != b"\x80":
                continue  # the machine is the same, and the format needs a protocol first
            where, file_name, wrap = containers[letter]
            write = partial(_write, name=file_name, content=one.data, wrap=wrap)
            how, harmless = "machine" if letter == "r" else "open", letter not in one.places
            found.append(Case(f"{where}-{one.name}", write, one.expected, harmless, how, one.heavy))
    files = [("file", "x.pth", one) for one in legacy_files(canary)]
    files += [("file-zip", "x.pt", one) for one in zip_files(canary)]
    files += [("safetensors", "x.safetensors", one) for one in safetensors_files()]
    for kind, file_name, (name, data, expected, heavy) in files:
        write = partial(_write, name=file_name, content=data, wrap=bytes)
        found.append(_case(f"{kind}-{name}", write, expected, heavy))
    for name, data in metadata_files():
        write = partial(_write, name="x.safetensors", content=data, wrap=bytes)
        found.append(Case(f"metadata-{name}", write, harmless=True, heavy=True))
    for name, inside, expected, heavy in folders():
        found.append(_case(f"folder-{name}", partial(_write_folder, files=inside), expected, heavy))
    return tuple(found)


def _case(name: str, write: Callable[[Path], Path], expected: str | bool | None, heavy: bool) -> Case:
    regex = expected if isinstance(expected, str) else ANYTHING
    return Case(name, write, regex, harmless=expected is False, heavy=heavy)


# --- opening them in a process of their own -------------------------------------------------------------------------

# bytes, and seconds on the processor for one reading: another process that wants it too does not count
MEMORY, SECONDS = 300 * 2**20, 4.0


def open_fully(path: Path, how: str) -> str:
    """Read all that a case has, by the lowest reader that knows it and by the one that users call; says what it was."""
    from pareto_merging.checkpoints import archives, modules, pickles, readers
    from pareto_merging.errors import UserError
    from pareto_merging.system import files

    if how == "machine":
        with path.open("rb") as stream:
            return type(pickles.read_pickle(stream, str(path))).__name__
    if path.is_dir():
        checkpoint = readers.open_checkpoint(path)
        return _sizes(checkpoint[name] for name in checkpoint)
    refused: UserError | None = None
    try:
        if path.suffix == ".safetensors":
            file = files.SafetensorsFile(path)
            said = _sizes(map(file.read, file.shapes))
        else:
            archive = archives.open_archive(path)
            said = _sizes(map(archive.tensor, modules.find_tensors(archive.root, str(path)).values()))
    except UserError as error:
        refused = error
    # none of these is a CLIP: a UserError whatever it was before
    for reader in (readers.open_checkpoint, readers.open_head):
        try:
            reader(path)
        except UserError:
            continue
        return f"{path}: opened by {reader.__name__}"
    if refused is not None:
        raise refused
    return said


def _sizes(tensors: Iterable[Any]) -> str:
    held = list(tensors)
    return f"{len(held)} tensors of {sum(tensor.nbytes for tensor in held)} bytes"


def verdict(path: Path, how: str) -> dict[str, Any]:
    """What happened: ``error`` (the text of a UserError), ``read``, or ``raised`` (anything else); and CPU seconds."""
    from pareto_merging.errors import UserError

    start = time.process_time()
    found: dict[str, Any]
    try:
        found = {"read": open_fully(path, how)}
    except UserError as error:
        found = {"error": str(error)}
    except BaseException as error:
        found = {"raised": f"{type(error).__name__}: {str(error)[:300]}"}
    # three readers read a file
    passes = 1 if how == "machine" or path.is_dir() else 3
    return {**found, "seconds": (time.process_time() - start) / passes}


def isolated(path: Path, how: str) -> dict[str, Any]:
    """As :func:`verdict`, in a fork with :data:`MEMORY` more memory than this process; it may be ``killed``."""
    sending, receiving = os.pipe()[::-1]
    child = os.fork()
    if not child:
        os.close(receiving)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        # more than a verdict allows to three readers; a fork begins at 0
        most = int(4 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
        try:
            os.write(sending, json.dumps(verdict(path, how)).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not answer:
        return {"killed": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no answer"}
    return json.loads(answer)


def main(folder: Path, pattern: str = "", part: str = "0", parts: str = "1") -> None:
    """Open the heavy cases (or those that match), every ``parts``-th from ``part`` on; a line of JSON for each."""
    warnings.simplefilter("ignore")
    import open_clip  # noqa: F401 (before the limits)

    import pareto_merging.checkpoints.readers  # noqa: F401

    chosen = [c for c in cases(folder / CANARY) if (re.search(pattern, c.name) if pattern else c.heavy)]
    for index, case in enumerate(chosen[int(part) :: int(parts)]):
        inside = folder / str(index)
        inside.mkdir()
        found = isolated(case.write(inside), case.how)
        shutil.rmtree(inside)
        print(json.dumps({"name": case.name, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
