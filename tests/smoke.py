"""Which parametrisations of a GPU test are smoke tests, and how early they run."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


def smoke(rank: int, **only: tuple[Any, ...]) -> Callable[[Test], Test]:
    """Mark the parametrisations whose values are among ``only`` as smoke tests; the lowest ``rank`` runs first."""

    def mark(test: Test) -> Test:
        test.smoke = (rank, only)  # type: ignore[attr-defined]
        return test

    return mark


def mark_smoke(item: pytest.Item) -> None:
    """Add the marker to a collected test that :func:`smoke` chose, before ``-m`` selects."""
    rank, only = getattr(getattr(item, "function", None), "smoke", (0, None))
    if only is None:
        return
    parameters = item.callspec.params if hasattr(item, "callspec") else {}  # type: ignore[attr-defined]
    if all(parameters[name] in values for name, values in only.items()):
        item.add_marker(pytest.mark.smoke(rank))


def smoke_rank(item: pytest.Item) -> float:
    """Return the rank of a smoke test, and infinity for every other test."""
    marker = item.get_closest_marker("smoke")
    return marker.args[0] if marker is not None and marker.args else float("inf")
