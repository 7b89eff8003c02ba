"""Every hostile checkpoint: tricks to run code, to take memory or time, or to read what is not in the file.

A payload that would run makes a file named ``canary`` beside the checkpoint, so that a test needs no patches to see it;
:data:`support.forbidden.RUNS` names those that really do so under ``pickle.loads``, which a test proves.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from support.hostile_folders import folders, metadata_files
from support.hostile_legacy import legacy, legacy_files
from support.hostile_pickles import pickles
from support.hostile_safetensors import safetensors_files
from support.hostile_tensors import tensors
from support.hostile_zip import torch_zip, zip_files
from support.payloads import ANYTHING, Case


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
