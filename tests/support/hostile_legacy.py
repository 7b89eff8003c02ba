"""Files of torch.save before zip, with something hostile in each part."""

import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

from support.opcodes import (
    BINPERSID,
    EMPTY_TUPLE,
    NONE,
    REDUCE,
    TUPLE1,
    call,
    named,
    number,
    pickled,
    storage,
    tensor,
    value,
)
from support.payloads import ANYTHING, CANARY_MODULE, TERABYTE

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
