"""What every group is given, and rows of one operation that is timed beside its bound."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.session import Session
from benchmarks.layers import captured, rounded

# milliseconds of repetitions of one variant
WARMUP, REPETITIONS = 5, 40


@dataclass(frozen=True)
class Context:
    """Where and how: ``quick`` rehearses with tiny shapes, which measures nothing."""

    session: Session
    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean something."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The goals' bfloat16; where kernels are interpreted, which cuts bfloat16 off instead of rounding, float16."""
        return torch.bfloat16 if self.on_gpu else torch.float16

    @property
    def rates(self) -> dict[str, float]:
        """The ceilings of this run by name: ``copy`` in bytes, products by type in operations per second.

        Raises:
            LookupError: they were not measured.
        """
        rows = [row for row in self.session.record.data["rows"] if row["unit"].startswith("ceilings/")]
        found: dict[str, float] = {row["variant"]: row["value"] for row in rows if row.get("value")}
        if "copy" not in found:
            raise LookupError("expected the ceilings to be measured first, got none")
        return found


@dataclass
class Row:
    """One variant of one operation on one layer: milliseconds (median, 20th and 80th percentile), cold L2 cache.

    ``bytes``: what cannot but be moved. ``bound_ms``: of the operation's bytes and operations at this run's ceilings.
    ``graph``: replayed from a CUDA graph.
    """

    layer: str
    variant: str
    rows: int
    dtype: str
    error: float
    plain_error: float
    matched: bool
    tasks: int = 8
    bytes: float | None = None
    bound_ms: float | None = None
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    graph: bool = False
    reason: str | None = None


def suite(name: str) -> Any:
    """Import ``benchmarks.NAME`` when it is needed: a machine may lack what it needs, which is then a unit's reason."""
    return importlib.import_module(f"benchmarks.{name}")


def fill_times(row: Row, variant: Callable[[], Sequence[Tensor]], device: torch.device) -> Row:
    """Time a variant that was right; off the GPU one call, which measures nothing."""
    if not row.matched:
        return row
    if device.type != "cuda":
        from benchmarks.kernels import timed

        row.ms, row.p20, row.p80 = map(rounded, timed(variant, device))
        return row
    from triton.testing import do_bench

    graph = captured(variant)
    row.graph = graph is not None
    function = variant if graph is None else graph.replay
    times = do_bench(function, warmup=WARMUP, rep=REPETITIONS, quantiles=[0.5, 0.2, 0.8])
    row.ms, row.p20, row.p80 = map(rounded, times)
    return row


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def as_training_rates(rates: Mapping[str, float]) -> dict[str, Any]:
    """The ceilings as :func:`benchmarks.training.bound_ms` takes them."""
    return {name: rates[name] for name in ("copy", "bfloat16", "float32")}
