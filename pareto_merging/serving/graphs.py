"""CUDA graphs of a served model, by way to compute, batch size and item shape."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pmkernels.graphs import capture, warm_up

Result = TypeVar("Result")

# item shapes that graphs are kept for
MAX_SHAPES = 4


def can_capture(device: torch.device) -> bool:
    """Return whether there are graphs on this device."""
    return device.type == "cuda"


def batch_sizes(most: int) -> list[int]:
    """Return the batch sizes that are computed: powers of two, and ``most``."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


class Graphs:
    """The graphs of one model, and the memory they read.

    A batch is copied into that memory and padded to the next size; what the padding computes is never returned. A new
    preference costs no capture, no allocation and no wait for the GPU. They are ``enabled`` until something cannot be
    captured.
    """

    def __init__(self, equal: Tensor, dtype: torch.dtype, max_batch: int) -> None:
        """Begin without a graph. ``equal``: any preference [K] of the model, on its device."""
        self.enabled = True
        self._device, self._dtype = equal.device, dtype
        self._sizes = batch_sizes(max_batch)
        # a preference for each item, and the one that all of them share
        self._gammas, self._shared = equal.repeat(max_batch, 1), equal.clone()
        self._images: dict[tuple[int, ...], Tensor] = {}
        self._graphs: dict[tuple[str, int, tuple[int, ...]], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._merging: torch.cuda.CUDAGraph | None = None
        self._pool: Any = None
        self._captured: set[str] = set()

    def replay(
        self, mode: str, images: Tensor, gamma: Tensor, forward: Callable[[str, Tensor, Tensor], Tensor]
    ) -> Tensor | None:
        """Compute ``forward(mode, images, gamma)`` by the graph of the next larger batch, into the caller's own tensor.

        None where it cannot be captured or its item shape is one too many.
        """
        count, shape = len(images), tuple(images.shape[1:])
        size = next(size for size in self._sizes if size >= count)
        if shape not in self._images and len(self._images) == MAX_SHAPES:
            return None
        static = self._images.get(shape)
        if static is None:
            static = torch.zeros(self._sizes[-1], *shape, dtype=self._dtype, device=self._device)
        batch, read = static[:size], self._gammas[:size] if mode == "rows" else self._shared
        _copy(gamma, read[:count] if mode == "rows" else read)
        _copy(images, batch[:count])
        captured = self._graphs.get((mode, size, shape))
        if captured is None:
            captured = self._capture(mode, lambda: forward(mode, batch, read))
            if captured is None:
                return None
            self._images[shape] = static
            self._graphs[mode, size, shape] = captured
        graph, features = captured
        graph.replay()
        return features[:count].clone()

    def merge(self, gamma: Tensor, merge: Callable[[Tensor], None]) -> None:
        """Call ``merge(gamma)`` by a graph of its own: the same function each time."""
        self._shared.copy_(gamma, non_blocking=True)
        if self._merging is None:
            # the memory that is kept must not be the graph's own
            merge(self._shared)
            self._merging, _ = self._capture("merge", lambda: merge(self._shared)) or (None, None)
        if self._merging is not None:
            self._merging.replay()

    def _capture(self, kind: str, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result] | None:
        """Return graph and result; None, and end all graphs, if it cannot be captured."""
        warm_up(function, self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # what one batch size does without waiting for the GPU, the others do too
            captured = capture(function, self._device, self._pool, probe=kind not in self._captured)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            self.enabled = False
            self._graphs.clear()
            self._images.clear()
            warnings.warn(f"engine: computed without CUDA graphs, because {error}", stacklevel=6)
            return None
        self._captured.add(kind)
        return captured


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy without waiting for the GPU, unless the caller could change ``source`` meanwhile."""
    target.copy_(source, non_blocking=not source.is_pinned())
