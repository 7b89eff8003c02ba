"""Indicators against hand-computed values."""

from __future__ import annotations

import pytest

from pareto_merging.metrics import hypervolume, non_dominated, spearman


def test_hypervolume() -> None:
    assert hypervolume([[3, 1], [2, 2], [1, 3]], [0, 0]) == pytest.approx(6)
    assert hypervolume([[3, 1], [1, 1]], [0, 0]) == pytest.approx(3)
    assert hypervolume([[2, 3, 4]], [1, 1, 1]) == pytest.approx(6)
    assert hypervolume([[0.5, 9]], [1, 1]) == 0
    with pytest.raises(ValueError, match=r"points: expected finite \[n, 2\], got \[1, 3\]"):
        hypervolume([[1, 2, 3]], [0, 0])
    with pytest.raises(ValueError, match="points: expected finite"):
        hypervolume([[1, float("nan")]], [0, 0])


def test_non_dominated() -> None:
    assert non_dominated([[3, 1], [2, 2], [1, 1], [2, 2], [0, 4]]).tolist() == [True, True, False, True, True]


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 2, 3], [5, 5, 5]) is None
