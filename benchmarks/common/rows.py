"""A row of figures: a variant of an operation, its errors, and its time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.errors import TOLERANCE
from benchmarks.common.session import FAILED, one_line
from benchmarks.common.timing import Times, rounded

Json = Mapping[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(kw_only=True)
class Row:
    """One variant: milliseconds (median, 20th and 80th percentile), or ``reason`` for there being none.

    ``error`` is that of its outputs, ``plain_error`` that of plain PyTorch in the same type; only what ``matched`` has
    a time. Suites add what else they say of a variant.
    """

    op: str = ""
    layer: str
    dtype: str
    variant: str
    error: float = 0.0
    plain_error: float = 0.0
    matched: bool = True
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    reason: str | None = None

    def judge(self, error: float, plain_error: float, wrong: str | None = None) -> bool:
        """Note both errors, and whether ours is within what plain PyTorch's allows. ``wrong``: the reason if not."""
        self.error, self.plain_error = rounded(error), rounded(plain_error)
        self.matched = error <= TOLERANCE * plain_error + 1e-6
        self.reason = None if self.matched else wrong
        return self.matched

    def fail(self, error: Exception) -> None:
        """Note why there are no figures. Running out of memory is a result, any other error is wrong."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            self.reason = "out of memory"
        else:
            self.matched, self.error, self.reason = False, FAILED, one_line(error)

    def note(self, figures: Json) -> None:
        """Set fields by their names."""
        for name, value in figures.items():
            setattr(self, name, value)

    def note_times(self, times: Times) -> None:
        """Set the times, in four digits. A row that says so notes whether they are of a CUDA graph."""
        self.note({name: rounded(getattr(times, name)) for name in ("ms", "p20", "p80")})
        if hasattr(self, "graph"):
            self.graph = times.graph


@dataclass(kw_only=True)
class LayerRow(Row):
    """One variant of one operation of one layer.

    ``bytes``: what cannot but be moved. ``bound_ms``: of the operation's bytes and operations at this run's ceilings.
    ``graph``: replayed from a CUDA graph. ``chosen``: the strategy that ``auto`` stands for.
    """

    rows: int
    tasks: int = 8
    bytes: float | None = None
    bound_ms: float | None = None
    graph: bool = False
    chosen: str | None = None


def why_not(row: Json) -> str:
    """Return what stands in a table instead of a row's figures."""
    reason = row.get("reason")
    if row["matched"]:
        return str(reason or "not measured").replace("|", "\\|")
    about = f"wrong ({reason})" if reason else "wrong"
    return f"{about}: error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}".replace("|", "\\|")
