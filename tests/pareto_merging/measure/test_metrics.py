"""Indicators against hand-computed values and plain loops."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from pareto_merging.measure.metrics import (
    Alignment,
    Spread,
    alignment,
    hypervolume,
    igd_plus,
    indicators,
    non_dominated,
    spacing,
    spearman,
    spread,
    union_front,
)


def plain_front(points: NDArray[np.float64]) -> list[tuple[float, ...]]:
    distinct = list(dict.fromkeys(map(tuple, points.tolist())))
    return [p for p in distinct if not any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in distinct)]


def plain_spacing(front: list[tuple[float, ...]]) -> float:
    nearest = [
        min(sum(abs(a - b) for a, b in zip(p, q, strict=True)) for j, q in enumerate(front) if j != i)
        for i, p in enumerate(front)
    ]
    mean = sum(nearest) / len(nearest)
    return math.sqrt(sum((d - mean) ** 2 for d in nearest) / len(nearest))


def plain_igd_plus(points: NDArray[np.float64], front: NDArray[np.float64]) -> float:
    total = 0.0
    for r in front.tolist():
        total += min(
            math.sqrt(sum(max(wanted - got, 0.0) ** 2 for wanted, got in zip(r, a, strict=True)))
            for a in points.tolist()
        )
    return total / len(front)


def some_points(rows: int, tasks: int, seed: int = 0) -> NDArray[np.float64]:
    # few distinct values make ties; every point comes twice or more
    half = np.random.default_rng(seed).integers(0, 9, size=(rows // 2, tasks)).astype(float)
    # two objectives that compete: a front of several points
    half[:, 0] += 18 - 2 * half[:, 1]
    return np.concatenate([half, half[::-1], half[: rows % 2]])


def test_hypervolume() -> None:
    assert hypervolume([[3, 1], [2, 2], [1, 3]], [0, 0]) == pytest.approx(6)
    assert hypervolume([[3, 1], [1, 1]], [0, 0]) == pytest.approx(3)
    assert hypervolume([[2, 3, 4]], [1, 1, 1]) == pytest.approx(6)
    assert hypervolume([[0.5, 9]], [1, 1]) == 0
    with pytest.raises(ValueError, match=r"points: expected finite \[n, 2\], got \[1, 3\]"):
        hypervolume([[1, 2, 3]], [0, 0])
    with pytest.raises(ValueError, match="points: expected finite"):
        hypervolume([[1, float("nan")]], [0, 0])


def test_hypervolume_by_inclusion_and_exclusion() -> None:
    # above (10, 20): boxes 80·20 and 30·70, their intersection 30·20
    assert hypervolume([[90, 40], [40, 90]], [10, 20]) == pytest.approx(1600 + 2100 - 600)
    # boxes 6, 6 and 6; pairs min by min: 2·1·1, 1·2·1, 1·1·2; all three 1·1·1
    boxes = [[3, 2, 1], [1, 3, 2], [2, 1, 3]]
    assert hypervolume(boxes, [0, 0, 0]) == pytest.approx(18 - (1 * 2 * 1 + 1 * 1 * 2 + 2 * 1 * 1) + 1)
    # a duplicate, a dominated point and one on the edge of the reference add nothing
    assert hypervolume([*boxes, boxes[0], [1, 1, 1], [0, 9, 9]], [0, 0, 0]) == pytest.approx(13)
    assert hypervolume([[5], [7], [7]], [4]) == pytest.approx(3)
    assert hypervolume([[2] * 8, [1] * 7 + [3]], [0] * 8) == pytest.approx(256 + 3 - 2)


def test_non_dominated() -> None:
    assert non_dominated([[3, 1], [2, 2], [1, 1], [2, 2], [0, 4]]).tolist() == [True, True, False, True, True]


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 2, 3], [5, 5, 5]) is None


def test_spacing() -> None:
    # nearest neighbours, city block: 2, 2 and 8, mean 4; (4 + 4 + 16) / 3
    front = [[10, 0], [9, 1], [5, 5]]
    assert spacing(front) == pytest.approx(math.sqrt(8))
    assert spacing([*front, [9, 1], [4, 5], [0, 0]]) == pytest.approx(math.sqrt(8))
    assert spacing([[3, 0], [2, 1], [1, 2], [0, 3]]) == 0
    assert spacing([[3, 0], [0, 1]]) == 0


@pytest.mark.parametrize("points", [np.zeros((0, 2)), [[1, 2]], [[1, 2], [1, 2]], [[1, 2], [0, 2]], [[5], [7], [7]]])
def test_spacing_needs_two_distinct_points_on_the_front(points: object) -> None:
    assert spacing(points) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("tasks", "rows"), [(2, 40), (3, 40), (8, 40), (8, 101)])
def test_against_plain_loops(tasks: int, rows: int) -> None:
    points, other = some_points(rows, tasks), some_points(rows, tasks, seed=1) + 1.5
    # an array of another layout
    strided = np.asfortranarray(np.repeat(points, 2, axis=0))[::2]
    before = strided.copy()
    front = plain_front(points)
    assert union_front([strided]).tolist() == [list(p) for p in front]
    assert 2 < len(front) < rows
    assert spacing(strided) == pytest.approx(plain_spacing(front)) and spacing(strided) != 0
    assert igd_plus(strided, other) == pytest.approx(plain_igd_plus(points, other))
    assert igd_plus(strided, other) > igd_plus(other, points)
    assert np.array_equal(strided, before)


def test_igd_plus() -> None:
    # to (4, 4): (3, 1) lacks (1, 3), (1, 4) lacks (3, 0); to (2, 1): (3, 1) lacks nothing
    assert igd_plus([[3, 1], [1, 4]], [[4, 4], [2, 1]]) == pytest.approx((3 + 0) / 2)
    # √(1 + 9) where the nearer one is gone; what exceeds the front costs nothing
    assert igd_plus([[3, 1]], [[4, 4]]) == pytest.approx(math.sqrt(10))
    assert igd_plus([[9, 1]], [[4, 4]]) == pytest.approx(3)
    assert igd_plus([[5], [2]], [[9], [4]]) == pytest.approx((4 + 0) / 2)
    points = some_points(20, 3)
    assert igd_plus(points, union_front([points])) == 0


def test_union_front() -> None:
    sets = [[[3, 1], [2, 2], [1, 1]], np.zeros((0, 2)), [[2, 2], [1, 5], [0, 5]], [[-0.0, 9], [0.0, 9]]]
    assert union_front(sets).tolist() == [[3, 1], [2, 2], [1, 5], [0, 9]]
    assert union_front(iter(sets[:1])).tolist() == [[3, 1], [2, 2]]
    assert union_front([[[5], [7]], [[7], [1]]]).tolist() == [[7]]
    assert union_front([np.zeros((0, 3))]).shape == (0, 3)
    a, b = some_points(30, 8), some_points(30, 8, seed=1)
    assert union_front([a, b]).tolist() == [list(p) for p in plain_front(np.concatenate([a, b]))]


def test_alignment() -> None:
    gammas = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    found = alignment(gammas, [[80, 60], [70, 70], [60, 80]])
    # cosines 0.8, 1 and 0.8
    assert found.cosine == pytest.approx(2.6 / 3)
    assert found.spearman == pytest.approx([1, 1])
    # task 0 falls where its weight rises; task 1 never moves
    found = alignment(gammas, [[60, 70], [70, 70], [80, 70]])
    assert found.spearman == [pytest.approx(-1), None]
    assert Alignment(**json.loads(json.dumps(asdict(found)))) == found


def test_alignment_of_one_task_one_model_or_none() -> None:
    assert alignment([[1.0], [1.0]], [[50], [60]]) == Alignment(pytest.approx(1), [None])
    assert alignment([[1.0], [0.9]], [[50], [60]]).spearman == [None]
    assert alignment([[0.5, 0.5]], [[50, 50]]) == Alignment(pytest.approx(1), [None, None])
    assert alignment(np.zeros((0, 3)), np.zeros((0, 3))) == Alignment(None, [None] * 3)
    # a model that is right nowhere has no direction
    assert alignment([[1, 0], [0, 1]], [[0, 0], [1, 2]]).cosine is None
    found = alignment(np.eye(8), np.eye(8) * 90 + 5)
    assert found.cosine == pytest.approx(95 / math.sqrt(95**2 + 7 * 25))
    assert found.spearman == pytest.approx([1] * 8)


def test_indicators() -> None:
    points = [[90, 40], [40, 90], [40, 90], [30, 30]]
    assert asdict(indicators(points, [10, 20])) == {
        "reference_point": [10, 20],
        "hypervolume": pytest.approx(1600 + 2100 - 600),
        "non_dominated_points": 3,
        "points": 4,
        "spacing": 0,
        "igd_plus": None,
        "alignment": None,
    }
    gammas = [[1, 0], [0, 1], [0.1, 0.9], [0.5, 0.5]]
    found = indicators(np.array(points), np.array([10, 20]), gammas, [[90, 90], [95, 40]])
    assert found.igd_plus == pytest.approx((50 + 5) / 2)
    assert found.alignment == alignment(gammas, points)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    one = indicators([[55.5]], [50], [[1.0]], [[60]])
    assert (one.hypervolume, one.spacing, one.points) == (5.5, None, 1)
    assert one.igd_plus == pytest.approx(4.5)
    eight = indicators(np.eye(8) + 1, [0] * 8, np.eye(8), np.full((1, 8), 2.0))
    # 8 boxes of 2, any two or more of them share the unit cube
    assert eight.hypervolume == pytest.approx(8 * 1 + 1)
    assert eight.igd_plus == pytest.approx(math.sqrt(7))
    assert (eight.non_dominated_points, eight.spacing) == (8, 0)


def test_spread() -> None:
    # deviations −2, 0, 2: 8 / 2
    assert spread([1, 3, 5]) == Spread(3, 2, [1, 3, 5])
    assert spread([None, 1, None, 2]) == Spread(1.5, 0.7071, [None, 1, None, 2])
    assert spread([1 / 3]) == Spread(0.3333, None, [0.3333])
    assert spread([2.0, 2.0]).sd == 0
    assert spread([None]) == Spread(None, None, [None])
    assert spread([]) == Spread(None, None, [])
    found = spread(np.array([1.0, 2.0], dtype=np.float32))  # type: ignore[arg-type]
    assert Spread(**json.loads(json.dumps(asdict(found)))) == found
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="values: expected finite numbers or None, got"):
            spread([1.0, value])


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spacing([1, 2]), r"points: expected finite \[n, K\], got \[2\]"),
        (lambda: spacing([[1, NAN]]), r"points: expected finite \[n, K\], got \[1, 2\] with NaN or inf"),
        (lambda: spacing(np.zeros((3, 0))), r"points: expected finite \[n, K\], got \[3, 0\]"),
        (lambda: igd_plus(np.zeros((0, 2)), [[1, 1]]), r"points: expected finite \[n, K\] with n at least 1, got"),
        (lambda: igd_plus([[1, 1]], np.zeros((0, 2))), r"reference_front: expected finite \[n, 2\] with n at least 1"),
        (lambda: igd_plus([[1, 1]], [[1, 1, 1]]), r"reference_front: expected finite \[n, 2\] .*got \[1, 3\]"),
        (lambda: igd_plus([[1, math.inf]], [[1, 1]]), "points: .*with NaN or inf"),
        (lambda: union_front([]), "sets: expected at least one set of points, got none"),
        (lambda: union_front([[[1, 2]], [[1, 2, 3]]]), r"sets: expected finite \[n, 2\], got \[1, 3\]"),
        (lambda: union_front([[[1, NAN]]]), "sets: .*with NaN or inf"),
        (lambda: alignment([[1, 0]], [[1, 0], [0, 1]]), r"accuracies: expected finite \[1, 2\], got \[2, 2\]"),
        (lambda: alignment([[1, 0]], [[1, 0, 0]]), r"accuracies: expected finite \[1, 2\], got \[1, 3\]"),
        (lambda: alignment([[NAN, 0]], [[1, 0]]), "gammas: .*with NaN or inf"),
        (lambda: indicators(np.zeros((0, 2)), [0, 0]), "points: expected finite .*at least 1"),
        (lambda: indicators([[1, 2]], [0]), r"reference: expected finite \[2\], got \[1\]"),
        (lambda: indicators([[1, 2]], [0, NAN]), r"reference: expected finite \[2\], got \[2\] with NaN or inf"),
        (lambda: indicators([[1, 2]], [0, 0], gammas=[[1, 0], [0, 1]]), r"accuracies: expected finite \[2, 2\]"),
        (lambda: indicators([[1, 2]], [0, 0], union=[[1]]), r"reference_front: expected finite \[n, 2\]"),
    ],
)
def test_other_shapes_and_nan_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
