"""Where the rows of a tensor [*, F] lie, whatever its strides. No copy, up to two leading dimensions that stay two."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Return each row's offset in int64: item m % inner of block m // inner."""
    return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner


class Rows(NamedTuple):
    """A tensor [*, F] as M rows: m starts at (m // inner)·stride_outer + (m % inner)·stride_inner elements."""

    tensor: Tensor | None
    M: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_feature: int

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """Return what a kernel takes of the layout: inner, stride_outer, stride_inner, stride_feature."""
        return self.inner, self.stride_outer, self.stride_inner, self.stride_feature


# where a kernel is given none
NO_ROWS = Rows(None, 0, 1, 0, 0, 0)


def as_rows(x: Tensor) -> Rows:
    """Return ``x`` [*, F] as rows. It is copied where two strides cannot say where they are."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return as_rows(x.contiguous())
    count, feature = math.prod(x.shape[:-1]), x.stride(-1)
    if len(merged) == 2:
        return Rows(x, count, merged[1][0], merged[0][1], merged[1][1], feature)
    return Rows(x, count, 1, merged[0][1] if merged else 0, 0, feature)


def as_matrix(first: Tensor, *others: Tensor) -> tuple[Tensor, ...] | None:
    """Return tensors of one shape as matrices [n, d] without a copy; None if impossible.

    Each of ``others`` may have one more dimension in front (task vectors), which stays.
    """
    tensors = (first, *others)
    merged: list[tuple[int, list[int]]] = []
    for i in sorted(range(first.ndim), key=lambda i: -first.stride()[i]):
        size, here = first.shape[i], [t.stride(t.ndim - first.ndim + i) for t in tensors]
        if size == 1:
            continue
        if merged and all(before == stride * size for before, stride in zip(merged[-1][1], here, strict=True)):
            merged[-1] = (merged[-1][0] * size, here)
        else:
            merged.append((size, here))
    if len(merged) > 2:
        return None
    merged = [(1, [0] * len(tensors))] * (2 - len(merged)) + merged
    views = []
    for index, tensor in enumerate(tensors):
        extra = tensor.ndim - first.ndim
        sizes = [*tensor.shape[:extra], *(length for length, _ in merged)]
        places = [*tensor.stride()[:extra], *(s[index] for _, s in merged)]
        views.append(tensor.as_strided(sizes, places))
    return tuple(views)
