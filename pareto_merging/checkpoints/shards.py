"""Tensors in several files, each name in one of them, as an index says."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pareto_merging.checkpoints.contents import NamedTensors
from pareto_merging.checkpoints.names import listed
from pareto_merging.errors import UserError
from pareto_merging.system.files import read_json

_SHARD = re.compile(r"[\w-][\w.-]{0,180}\.(safetensors|bin|pt)", re.ASCII)


class Shards:
    """The tensors of several files, each name in one of them, as an index says."""

    def __init__(self, index: Path, open_file: Callable[[Path], NamedTensors]) -> None:
        """Open every file that the index names. Raises UserError: they hold other tensors than it says."""
        weight_map = _weight_map(index)
        shards = sorted(set(weight_map.values()))
        self._owner: dict[str, NamedTensors] = {}
        self.files = [index, *(index.parent / shard for shard in shards)]
        for shard in shards:
            part = open_file(index.parent / shard)
            own = {name for name, where in weight_map.items() if where == shard}
            if own != set(part.shapes):
                others = listed(own.symmetric_difference(part.shapes))
                raise UserError(
                    f"{index.parent / shard}: expected the tensors that {index.name} lists, got others: {others}"
                )
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
