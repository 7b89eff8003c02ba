"""The readers that are fuzzed, by the name of their file's format."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Answer = dict[str, Tensor]


def _read_checkpoint(path: Path) -> Answer:
    from pareto_merging.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


def _read_archive(path: Path) -> Answer:
    from pareto_merging.checkpoints.archives import open_archive
    from pareto_merging.checkpoints.modules import find_tensors

    archive = open_archive(path)
    check_inert(archive.root)
    return {name: archive.tensor(stored) for name, stored in find_tensors(archive.root, str(path)).items()}


def _read_safetensors(path: Path) -> Answer:
    from pareto_merging.checkpoints.safetensors import SafetensorsFile

    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.shapes}


def _read_head(path: Path) -> Answer:
    from pareto_merging.checkpoints.heads import open_head

    weight, scale = open_head(path)
    return {"weight": weight, "scale": torch.tensor(scale)}


def _read_pickle(path: Path) -> Answer:
    from pareto_merging.checkpoints.pickles import read_pickle

    with path.open("rb") as stream:
        check_inert(read_pickle(stream, str(path)))
    return {}


READERS: dict[str, Callable[[Path], Answer]] = {
    "safetensors": _read_safetensors,
    "folder": _read_checkpoint,
    "zip": _read_archive,
    "legacy": _read_archive,
    "torchscript": _read_archive,
    "task-vectors": _read_checkpoint,
    "head": _read_head,
    "converted": _read_checkpoint,
    "pickle": _read_pickle,
}


def check_inert(root: Any) -> None:
    """Raises AssertionError unless ``root`` is made of plain data and the machine's own records, all the way down."""
    from pareto_merging.checkpoints.records import Global, Record, Storage, StoredTensor

    plain = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype)
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if type(value) in plain or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            waiting += itertools.chain(value.keys(), value.values())
        elif type(value) is Record:
            waiting += [value.type, value.arguments, value.state, value.items]
        elif type(value) in (list, tuple, Global, Storage, StoredTensor):
            waiting += value
        else:
            raise AssertionError(f"a {type(value).__module__}.{type(value).__qualname__} came out of the pickle")
