"""Large tensors worked through in pieces, so that temporaries stay small beside any model."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# tensors are worked through in pieces of this many numbers, so that temporaries stay small beside any model
CHUNK = 1 << 18


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return float32, or float64 where one of ``dtypes`` is."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def piece_size(parts: int = 1) -> int:
    """Return how many numbers a piece has where there are ``parts`` temporaries of it."""
    return max(1, CHUNK // parts)


def flat_pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor's numbers, in their order, into pieces of at most CHUNK. They are views where it is contiguous."""
    return tensor.reshape(-1).split(CHUNK)


def pieces_of(shape: Sequence[int], parts: int = 1) -> Iterator[tuple[slice | int, ...]]:
    """Yield indices that cut a tensor of ``shape`` into views of at most CHUNK numbers.

    In the order of its numbers; views even where it is not contiguous, unlike pieces of ``reshape(-1)``; none where it
    is empty. ``parts``: of at most CHUNK // ``parts`` numbers, for work with several temporaries.
    """
    if not math.prod(shape):
        return
    size = piece_size(parts)
    # whole rows along the first dimension whose rows fit
    dim = next((d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= size), None)
    if dim is None:
        yield ()
        return
    rows = size // math.prod(shape[dim + 1 :])
    for place in itertools.product(*(range(size) for size in shape[:dim])):
        for start in range(0, shape[dim], rows):
            yield (*place, slice(start, start + rows))


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the greatest number. NaN if there is one, 0 and 0 if there are none."""
    # no mask of the tensor's size, as isfinite() makes, and any() on the CPU
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(tensor.detach())).tolist()
    return low, high
