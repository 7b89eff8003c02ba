"""safetensors files with JSON in their metadata and a checksum of every tensor. Nothing here unpickles."""

import contextlib
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pareto_merging.errors import UserError
from pareto_merging.system.files import atomic_path, file_stamp, parse_json

_MAX_HEADER, _MAX_TENSORS = 2**24, 2**17
CHECKSUMS = "checksums"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": torch.bool}


class SafetensorsFile:
    """A safetensors file, read tensor by tensor. Each comes in memory of its own, and nothing is mapped.

    Attributes:
        path: the file; files: it alone. metadata: its text. shapes, dtypes: by the tensors' names.
    """

    def __init__(self, path: Path) -> None:
        """Read the header. Raises UserError: missing, broken, a name twice, or a type of number that is not ours."""
        self.path, self.files = path, [path]
        # the library checks the header: types, offsets without gaps, the length of the file
        with _opened(path, any_name=True) as file, path.open("rb") as raw:
            self.metadata = dict(file.metadata() or {})
            size = int.from_bytes(raw.read(8), "little")
            header = parse_json(raw.read(size), str(path))
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise UserError(f"{path}: expected at most {_MAX_TENSORS} tensors, got {len(header)}")
        large = [name for name, entry in header.items() if any(size >= 2**50 for size in entry["shape"])]
        if large:
            raise UserError(f"{path}: expected tensors that memory could hold, got {large[0][:80]!r} larger")
        others = [f"{name[:80]!r} {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in _DTYPES]
        if others:
            raise UserError(f"{path}: expected {', '.join(_DTYPES)} tensors, got {', '.join(others[:5])}")
        self.dtypes = {name: _DTYPES[entry["dtype"]] for name, entry in header.items()}
        self.shapes: dict[str, list[int]] = {name: list(entry["shape"]) for name, entry in header.items()}
        self._starts = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
        self._checksums = read_checksums(path, self.metadata, self.shapes)
        self._stamp = file_stamp(path)

    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises UserError if the file has changed, or its checksum does not fit."""
        if file_stamp(self.path) != self._stamp:
            raise UserError(f"{self.path}: expected the file as it was when it was opened, got a changed one")
        dtype, shape = self.dtypes[name], self.shapes[name]
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        array: Any = raw.numpy()
        view, position = memoryview(array), 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[name])
            while position < len(view):
                count = file.readinto(view[position:])
                if not count:
                    raise UserError(f"{self.path}: expected {len(view)} bytes of {name}, got the end of the file")
                position += count
        if name in self._checksums and zlib.crc32(array) != self._checksums[name]:
            raise UserError(f"{self.path}: expected {name} as it was written, got another checksum (damaged)")
        return raw.view(dtype).reshape(shape)


def read_checksums(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> dict[str, int]:
    """Return the checksums that our own files keep of their tensors; others' have none. UserError: damaged."""
    text = metadata.get(CHECKSUMS)
    if text is None:
        if "source_format" in metadata:
            raise UserError(f"{path}: expected the checksums of a converted file, got none (damaged)")
        return {}
    sums = parse_json(text.encode(), f"{path}: {CHECKSUMS}")
    if sums.pop("", None) != _header_checksum(metadata):
        raise UserError(f"{path}: expected the header as it was written, got another checksum (damaged)")
    if sums.keys() != set(names) or not all(type(value) is int for value in sums.values()):
        raise UserError(f"{path}: expected a checksum for every tensor, got others (damaged)")
    return sums


def _header_checksum(metadata: Mapping[str, str]) -> int:
    rest = sorted((key, value) for key, value in metadata.items() if key != CHECKSUMS)
    return zlib.crc32(json.dumps(rest, ensure_ascii=True).encode())


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, as ``checksums`` in a file's metadata has it."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(array)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file. Raises UserError as :func:`read_tensors`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Return name -> (shape, dtype such as F16) from the header alone. Raises UserError as :func:`read_tensors`."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. UserError: missing, broken or another format; no pickle is opened."""
    with _opened(path, device) as file:
        sums = read_checksums(path, file.metadata() or {}, list(file.keys()))
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            tensors[name] = file.get_tensor(name)
            if name in sums and checksum(tensors[name]) != sums[name]:
                raise UserError(f"{path}: expected {name} as it was written, got another checksum (damaged)")
        return tensors


@contextlib.contextmanager
def _opened(path: Path, device: str | torch.device = "cpu", *, any_name: bool = False) -> Iterator[Any]:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: expected a safetensors file, got {what}")
    if not any_name and path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        got = f"{path.suffix} (a pickle, which could run code, is not opened)"
        raise UserError(f"{path}: expected safetensors, got {got}")
    try:
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        # parsed by the library and by us, at ten times its length of memory
        if _MAX_HEADER < size < path.stat().st_size:
            raise UserError(f"{path}: expected a header of at most {_MAX_HEADER} bytes, got {size}")
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        what = str(error)[:200]
        if any(part in what for part in ("not fully covered", "InvalidHeaderLength", "header too small", "too large")):
            what += " (a download that was cut off?)"
        raise UserError(f"{path}: expected a safetensors file, got {what}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. Every value of ``metadata`` that is no text is stored as JSON.

    A checksum of each tensor and of the rest of the header goes with it, and is compared when it is read.
    """
    stored = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
    # a file's name need not be text
    header = {k: v.encode("utf-8", "replace").decode() for k, v in header.items()}
    # of each tensor, and under the name "" of the other metadata
    sums = {"": _header_checksum(header), **{name: checksum(stored[name]) for name in sorted(stored)}}
    header[CHECKSUMS] = json.dumps(sums)
    with atomic_path(path) as temporary:
        try:
            save_file(stored, temporary, metadata=header)
        except SafetensorError as error:
            # a full disk, in the library's words
            raise OSError(f"{path}: could not be written: {error}") from error
        _sort_metadata(temporary)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy those of some contiguous tensors that share memory with another. safetensors refuses them."""
    end = 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        start = tensors[name].data_ptr()
        if start < end:
            tensors[name] = tensors[name].clone()
        end = max(end, start + tensors[name].nbytes)
    return tensors


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, so that the same content has the same bytes. safetensors writes it in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # the format allows spaces behind the header; the offsets must not move
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
