"""Zip files that lie: about sizes, names, places and checksums."""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.hostile_legacy import BENIGN, FLOATS, legacy
from support.opcodes import call, pickled, storage, tensor, value
from support.payloads import ANYTHING, TERABYTE


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
