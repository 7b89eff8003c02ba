"""Pickles are read as data by a machine that only follows the opcodes. It never imports, calls or builds anything of
the file's.

What comes out are dictionaries with strings as keys, lists, tuples, numbers and text; a :class:`Global` for each class
or function that is named; a :class:`Record` for each object; and a :class:`StoredTensor` for each tensor, which says
where its bytes lie. Python's own ``pickle`` is not used: even a restricted one hashes keys, fills registries and trusts
lengths before it has seen the bytes.
"""

import copyreg
import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from pareto_merging.checkpoints import records
from pareto_merging.checkpoints.records import Broken, ForbiddenGlobal, Global, Record, Storage, StoredTensor
from pareto_merging.errors import UserError

# far beyond any checkpoint's: a ViT-L/14 with its optimiser stays below 1 MB and 100,000 opcodes
MAX_BYTES, MAX_OPCODES, MAX_LINE = 2**26, 300_000, 2**16
# entries (and 64 characters each of text) copied from what the memo holds, where one byte can mean millions of them
MAX_COPIED = 2**19
_MARK = object()


def read_pickle(stream: BinaryIO, source: str, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle as data. The stream is left behind it.

    Args:
        stream: positioned at the pickle. source: what to call it in errors. storages: filled with every storage that
            the pickle names, by key.

    Raises:
        ForbiddenGlobal: it names something that could run code, or calls what is no class; the text names it.
        UserError: it is broken, longer than any checkpoint's, or uses what no checkpoint needs.
    """
    machine = _Machine(stream, source, {} if storages is None else storages)
    try:
        for _ in range(MAX_OPCODES):
            code = machine.take(1)[0]
            if code == 0x2E:
                return machine.pop()
            if code not in _OPERATIONS:
                raise Broken(f"no pickle opcode 0x{code:02x}")
            _OPERATIONS[code](machine)
        raise Broken(f"more than {MAX_OPCODES} opcodes")
    except Broken as error:
        raise UserError(f"{source}: expected a checkpoint's pickle, got {error}") from None
    except UserError:
        raise
    except (ValueError, struct.error, OverflowError) as error:
        # a number or a text that cannot be decoded
        what = " ".join(str(error).split())[:120]
        raise UserError(f"{source}: expected a checkpoint's pickle, got broken data ({what})") from None


class _Machine:
    """The stack machine of the pickle protocol (0 to 5), over inert values."""

    def __init__(self, stream: BinaryIO, source: str, storages: dict[str, Storage]) -> None:
        self.stream, self.source, self.storages = stream, source, storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.used = self.copied = 0

    def take(self, count: int) -> bytes:
        self.used += count
        if count > MAX_BYTES or self.used > MAX_BYTES:
            raise Broken(f"more than {MAX_BYTES} bytes of it")
        data = self.stream.read(count)
        if len(data) != count:
            raise Broken("an end in the middle")
        return data

    def charge(self, *values: Any) -> None:
        """Count what is about to be copied."""
        self.copied += sum(len(value) for value in values if isinstance(value, dict | list | tuple))
        self.copied += sum(len(value) // 64 for value in values if isinstance(value, str | bytes))
        if self.copied > MAX_COPIED:
            raise Broken(f"more than {MAX_COPIED} copies of what it holds once")

    def line(self, encoding: str = "utf-8") -> str:
        data = self.stream.readline(MAX_LINE)
        self.used += len(data)
        if not data.endswith(b"\n"):
            raise Broken("a line without an end")
        return data[:-1].decode(encoding)

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if value < 0:
            raise Broken("a negative length")
        return value

    def text_line(self) -> str:
        text = self.line().strip()
        if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0] or "\\" in text:
            raise Broken("a text without quotes, or with escapes")
        return text[1:-1]

    def int_line(self) -> int | bool:
        text = self.line()
        return text == "01" if text in ("00", "01") else int(text.removesuffix("L"))

    def data(self, form: str) -> bytes:
        return self.take(self.number(form))

    def text(self, form: str, encoding: str = "utf-8") -> str:
        return self.data(form).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Broken("an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pops(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def since_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise Broken("a missing mark")

    def put(self, index: int) -> None:
        if index >= 2**32:
            raise Broken("a memo of that size")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Broken("a memo that was not written")
        self.push(self.memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if len(pairs) % 2:
            raise Broken("a key without a value")
        if isinstance(target, Record):
            target.items += zip(pairs[::2], pairs[1::2], strict=True)
        elif isinstance(target, dict):
            records.set_items(target, pairs)
        else:
            raise Broken("items for what is no dictionary")

    def dictionary(self) -> None:
        values = self.since_mark()
        self.push({})
        self.set_items(values)

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Record):
            target.items += values
        elif isinstance(target, list):
            target += values
        else:
            raise Broken("items for what is no list")

    def global_(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Broken("the name of a class that is no text")
        # cut to a length that can be shown
        named = Global(module[: records.MAX_NAME + 1], name[: records.MAX_NAME + 1])
        is_named = records.is_name(module) and records.is_name(name)
        if not is_named or not (named in records.CALLS or records.is_allowed(named)):
            raise self.forbidden(named, "names")
        return named

    def forbidden(self, named: Global, what: str) -> ForbiddenGlobal:
        shown = str(named) if records.is_name(str(named)) else repr(str(named)[:120])
        if named.module in records.NAMES_TODAY and records.is_name(str(named)):
            # protocols up to 2 write Python 2's names, and os is spelled by the system's own module
            shown += f" ({records.NAMES_TODAY[named.module]}.{named.name})"
        return ForbiddenGlobal(f"{self.source}: refused: its pickle {what} {shown}, which could run code; nothing ran")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            raise Broken("a call of what is no class")
        if not isinstance(arguments, tuple):
            raise Broken(f"a call of {str(function)[:120]} without a tuple of arguments")
        if function in records.CALLS:
            self.charge(arguments, *arguments)
            return records.CALLS[function](arguments)
        if not (function.is_class or function.is_script or function in records.INERT):
            raise self.forbidden(function, "calls")
        return Record(function, arguments)

    def object(self) -> Any:
        values = self.since_mark()
        if not values:
            raise Broken("an object without a class")
        return self.call(values[0], tuple(values[1:]))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            # (attributes, slots) of an object with both
            for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
                if isinstance(part, dict):
                    self.charge(part)
                    twice = target.state.keys() & part.keys()
                    if twice:
                        raise Broken(f"the attribute {min(twice)[:80]!r} twice")
                    target.state.update(part)
        elif not isinstance(target, dict | StoredTensor):
            raise Broken("attributes for what is no object")

    def persistent(self, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
            _, kind, key, _, size = identity[:5]
            if not isinstance(kind, Global) or not records.is_storage(kind):
                raise Broken(f"a storage of type {kind if isinstance(kind, Global) else type(kind).__name__}")
            if kind.name not in records.STORAGES:
                return Record(kind)
            if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,20}", key, re.ASCII):
                raise Broken(f"a storage with the key {key[:80] if isinstance(key, str) else type(key).__name__!r}")
            if not records.is_size(size):
                raise Broken("a storage of no size")
            if len(identity) == 6 and identity[5] is not None:
                raise Broken("a view of a storage (torch before 0.4)")
            storage = Storage(key, records.STORAGES[kind.name], size)
            if self.storages.setdefault(key, storage) != storage:
                raise Broken(f"two sizes or types for storage {key}")
            return storage
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            # the legacy format keeps a module's source beside its class
            cls = identity[1]
            if not isinstance(cls, Global):
                raise Broken("a module without a class")
            return cls
        shown = identity[:80] if isinstance(identity, str) else type(identity).__name__
        raise Broken(f"an unknown persistent id ({shown!r})")

    def extension(self, form: str) -> None:
        code = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        # only to name it: the registry of this process says what the code would have meant here
        known = getattr(copyreg, "_inverted_registry", {}).get(code)
        raise self.forbidden(Global(*known) if known else Global("copyreg", f"extension_{code}"), "names")


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.take(1),  # type: ignore[dict-item]  # PROTO
    0x95: lambda m: m.take(8),  # type: ignore[dict-item]  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.stack.pop() if m.stack and m.stack[-1] is _MARK else m.pop(),
    ord("1"): lambda m: m.since_mark(),  # type: ignore[dict-item]
    ord("2"): lambda m: m.push(m.top()),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("I"): lambda m: m.push(m.int_line()),
    ord("L"): lambda m: m.push(m.int_line()),
    ord("J"): lambda m: m.push(struct.unpack("<i", m.take(4))[0]),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(int.from_bytes(m.data("<B"), "little", signed=True)),
    0x8B: lambda m: m.push(int.from_bytes(m.data("<i"), "little", signed=True)),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("S"): lambda m: m.push(m.text_line()),
    ord("T"): lambda m: m.push(m.text("<i", "latin-1")),
    ord("U"): lambda m: m.push(m.text("<B", "latin-1")),
    ord("V"): lambda m: m.push(m.line("raw-unicode-escape")),
    ord("X"): lambda m: m.push(m.text("<I")),
    0x8C: lambda m: m.push(m.text("<B")),
    0x8D: lambda m: m.push(m.text("<Q")),
    ord("B"): lambda m: m.push(m.data("<I")),
    ord("C"): lambda m: m.push(m.data("<B")),
    0x8E: lambda m: m.push(m.data("<Q")),
    0x96: lambda m: m.push(m.data("<Q")),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("a"): lambda m: m.append(m.pops(1)),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.push(tuple(m.pops(1))),
    0x86: lambda m: m.push(tuple(m.pops(2))),
    0x87: lambda m: m.push(tuple(m.pops(3))),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: m.dictionary(),
    ord("s"): lambda m: m.set_items(m.pops(2)),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x8F: lambda m: m.push(Record(Global("builtins", "set"))),
    0x90: lambda m: m.append(m.since_mark()),
    0x91: lambda m: m.push(Record(Global("builtins", "frozenset"), items=m.since_mark())),
    ord("p"): lambda m: m.put(int(m.line())),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("g"): lambda m: m.get(int(m.line())),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("c"): lambda m: m.push(m.global_(m.line(), m.line())),
    0x93: lambda m: m.push(m.global_(*m.pops(2))),
    ord("R"): lambda m: m.push(m.call(*m.pops(2))),
    ord("b"): lambda m: m.build(),
    ord("i"): lambda m: m.push(m.call(m.global_(m.line(), m.line()), tuple(m.since_mark()))),
    ord("o"): lambda m: m.push(m.object()),
    0x81: lambda m: m.push(m.call(*m.pops(2))),
    # the third is a mapping of arguments by name, which nothing here looks at
    0x92: lambda m: m.push(m.call(*m.pops(3)[:2])),
    ord("P"): lambda m: m.push(m.persistent(m.line())),
    ord("Q"): lambda m: m.push(m.persistent(m.pop())),
    0x82: lambda m: m.extension("<B"),
    0x83: lambda m: m.extension("<H"),
    0x84: lambda m: m.extension("<i"),
}
