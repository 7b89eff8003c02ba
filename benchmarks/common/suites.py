"""What the suites of ``python -m benchmarks.run`` agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

# takes a suite's report as far as it is there; called after every row or point
Save: TypeAlias = Callable[[dict[str, Any]], None]


def nowhere(report: dict[str, Any]) -> None:
    """Save nothing."""
