"""Files: atomic writes, and safetensors with JSON in its metadata. Nothing here unpickles."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pareto_merging.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that takes its place when the block ends without an exception.

    A crash, a full disk or a kill leaves the old file or none, and at worst a file that ends in ``.tmp``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that nobody else can read
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON atomically; a NaN is an error rather than invalid JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically; every value of ``metadata`` that is no string is stored as JSON."""
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=header)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the metadata in a random order; sorted, the same content has the same bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # the format allows spaces behind the header; the offsets must not move
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file. Raises UserError as :func:`read_tensors`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype such as F16) from the header alone. Raises UserError as :func:`read_tensors`."""
    with _opened(path) as file:
        return {
            name: (part.get_shape(), part.get_dtype())
            for name in file.keys()  # noqa: SIM118 (no mapping)
            for part in (file.get_slice(name),)
        }


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: the file is missing, unreadable or not safetensors; pickles (``.pt``, ``.bin``) are never opened.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: expected a safetensors file, got {what}")
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise UserError(
            f"{path}: expected safetensors, got {path.suffix} (a pickle, which could run code, is not opened)"
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a safetensors file, got {error}") from error
