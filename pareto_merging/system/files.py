"""Files: atomic writes, and JSON that is checked. Nothing here unpickles."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pareto_merging.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of ``path`` when the block succeeds.

    A crash, a full disk or a kill leaves the old file or none, and at worst a file that ends in ``.tmp``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that nobody else can read
        temporary.chmod(_usual_mode(0o666))
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``target`` when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent))
    try:
        # mkdtemp makes folders that nobody else can enter
        temporary.chmod(_usual_mode(0o777))
        yield temporary
        sync(temporary)
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    # no folder is renamed onto a full one: for a moment there is none
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent))
    old = retired / "old"
    try:
        target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        retired.rmdir()
        raise
    sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _usual_mode(mode: int) -> int:
    """Return what the process's umask leaves of a mode (0o666 for files, 0o777 for folders)."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON atomically; a NaN is an error rather than invalid JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, limit: int = 2**24) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    UserError: missing, longer than ``limit`` bytes, not JSON, or another value; a key given twice is an error too.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a JSON file, got {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, got {error.strerror}") from error
    if len(data) > limit:
        raise UserError(f"{path}: expected at most {limit} bytes of JSON, got more")
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON mapping from bytes. Raises UserError as :func:`read_json`."""
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: expected JSON, got {what or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a JSON mapping, got {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} twice")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"the number {name}")


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and time of last change. They tell whether a file is the one it was. (−1, −1) if it is gone."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return -1, -1
