"""Sets that cannot be drawn are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import a_model, a_set, task_names

from pareto_merging.measure.figures.chosen import compare_pictures
from pareto_merging.measure.figures.fronts import fronts
from pareto_merging.measure.figures.parallel import parallel_coordinates
from pareto_merging.measure.figures.projections import pairwise_projections
from pareto_merging.measure.figures.sets import Set
from pareto_merging.measure.figures.simplex import simplex_scatter
from pareto_merging.measure.figures.ternary import ternary


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Set("x", [[1.0, 2, 3]]), r"sets\[1\]\.accuracies: expected \[n, 4\], n ≥ 1, got \[1, 3\]"),
        (Set("x", []), r"sets\[1\]\.accuracies: expected \[n, 4\], n ≥ 1, got \[0\]"),
        (Set("x", [[1.0, 2, 3, 4], [1.0]]), r"sets\[1\]\.accuracies: expected numbers \[n, 4\], n ≥ 1, got \[\[1"),
        (Set("x", [[1.0, 2, 3, float("nan")]]), r"sets\[1\]\.accuracies: expected finite numbers \[n, 4\], n ≥ 1, got"),
        (Set("x", [[1.0] * 4], [[0.5, 0.5]]), r"sets\[1\]\.gammas: expected \[1, 4\], got \[1, 2\]"),
        (Set("x", [[1.0] * 4], [[0.25] * 4] * 2), r"sets\[1\]\.gammas: expected \[1, 4\], got \[2, 4\]"),
        (Set("x", [[1.0] * 4], [[0.5] * 4]), r"sets\[1\]\.gammas: expected weights of at least 0 that sum to 1, got"),
        (Set("x", [[1.0] * 4], [[2, -1, 0, 0]]), r"sets\[1\]\.gammas: expected weights of at least 0 that sum to 1"),
    ],
)
def test_wrong_sets(tmp_path: Path, bad: Set, message: str) -> None:
    for draw in (compare_pictures, parallel_coordinates, pairwise_projections):
        with pytest.raises(ValueError, match=message):
            draw(tmp_path / "x", task_names(4), [a_model("Fine", 4), bad])
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for draw, tasks, expected in (
        (fronts, 3, "2 names, got 3"),
        (simplex_scatter, 4, "3 names, got 4"),
        (parallel_coordinates, 2, "at least 3 names, got 2"),
        (pairwise_projections, 2, "at least 3 names, got 2"),
    ):
        with pytest.raises(ValueError, match=f"task_names: expected {expected}"):
            draw(path, task_names(tasks), [a_model("Model", tasks)])
    for draw, tasks in ((fronts, 2), (simplex_scatter, 3), (parallel_coordinates, 3), (pairwise_projections, 3)):
        with pytest.raises(ValueError, match="sets: expected at least one, got none"):
            draw(path, task_names(tasks), [])
    for draw, tasks in ((fronts, 2), (parallel_coordinates, 5)):
        with pytest.raises(ValueError, match=rf"individuals\['a'\]: expected \[{tasks}\], got \[1\]"):
            draw(path, task_names(tasks), [a_model("Model", tasks)], {"a": [1.0]})
    with pytest.raises(ValueError, match=r"^task_names: expected 3 names, got 2"):
        ternary(path, ["A", "B"], [[0.5, 0.5]], [[1, 2]])
    with pytest.raises(ValueError, match=r"^gammas: expected \[2, 3\], got \[1, 3\]"):
        ternary(path, ["A", "B", "C"], [[1, 0, 0]], [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"^accuracies: expected \[n, 3\], n ≥ 1, got \[1, 2\]"):
        ternary(path, ["A", "B", "C"], [[1, 0, 0]], [[1, 2]])
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_taken_too(tmp_path: Path) -> None:
    one = a_set("Ours", 3, 5)
    sets: Any = [Set("Ours", np.array(one.accuracies), np.array(one.gammas))]
    assert len(compare_pictures(tmp_path, task_names(3), sets)) == 3
