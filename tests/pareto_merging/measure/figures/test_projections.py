"""Projections on pairs of tasks."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.pictures import drawn, legend_texts, many, projected, task_names

from pareto_merging.measure.figures.projections import pairwise_projections


@pytest.mark.parametrize(
    ("tasks", "pairs"),
    [
        (3, [(0, 1), (2, 0)]),
        (4, [(0, 1), (2, 3)]),
        (8, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (9, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 0)]),
        (12, [(k, k + 1) for k in range(0, 12, 2)]),
        (20, [(k, k + 1) for k in range(0, 20, 2)]),
    ],
)
def test_pairwise_projections_hold_the_data(
    tmp_path: Path, saved: list[Figure], tasks: int, pairs: list[tuple[int, int]]
) -> None:
    pairwise_projections(tmp_path / "p.png", task_names(tasks), many(tasks))
    assert len(saved[0].axes) == len(pairs)
    for axes, (x, y) in zip(saved[0].axes, pairs, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"TASK_{x} (%)", f"TASK_{y} (%)")
        for one in many(tasks):
            assert drawn(axes, one.name) == projected(one, x, y)
    assert legend_texts(saved[0]) == [one.name for one in many(tasks)]


def test_chosen_projections(tmp_path: Path, saved: list[Figure]) -> None:
    pairwise_projections(tmp_path / "p.png", task_names(5), many(5), [(4, 2)])
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in saved[0].axes] == [("TASK_4 (%)", "TASK_2 (%)")]
    for pairs in ([], [(1, 1)], [(0, 5)], [(-1, 0)], [(0, 1, 2)]):
        with pytest.raises(ValueError, match="pairs: expected pairs of different tasks from 0 to 4, got"):
            pairwise_projections(tmp_path / "q.png", task_names(5), many(5), pairs)
