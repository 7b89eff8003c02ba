"""Indicators of a set of solutions, from moocore and SciPy: higher is better for every objective here (accuracies)."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """The volume that points [n, K] (to be maximised) dominate above ``reference`` [K], by moocore.

    Points that do not exceed the reference everywhere add nothing. Raises ValueError for other shapes or NaN.
    """
    values = np.asarray(points, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(reference) or not np.isfinite(values).all():
        raise ValueError(f"points: expected finite [n, {len(reference)}], got {list(values.shape)}")
    return float(moocore.hypervolume(values, ref=np.asarray(reference, dtype=float), maximise=True))


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which of points [n, K] (to be maximised) no other point dominates, [n]; equal points all count."""
    values = np.asarray(points, dtype=float)
    return np.asarray(moocore.is_nondominated(values, maximise=True, keep_weakly=True), dtype=bool)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by average rank; None where one of the two is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
