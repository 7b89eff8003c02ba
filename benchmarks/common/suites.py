"""Suites by name: where each is measured, and which modules measure it and show it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

# takes a suite's report as far as it is there; called after every row or point
Save: TypeAlias = Callable[[dict[str, Any]], None]


def nowhere(report: dict[str, Any]) -> None:
    """Save nothing."""


@dataclass(frozen=True)
class Suite:
    """A suite of measurements. Its modules are imported when needed: a machine may lack what others need.

    ``device``: where ``python -m benchmarks.run`` measures it, ``both`` as the machine has it; of a suite with a
    command of its own, where its figures are of. ``measures`` has ``run``; ``shows`` has ``markdown``,
    ``PART_markdown`` and ``draw``, which makes pictures for ``docs/PICTURES``.
    """

    name: str
    device: Literal["cpu", "gpu", "both"]
    shows: str
    measures: str | None = None
    pictures: str | None = None

    @property
    def measuring(self) -> Any:
        """Import the module that measures it."""
        assert self.measures is not None
        return importlib.import_module(f"benchmarks.{self.measures}")

    @property
    def showing(self) -> Any:
        """Import the module with its tables and pictures."""
        return importlib.import_module(f"benchmarks.{self.shows}")


SUITES = {
    suite.name: suite
    for suite in (
        Suite("digits", "cpu", "suites.digits", "suites.digits", "study"),
        Suite("expert", "cpu", "suites.expert", "suites.expert"),
        Suite("speed", "cpu", "suites.speed", "suites.speed"),
        Suite("kernels", "gpu", "suites.kernels", "suites.kernels"),
        Suite("training", "gpu", "training.summary", "training.steps", "training"),
        Suite("layers", "gpu", "suites.layers", "suites.layers", "training"),
        Suite("serving", "both", "serving.summary", "serving.suite", "serving"),
        Suite("goals", "gpu", "goals.table"),
        Suite("checkpoints", "cpu", "checkpoints.rows"),
        Suite("fuzz", "cpu", "suites.fuzz"),
    )
}


def measured_on(*devices: str) -> tuple[str, ...]:
    """Return the names of the suites that ``python -m benchmarks.run`` measures on such a device."""
    return tuple(name for name, suite in SUITES.items() if suite.measures is not None and suite.device in devices)
