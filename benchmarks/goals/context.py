"""What every group is given."""

from dataclasses import dataclass

import torch

from benchmarks.common.session import Session
from benchmarks.common.towers import TINY, VIT_L, Tower


@dataclass(frozen=True)
class Context:
    """Where and how: ``quick`` rehearses with tiny shapes, which measures nothing."""

    session: Session
    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        """Say whether figures mean something."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return bfloat16, or float16 where kernels are interpreted: there bfloat16 is cut off, not rounded."""
        return torch.bfloat16 if self.on_gpu else torch.float16

    @property
    def tower(self) -> Tower:
        """Return ViT-L/14, or the tiny tower of a rehearsal."""
        return TINY if self.quick else VIT_L

    @property
    def rates(self) -> dict[str, float]:
        """Return the ceilings of this run by name. ``copy`` is in bytes, products by type in operations per second.

        Raises:
            LookupError: they were not measured.
        """
        rows = [row for row in self.session.record.data["rows"] if row["unit"].startswith("ceilings/")]
        rates: dict[str, float] = {row["variant"]: row["value"] for row in rows if row.get("value")}
        if "copy" not in rates:
            raise LookupError("expected the ceilings to be measured first, got none")
        return rates
