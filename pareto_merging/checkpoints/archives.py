"""Files that ``torch.save`` and TorchScript write, read as data, tensor by tensor.

Three containers: a zip archive (torch since 1.6), a TorchScript archive (a zip as well, whose code is never read), and
the legacy format (pickles one after another, then the bytes of every storage). Nothing is unpacked, decompressed or
run; a zip entry's checksum is compared before its numbers are used.
"""

import contextlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pareto_merging.checkpoints.pickles import MAX_BYTES, read_pickle
from pareto_merging.checkpoints.records import Storage, StoredTensor
from pareto_merging.errors import UserError
from pareto_merging.system.files import file_stamp

_CHUNK = 2**20
_MAX_DIRECTORY, _MAX_ENTRIES = 2**24, 2**17
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a storage lie, and their CRC-32 where the container has one."""

    start: int
    size: int
    checksum: int | None


class Archive:
    """A checkpoint's pickle as data, and its tensors by request.

    Attributes:
        kind: zip, torchscript or legacy. root: what :func:`.pickles.read_pickle` made of the pickle.
    """

    def __init__(self, path: Path, kind: str, root: Any, entries: dict[str, _Entry]) -> None:
        self.path, self.kind, self.root = path, kind, root
        self._entries, self._stamp = entries, file_stamp(path)
        self._verified: set[str] = set()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Read one tensor, contiguous and in memory of its own. UserError: missing, damaged, or the file changed."""
        entry = _check_size(self.path, stored.storage, self._entries.get(stored.storage.key))
        if file_stamp(self.path) != self._stamp:
            raise UserError(f"{self.path}: expected the file as it was when it was opened, got a changed one")
        numbers = math.prod(stored.shape)
        if not numbers:
            return torch.empty(stored.shape, dtype=stored.dtype)
        # the range of the storage that the tensor reaches over
        span = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        item = stored.dtype.itemsize
        with _opened(self.path) as file:
            raw = self._bytes(file, stored.storage.key, entry, stored.offset * item, span * item)
        tensor = torch.as_strided(raw.view(stored.dtype), stored.shape, stored.stride)
        is_whole = tensor.is_contiguous() and span == numbers
        return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)

    def _bytes(self, file: BinaryIO, key: str, entry: _Entry, offset: int, size: int) -> Tensor:
        """Read ``size`` bytes at ``offset`` of an entry. Its checksum is compared in the same pass, the first time."""
        target = torch.empty(size, dtype=torch.uint8)
        array: Any = target.numpy()
        view = memoryview(array)
        check = entry.checksum is not None and key not in self._verified
        first, last = (0, entry.size) if check else (offset, offset + size)
        file.seek(entry.start + first)
        checksum, position = 0, first
        while position < last:
            chunk = file.read(min(_CHUNK, last - position))
            if not chunk:
                raise UserError(f"{self.path}: expected {entry.size} bytes in storage {key}, got the end of the file")
            if check:
                checksum = zlib.crc32(chunk, checksum)
            low, high = max(position, offset), min(position + len(chunk), offset + size)
            if low < high:
                view[low - offset : high - offset] = chunk[low - position : high - position]
            position += len(chunk)
        if check and checksum != entry.checksum:
            raise UserError(f"{self.path}: expected storage {key} as it was written, got another checksum (damaged)")
        self._verified.add(key)
        return target


def open_archive(path: Path) -> Archive:
    """Open what ``torch.save`` or TorchScript wrote, reading its directory and its pickle only.

    Raises:
        UserError: no such file, or broken, truncated, compressed, encrypted, big-endian or ambiguous in any way.
        ForbiddenGlobal: its pickle names what could run code; the error names it.
    """
    with _opened(path) as file:
        start = file.read(4)
        if not start:
            raise UserError(f"{path}: expected a checkpoint, got an empty file")
        if start != b"PK\x03\x04" and start[:1] != b"\x80":
            raise UserError(f"{path}: expected a checkpoint that torch or safetensors wrote, got another file")
        file.seek(0)
        return _open_zip(path, file) if start == b"PK\x03\x04" else _open_legacy(path, file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.is_dir():
            raise UserError(f"{path}: expected a checkpoint, got a folder")
        if path.exists() and not path.is_file():
            # reading a pipe would wait for ever
            raise UserError(f"{path}: expected a checkpoint, got what is no regular file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: expected a checkpoint, got {error.strerror or error}") from error


def _check_size(path: Path, storage: Storage, entry: _Entry | None) -> _Entry:
    expected = storage.size * storage.dtype.itemsize
    if entry is None or entry.size != expected:
        got = "none" if entry is None else entry.size
        raise UserError(f"{path}: expected {expected} bytes in storage {storage.key}, got {got}")
    return entry


def _open_zip(path: Path, file: BinaryIO) -> Archive:
    size = path.stat().st_size
    _check_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OverflowError, EOFError) as error:
        raise UserError(f"{path}: expected a whole zip archive, got {' '.join(str(error).split())}") from None
    names = _check_names(path, infos)
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if not roots and any(name.endswith(".npy") for name in names):
        raise UserError(f"{path}: expected a checkpoint, got a numpy archive")
    if not roots and any(name.endswith((".safetensors", ".pt", ".bin", ".json")) for name in names):
        raise UserError(f"{path}: expected a checkpoint, got an archive of files (unpack it first)")
    if len(roots) != 1:
        raise UserError(f"{path}: expected a checkpoint (one NAME/data.pkl in the archive), got {len(roots)}")
    root, last = roots[0], 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < last or info.header_offset + 30 + info.compress_size > size:
            name = info.filename[:80]
            raise UserError(f"{path}: expected files side by side in the archive, got {name!r} over another")
        last = info.header_offset + 30 + info.compress_size

    def entry(name: str) -> _Entry:
        return _zip_entry(path, file, names[name])

    order = f"{root}byteorder"
    if order in names and _small(path, file, entry(order), order) != b"little":
        raise UserError(f"{path}: expected little-endian numbers, got a big-endian archive")
    stream = io.BytesIO(_small(path, file, entry(f"{root}data.pkl"), "data.pkl", MAX_BYTES))
    storages: dict[str, Storage] = {}
    value = read_pickle(stream, str(path), storages)
    if stream.read(1):
        raise UserError(f"{path}: expected one pickle in data.pkl, got more behind it")
    prefix = f"{root}data/"
    keys = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.endswith("/")]
    entries = {key: entry(f"{prefix}{key}") for key in keys}
    for key, storage in storages.items():
        # before there is memory for any of them
        _check_size(path, storage, entries.get(key))
    return Archive(path, "torchscript" if f"{root}constants.pkl" in names else "zip", value, entries)


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Check the length of the archive's directory before zipfile reads it whole."""
    # as zipfile finds it: the end record, and the zip64 record that a locator before it stands for
    file.seek(max(0, size - 2**16 - 200))
    tail = file.read(2**16 + 200)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise UserError(f"{path}: expected a whole zip archive, got one without a directory (truncated)")
    count, length = struct.unpack("<HL", tail[end + 10 : end + 16])
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        count, length = struct.unpack("<QQ", tail[end - 44 : end - 28])
    if length > min(size, _MAX_DIRECTORY) or count > _MAX_ENTRIES:
        most = f"{_MAX_DIRECTORY} bytes and {_MAX_ENTRIES} files"
        raise UserError(f"{path}: expected a directory of at most {most}, got {length} bytes and {count} files")
    file.seek(0)


def _check_names(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > _MAX_ENTRIES:
        raise UserError(f"{path}: expected at most {_MAX_ENTRIES} files in the archive, got {len(infos)}")
    names: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        # orig_filename: zipfile cuts names at a NUL and rewrites separators
        name = info.orig_filename
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or re.match("[A-Za-z]:/", name):
            raise UserError(f"{path}: expected names inside the archive, got {name[:80]!r}")
        if name in names:
            raise UserError(f"{path}: expected each name once in the archive, got {name[:80]!r} twice")
        if info.flag_bits & 0x41:
            raise UserError(f"{path}: expected a readable archive, got {name[:80]!r} encrypted")
        names[name] = info
    return names


def _zip_entry(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> _Entry:
    name = info.filename[:80]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise UserError(f"{path}: expected {name!r} stored as it is (as torch writes it), got it compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{path}: expected a header before {name!r}, got none (damaged)")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if (
        file.read(name_length) != info.orig_filename.encode(encoding, "replace")
        or struct.unpack("<H", header[8:10])[0] != 0
    ):
        raise UserError(f"{path}: expected the header of {name!r}, got another (damaged)")
    # torch can be told to write no checksums (set_crc32_options); it writes zeros then
    return _Entry(info.header_offset + 30 + name_length + extra_length, info.file_size, info.CRC or None)


def _small(path: Path, file: BinaryIO, entry: _Entry, name: str, limit: int = 64) -> bytes:
    if entry.size > limit:
        raise UserError(f"{path}: expected at most {limit} bytes in {name}, got {entry.size}")
    file.seek(entry.start)
    data = file.read(entry.size)
    if len(data) != entry.size or (entry.checksum is not None and zlib.crc32(data) != entry.checksum):
        raise UserError(f"{path}: expected {name} as it was written, got another checksum (damaged)")
    return data


def _open_legacy(path: Path, file: BinaryIO) -> Archive:
    source = str(path)
    if read_pickle(file, source) != _LEGACY_MAGIC:
        raise UserError(f"{path}: expected a checkpoint that torch.save wrote, got another pickle")
    if read_pickle(file, source) != _LEGACY_PROTOCOL:
        raise UserError(f"{path}: expected protocol {_LEGACY_PROTOCOL} of torch.save, got another")
    system = read_pickle(file, source)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError(f"{path}: expected little-endian numbers, got a header that does not say so")
    storages: dict[str, Storage] = {}
    root = read_pickle(file, source, storages)
    keys = read_pickle(file, source)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path}: expected a list of storages, got {type(keys).__name__}")
    if len(set(keys)) != len(keys):
        raise UserError(f"{path}: expected each storage once, got one twice")
    size, position = path.stat().st_size, file.tell()
    entries = {}
    for key in keys:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            raise UserError(f"{path}: expected the bytes of storage {key[:40]}, got the end of the file")
        if key not in storages:
            raise UserError(f"{path}: expected a type for storage {key[:40]}, got none")
        length = int.from_bytes(header, "little") * storages[key].dtype.itemsize
        position += 8
        if position + length > size:
            got = f"{size - position} to the end of the file (cut off?)"
            raise UserError(f"{path}: expected {length} bytes in storage {key[:40]}, got {got}")
        entries[key] = _check_size(path, storages[key], _Entry(position, length, None))
        position += length
    if position != size:
        more = size - position
        raise UserError(f"{path}: expected the end of the file behind the last storage, got {more} bytes more")
    return Archive(path, "legacy", root, entries)
