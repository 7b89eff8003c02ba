"""Named tensors, read when asked for: a protocol, a mapping, and those of several files."""

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pareto_merging.checkpoints.names import listed
from pareto_merging.errors import UserError
from pareto_merging.system.files import read_json

_SHARD = re.compile(r"[\w-][\w.-]{0,180}\.(safetensors|bin|pt)", re.ASCII)


class Tensors(Protocol):
    """Named tensors: shapes and dtypes, known without reading, and a way to read one."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def read(self, name: str) -> Tensor: ...


class NamedTensors(Tensors, Protocol):
    """Named tensors of one or more files."""

    @property
    def files(self) -> Sequence[Path]: ...


class TensorMapping(Mapping[str, Tensor]):
    """A mapping that reads each tensor when it is asked for, and keeps none.

    ``name in mapping`` of ``collections.abc.Mapping`` would read the tensor to see whether there is one.
    """

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, torch.dtype]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises KeyError: no such name."""

    @property
    def names(self) -> Collection[str]:
        """Return the names, known without reading."""
        return self.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


class Shards:
    """The tensors of several files, each name in one of them, as an index says."""

    def __init__(self, index: Path, open_file: Callable[[Path], NamedTensors]) -> None:
        """Open every file that the index names. Raises UserError: they hold other tensors than it says."""
        weight_map = _weight_map(index)
        shards = sorted(set(weight_map.values()))
        self._owner: dict[str, NamedTensors] = {}
        self.files = [index, *(index.parent / shard for shard in shards)]
        for shard, path in zip(shards, self.files[1:], strict=True):
            part = open_file(path)
            own = {name for name, where in weight_map.items() if where == shard}
            if own != set(part.shapes):
                others = listed(own.symmetric_difference(part.shapes))
                raise UserError(f"{path}: expected the tensors that {index.name} lists, got others: {others}")
            self._owner |= dict.fromkeys(own, part)
        self.shapes = {name: part.shapes[name] for name, part in self._owner.items()}
        self.dtypes = {name: part.dtypes[name] for name, part in self._owner.items()}

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a weight_map from tensors to files, got {type(weight_map).__name__}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise UserError(f"{index}: expected files beside the index, got {str(shard)[:80]!r} for {name[:80]!r}")
    return weight_map


def shard_names(index: Path) -> list[str]:
    """Return the files that an index names, in its folder. Raises UserError: broken, or a path out of the folder."""
    return sorted(set(_weight_map(index).values()))
