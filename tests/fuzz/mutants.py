"""Damage to a valid file: blind, or such that the format's outer layers stay right."""

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fuzz.readers import READERS
from fuzz.samples import Files, Sample, sample, valid_files

# if it were called it would make this file in the working directory, which is the mutant's folder
CANARY = "canary"
PAYLOAD_GLOBALS = (
    "os system",
    "posix system",
    "subprocess getoutput",
    "builtins exec",
    "torch.hub load_state_dict_from_url",
)


@dataclass(frozen=True)
class Mutant:
    """A damaged checkpoint.

    Attributes:
        kind: what was done. span: [first, last) of the bytes that changed, where the length is the same. forbidden: a
            global that must be named in an error.
    """

    files: Files
    kind: str
    file: str
    span: tuple[int, int] | None = None
    forbidden: str | None = None


_INTERESTING = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_STRUCTURED = 0.45


def mutate(reader: str, seed: int, index: int) -> Mutant:
    """The mutant of this index: the same for the same seed, whatever came before it."""
    rng = random.Random(f"{reader}:{seed}:{index}")
    original = sample(reader)
    name = rng.choice(sorted(original.files))
    data = original.files[name]
    if rng.random() < _STRUCTURED:
        changed, kind, forbidden = _structured(original, name, data, rng)
        span = None
    else:
        changed, kind, span = _blind(data, rng, reader)
        forbidden = None
        for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
            changed, _, _ = _blind(changed, rng, reader)
            kind, span = f"{kind}+" if not kind.endswith("+") else kind, None
    return Mutant({**original.files, name: changed}, kind, name, span, forbidden)


def _blind(data: bytes, rng: random.Random, reader: str) -> tuple[bytes, str, tuple[int, int] | None]:
    """Damage that knows nothing of the format: (content, kind, what changed if the length is the same)."""
    if not data:
        return bytes([rng.randrange(256)]), "insert", None
    at = rng.randrange(len(data))
    # headers, directories and the pickle are where the numbers lie
    if rng.random() < 0.3:
        at = rng.randrange(min(len(data), 300))
    elif rng.random() < 0.2:
        at = len(data) - 1 - rng.randrange(min(len(data), 600))
    length = min(rng.choice((1, 2, 4, 8, 30, 200)), len(data) - at)
    kind = rng.choice(
        ("flip", "flip", "flip", "set", "set", "delete", "insert", "double", "truncate", "swap", "number", "splice")
    )
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], kind, (at, at + 1)
    if kind == "set":
        return data[:at] + bytes([rng.choice((0, 255, rng.randrange(256)))]) + data[at + 1 :], kind, (at, at + 1)
    if kind == "delete":
        return data[:at] + data[at + length :], kind, None
    if kind == "insert":
        return data[:at] + rng.randbytes(length) + data[at:], kind, None
    if kind == "double":
        return data[: at + length] + data[at : at + length] * rng.choice((1, 1, 50)) + data[at + length :], kind, None
    if kind == "truncate":
        return data[:at], kind, None
    if kind == "number":
        width = rng.choice((1, 2, 4, 8))
        number = (rng.choice(_INTERESTING) % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "little", "big")))
        number = number[: len(data) - at]
        return data[:at] + number + data[at + len(number) :], kind, (at, at + len(number))
    other_at = rng.randrange(len(data))
    if kind == "swap":
        first, second = sorted((at, other_at))
        length = min(length, second - first, len(data) - second)
        middle = data[first + length : second]
        swapped = data[second : second + length] + middle + data[first : first + length]
        return data[:first] + swapped + data[second + length :], kind, (first, second + length)
    files, opened, _ = valid_files(rng.choice([name for name in READERS if name != "folder"]))
    donor = files[opened]
    start = rng.randrange(len(donor))
    taken = donor[start : start + rng.choice((4, 40, 400, 4000))]
    return data[:at] + taken + data[at + rng.choice((0, len(taken))) :], kind, None


def _structured(original: Sample, name: str, data: bytes, rng: random.Random) -> tuple[bytes, str, str | None]:
    """Damage that keeps the format's outer layers right: (content, kind, the global that must be refused)."""
    if name.endswith(".json"):
        return *_json_mutant(data, rng), None
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header, kind = _json_mutant(data[8 : 8 + size], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + size :], kind, None
    if original.container == "pickle":
        return _pickle_mutant(data, rng)
    if original.container == "legacy":
        parts = _legacy_parts(data)
        # the fourth is the object; a payload in any of them must be refused
        which = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
        changed, kind, forbidden = _pickle_mutant(parts[which], rng)
        if changed[:1] != b"\x80" and which == 0:
            # no longer a file that torch wrote: refused before it is read as a pickle
            forbidden = None
        return b"".join([*parts[:which], changed, *parts[which + 1 :]]), kind, forbidden
    records = dict(_records(data))
    pickle_name = next(key for key in records if key.endswith("/data.pkl"))
    if rng.random() < 0.8:
        records[pickle_name], kind, forbidden = _pickle_mutant(records[pickle_name], rng)
        return _zip(list(records.items())), f"zip-{kind}", forbidden
    listed = list(records.items())
    at = rng.randrange(len(listed))
    kind = rng.choice(("record-damage", "record-drop", "record-double", "record-rename", "record-swap"))
    if kind == "record-damage":
        listed[at] = (listed[at][0], _blind(listed[at][1], rng, "")[0])
    elif kind == "record-drop":
        del listed[at]
    elif kind == "record-double":
        listed.insert(rng.randrange(len(listed)), listed[at])
    elif kind == "record-rename":
        listed[at] = (rng.choice((*records, "../x", "/x", "archive/data/9", "other/data.pkl")), listed[at][1])
    else:
        other = rng.randrange(len(listed))
        (a, first), (b, second) = listed[at], listed[other]
        listed[at], listed[other] = (a, second), (b, first)
    return _zip(listed), kind, None


@cache
def _records(data: bytes) -> tuple[tuple[str, bytes], ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return tuple((info.filename, archive.read(info)) for info in archive.infolist())


def _zip(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive, stored, with the right checksums."""
    body, directory = bytearray(), bytearray()
    for name, content in records:
        encoded = name.encode()
        numbers = struct.pack(
            "<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(encoded), 0
        )
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + numbers + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + encoded
        )
        body += b"PK\3\4" + numbers + encoded + content
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(body), 0)
    return bytes(body + directory + tail)


@cache
def _opcodes(data: bytes) -> tuple[int, ...]:
    """Where the opcodes of a valid pickle begin."""
    return tuple(position for _, _, position in pickletools.genops(data) if position is not None)


@cache
def _legacy_parts(data: bytes) -> tuple[bytes, ...]:
    """The five pickles of a legacy file, and what is behind them."""
    parts, stream = [], io.BytesIO(data)
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[start : stream.tell()])
    return (*parts, data[stream.tell() :])


def _payload(rng: random.Random) -> tuple[bytes, str]:
    """Opcodes that would make the canary and leave the stack as it was; and the global that must be named."""
    dotted = rng.choice(PAYLOAD_GLOBALS)
    module, name = dotted.split()
    source = f"open({CANARY!r}, 'w')" if name == "exec" else f"touch {CANARY}"
    argument = b"X" + struct.pack("<I", len(source)) + source.encode()
    strings = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
    reached = rng.choice((f"c{module}\n{name}\n".encode(), b"".join(strings) + b"\x93"))
    if rng.random() < 0.3:
        return b"(" + argument + f"i{module}\n{name}\n".encode() + b"0", f"{module}.{name}"
    return reached + argument + b"\x85R0", f"{module}.{name}"


_SNIPPETS = (
    *(b"(", b".", b"0", b"2", b"t", b")", b"]", b"}", b"e", b"u", b"s", b"a", b"R", b"b", b"o", b"N", b"1", b"l", b"d"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"\x97", b"\x98", b"Q"),
    *(b"\x82\xc8", b"\x83\xc8\0", b"\x84\xc8\0\0\0", b"Pos.system\n", b"h\0", b"h\x05", b"q\0", b"j\xff\xff\0\0"),
    *(
        b"r\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
        b"B\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x95" + b"\xff" * 8,
    ),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"csrc.modeling\nX\n"),
    *(
        b"c_codecs\nencode\n",
        b"c__builtin__\nset\n",
        b"ctorch\nFloatStorage\n",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08" + b"\x7f" * 8,
    ),
)


def _pickle_mutant(data: bytes, rng: random.Random) -> tuple[bytes, str, str | None]:
    starts = _opcodes(data)
    ends = (*starts[1:], len(data))
    at = rng.randrange(len(starts))
    start, end = starts[at], ends[at]
    kind = rng.choice(("payload", "opcode", "opcode", "op-delete", "op-double", "op-swap", "op-argument", "op-damage"))
    if kind == "payload":
        payload, name = _payload(rng)
        return data[:start] + payload + data[start:], kind, name
    if kind == "opcode":
        return data[:start] + rng.choice(_SNIPPETS) + data[start:], kind, None
    if kind == "op-delete":
        return data[:start] + data[end:], kind, None
    if kind == "op-double":
        return data[:end] + data[start:end] * rng.choice((1, 1, 3000)) + data[end:], kind, None
    other = rng.randrange(len(starts))
    if kind == "op-swap":
        first, second = sorted((at, other))
        if first == second:
            return data[:start] + data[end:], kind, None
        a, b = data[starts[first] : ends[first]], data[starts[second] : ends[second]]
        return data[: starts[first]] + b + data[ends[first] : starts[second]] + a + data[ends[second] :], kind, None
    if kind == "op-argument":
        # another opcode of the same file in its place, or another number
        number = rng.choice(_INTERESTING)
        width = (number.bit_length() // 8) + 1
        wide = b"\x8a" + bytes([width]) + number.to_bytes(width, "little", signed=True)
        return data[:start] + rng.choice((data[starts[other] : ends[other]], wide)) + data[end:], kind, None
    changed, _, _ = _blind(data[start:end], rng, "pickle")
    return data[:start] + changed + data[end:], kind, None


_JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        7.5,
        1e300,
        10**9,
        2**31,
        2**63,
        2**64,
        10**30,
        "",
        "x",
        "F64",
        "../x",
        "/etc/passwd",
    ),
    *(
        [],
        {},
        [1],
        [[1]],
        {"a": 1},
        "\ud800",
        "a\nb",
        "n" * 2000,
        [0, 8],
        [0, 2**40],
        [-8, 8],
        [2**62, 4],
        "b.safetensors",
    ),
)


def _json_mutant(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A value of a JSON text replaced, removed, renamed or given twice."""
    root = json.loads(data)
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        value = waiting.pop()
        items: list[tuple[Any, Any]] = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    parent, key = rng.choice(places)
    kind = rng.choice(("json-value", "json-value", "json-remove", "json-rename", "json-copy", "json-twice"))
    if kind == "json-value":
        parent[key] = rng.choice(_JSON_VALUES)
    elif kind == "json-remove":
        del parent[key]
    elif kind == "json-copy":
        source, other = rng.choice(places)
        if source is not parent or (isinstance(source, dict) and other in source):
            parent[key] = json.loads(json.dumps(source[other]))
    elif kind == "json-rename" and isinstance(parent, dict):
        parent[rng.choice(("w", "", "dtype", "__metadata__", "\ud800", f"{key}x"))] = parent.pop(key)
    text = json.dumps(root)
    if kind == "json-twice" and isinstance(parent, dict):
        entry = json.dumps({key: rng.choice((parent[key], rng.choice(_JSON_VALUES)))})[1:-1]
        around = json.dumps(parent)
        text = text.replace(around, f"{{{entry}, {around[1:]}", 1)
    return text.encode(), kind
