"""What is left at the end: few bytes, a data-free run, and the layer grid."""

from benchmarks.goals.context import Context
from benchmarks.suites import layers


def measure(context: Context) -> None:
    """Measure what has the least value for its time, as far as time goes."""
    try:
        # it needs pydantic
        from benchmarks.goals import training
    except ImportError as error:
        context.session.lacks("rest/all", error)
    else:
        training.few_bytes(context)
    for point in layers.grid_points(context.quick, context.device):
        context.session.measure(f"rest/layer grid/{point.name}", point.rows, 1.0)
