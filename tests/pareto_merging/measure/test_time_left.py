"""How long it will still take."""

import pytest

from pareto_merging.measure.time_left import TimeLeft


def test_time_left_is_not_guessed_from_other_work() -> None:
    waiting = [(0, key) for key in ("weight-averaging", "dare", "adamerging", "pareto", "multitask")]
    left = TimeLeft({"weight-averaging": 1, "dare": 4, "adamerging": 4, "pareto": 4, "multitask": 4}, waiting)
    left.done("weight-averaging", 0.5)
    assert left.seconds() is None, "nothing that learns was seen yet"
    left.done("adamerging", 100.0)
    assert left.seconds() == pytest.approx(4 * 0.5 + 8 * 25)
    left.done("multitask", None)
    assert left.seconds() == pytest.approx(4 * 0.5 + 4 * 25)
    left.done("pareto", 300.0)
    left.done("dare", 3.0)
    assert left.seconds() == 0
