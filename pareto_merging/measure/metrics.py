"""Indicators of a set of solutions, from moocore and SciPy. Higher is better for every objective here."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr


@dataclass(frozen=True)
class Spread:
    """Values over several seeds: mean, sample standard deviation (None of too few) and themselves."""

    mean: float | None
    sd: float | None
    values: list[float | None]


@dataclass(frozen=True)
class Alignment:
    """How well accuracies follow the preferences they were made for, see :func:`alignment`."""

    cosine: float | None
    spearman: list[float | None]


@dataclass(frozen=True)
class Indicators:
    """All indicators of one set of points, see :func:`indicators`."""

    reference_point: list[float]
    hypervolume: float
    non_dominated_points: int
    points: int
    spacing: float | None
    igd_plus: float | None
    alignment: Alignment | None


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume that points [n, K] to be maximised dominate above ``reference`` [K].

    Points that do not exceed the reference everywhere add nothing. Raises ValueError for other shapes or NaN.
    """
    values = np.asarray(points, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(reference) or not np.isfinite(values).all():
        raise ValueError(f"points: expected finite [n, {len(reference)}], got {list(values.shape)}")
    return float(moocore.hypervolume(values, ref=np.asarray(reference, dtype=float), maximise=True))


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which of points [n, K] (to be maximised) no other dominates. Equal points all count."""
    values = np.asarray(points, dtype=float)
    return np.asarray(moocore.is_nondominated(values, maximise=True, keep_weakly=True), dtype=bool)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, ties by average rank; None where one is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def spacing(points: ArrayLike) -> float | None:
    """Return Schott's spacing of the distinct non-dominated points among ``points`` [n, K], by pymoo.

    0 is evenly spread: √(mean_i (d_i − mean d)²), d_i the city-block distance from point i to its nearest neighbour;
    divided by n (pymoo's reading), not n − 1. None where fewer than two points are left. Raises ValueError for other
    shapes or NaN.
    """
    # takes a while to import
    from pymoo.indicators.spacing import SpacingIndicator

    front = union_front([_finite(points)])
    return float(SpacingIndicator()(front)) if len(front) > 1 else None


def igd_plus(points: ArrayLike, reference_front: ArrayLike) -> float:
    """Return IGD⁺ of points [n, K] to a front [m, K], both maximised, by moocore.

    0 where the points reach the front: mean_j min_i √Σ_k max(r_jk − a_ik, 0)² (Ishibuchi et al. 2015). Raises
    ValueError for other shapes, NaN or no point: moocore answers 0 or inf there.
    """
    values = _finite(points, least=1)
    front = _finite(reference_front, values.shape[1], "reference_front", least=1)
    return float(moocore.igd_plus(values, ref=front, maximise=True))


def union_front(sets: Iterable[ArrayLike]) -> NDArray[np.float64]:
    """Return the distinct non-dominated points [m, K] of all sets [n_i, K] together.

    They are in the order of their first appearance. A set may have no points. Raises ValueError for no sets, other
    shapes or NaN.
    """
    values: list[NDArray[np.float64]] = []
    for points in sets:
        values.append(_finite(points, values[0].shape[1] if values else None, "sets"))
    if not values:
        raise ValueError("sets: expected at least one set of points, got none")
    together = np.concatenate(values)
    return together[np.asarray(moocore.is_nondominated(together, maximise=True, keep_weakly=False), dtype=bool)]


def alignment(gammas: ArrayLike, accuracies: ArrayLike) -> Alignment:
    """Measure how well accuracies [n, K] follow the preferences [n, K] they were made for.

    ``cosine``: the mean over the models of cos(γ, accuracies), None without models or where a row is zero.
    ``spearman``: K numbers, Spearman's rank correlation of γ_k and accuracy_k over the models, None where one of them
    is constant, as it is for K = 1 or n < 2. Raises ValueError for other shapes, NaN or inf.
    """
    wanted = _finite(gammas, name="gammas")
    got = _finite(accuracies, wanted.shape[1], "accuracies", rows=len(wanted))
    tasks = wanted.shape[1]
    norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1)
    cosine = float(((wanted * got).sum(axis=1) / norms).mean()) if len(norms) and norms.all() else None
    ranks = [spearman(wanted[:, k].tolist(), got[:, k].tolist()) if tasks > 1 else None for k in range(tasks)]
    return Alignment(cosine, ranks)


def indicators(
    points: ArrayLike, reference: Sequence[float], gammas: ArrayLike | None = None, union: ArrayLike | None = None
) -> Indicators:
    """Return all indicators of n ≥ 1 points [n, K] to be maximised. Raises ValueError for other shapes, NaN or inf.

    Args:
        points: the objectives of n models. reference: the reference point [K] of the hypervolume.
        gammas: the preference [n, K] of each model; None leaves ``alignment`` None.
        union: the front [m, K] that IGD⁺ measures to (see :func:`union_front`); None leaves ``igd_plus`` None.
    """
    values = _finite(points, least=1)
    corner = np.asarray(reference, dtype=float)
    if corner.shape != values.shape[1:] or not np.isfinite(corner).all():
        raise ValueError(f"reference: expected finite [{values.shape[1]}], got {_what(corner)}")
    return Indicators(
        reference_point=corner.tolist(),
        hypervolume=hypervolume(values, corner.tolist()),
        non_dominated_points=int(non_dominated(values).sum()),
        points=len(values),
        spacing=spacing(values),
        igd_plus=None if union is None else igd_plus(values, union),
        alignment=None if gammas is None else alignment(gammas, values),
    )


def spread(values: Sequence[float | None]) -> Spread:
    """Return mean, sample standard deviation and the values themselves, rounded to 4 decimals.

    None stays among the values and counts in neither; ``mean`` is None without a number, ``sd`` with fewer than two.
    Raises ValueError for NaN or inf.
    """
    numbers = [float(value) for value in values if value is not None]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"values: expected finite numbers or None, got {list(values)}")
    return Spread(
        mean=round(statistics.fmean(numbers), 4) if numbers else None,
        sd=round(statistics.stdev(numbers), 4) if len(numbers) > 1 else None,
        values=[None if value is None else round(float(value), 4) for value in values],
    )


def _finite(
    points: ArrayLike, tasks: int | None = None, name: str = "points", rows: int | None = None, least: int = 0
) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=float)
    right = values.ndim == 2 and values.shape[1] >= 1 and len(values) >= least and np.isfinite(values).all()
    if not right or tasks not in (None, values.shape[1]) or rows not in (None, len(values)):
        shape = f"[{'n' if rows is None else rows}, {tasks or 'K'}]"
        raise ValueError(f"{name}: expected finite {shape}{' with n at least 1' if least else ''}, got {_what(values)}")
    return values


def _what(values: NDArray[np.float64]) -> str:
    return f"{list(values.shape)}{'' if np.isfinite(values).all() else ' with NaN or inf'}"
