"""Functions called in turn."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.common import timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_variants_take_turns_and_stop_when_there_is_enough() -> None:
    order: list[tuple[str, int]] = []
    seen: list[tuple[str, int, Any]] = []

    def function(name: str) -> Callable[[int], str]:
        return lambda number: order.append((name, number)) or f"{name}{number}"  # type: ignore[func-returns-value]

    functions = {name: function(name) for name in "abc"}
    effort = timing.Effort(fewest=3, most=3, seconds=0.0)
    times = timing.in_turn(functions, effort, CPU, lambda *what: seen.append(what))
    assert "".join(name for name, _ in order) == "abcbcacab"
    assert seen == [(name, number, f"{name}{number}") for name, number in order]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
    effort = timing.Effort(fewest=2, most=9, seconds=0.010)
    assert [effort.suffices(found) for found in ([20.0], [4.0, 5.0], [5.0, 5.0], [0.1] * 9)] == [
        False,
        False,
        True,
        True,
    ]
