"""What this card does at best. Everything else is set against these figures of the same run."""

from collections.abc import Iterator
from typing import Any

from benchmarks.goals.context import Context

# of benchmarks.tune's rates -> name here, and the unit of the figure
NAMES = {
    "memory": ("copy", "B/s"),
    "half": ("bfloat16", "FLOP/s"),
    "float32": ("float32", "FLOP/s"),
    "tf32": ("tf32", "FLOP/s"),
    "cache": ("L2", "B/s"),
    "launch": ("launch", "s"),
}


def measure(context: Context) -> None:
    """Measure a large copy, products of 8192³ by type, copies inside L2, and empty launches."""

    def rows() -> Iterator[dict[str, Any]]:
        from benchmarks.common import ceilings

        measured = ceilings.measured_rates(context.device, context.quick)
        for name, (title, unit) in NAMES.items():
            if name in measured:
                yield {"variant": title, "value": measured[name], "unit_of_value": unit, "matched": True}

    context.session.measure("ceilings/rates", rows, 15)
