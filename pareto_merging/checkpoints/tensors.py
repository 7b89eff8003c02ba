"""Named tensors that are read when asked for, as a protocol and a mapping."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """Named tensors: shapes and dtypes, known without reading, and a way to read one."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def read(self, name: str) -> Tensor: ...


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
