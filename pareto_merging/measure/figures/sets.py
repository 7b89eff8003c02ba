"""What pictures show: methods' solutions, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pareto_merging.measure.figures import look
from pareto_merging.preferences import SUM_TOLERANCE


@dataclass(frozen=True)
class Set:
    """One method's solutions.

    ``gammas`` [n, K] (None for a method that gives one model) and ``accuracies`` [n, K] in percent.
    """

    name: str
    accuracies: Sequence[Sequence[float]]
    gammas: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class CheckedSet:
    """A ``Set`` that was checked: ``accuracies`` [n, K], and its place among the sets."""

    name: str
    accuracies: look.Array
    place: int

    def coloured_mark(self, size: float) -> look.Style:
        return look.mark(look.MARKERS[self.place % len(look.MARKERS)], size) | {
            "color": look.COLOURS[self.place % len(look.COLOURS)]
        }

    def grey_mark(self, size: float) -> look.Style:
        return look.mark(look.GREY_MARKERS[self.place % len(look.GREY_MARKERS)], size) | {
            "markerfacecolor": look.FILLS[self.place % len(look.FILLS)],
            "markeredgecolor": "black",
            "markeredgewidth": 0.6,
        }


@dataclass(frozen=True)
class CheckedFront(CheckedSet):
    """A checked set of models that each have a preference: ``gammas`` [n, K]."""

    gammas: look.Array

    def balanced(self) -> int:
        """Return the row of the preference that is nearest to the equal one."""
        return int(np.abs(self.gammas - 1 / self.gammas.shape[1]).max(axis=1).argmin())


def checked(
    task_names: Sequence[str],
    sets: Sequence[Set],
    exactly: int | None = None,
    at_least: int = 1,
    argument: str = "sets[{}].",
) -> list[CheckedSet]:
    """Return sets as arrays; ``argument`` is their name in an error.

    Raises:
        ValueError: another shape, a value that is not finite, a preference outside the simplex.
    """
    tasks = len(task_names)
    if tasks < at_least or exactly not in (None, tasks):
        raise ValueError(f"task_names: expected {exactly or f'at least {at_least}'} names, got {tasks}")
    if not sets:
        raise ValueError("sets: expected at least one, got none")
    methods: list[CheckedSet] = []
    for place, one in enumerate(sets):
        prefix = argument.format(place)
        accuracies = _numbers(f"{prefix}accuracies", one.accuracies, f"[n, {tasks}], n ≥ 1")
        if accuracies.ndim != 2 or accuracies.shape[1] != tasks or not len(accuracies):
            raise ValueError(f"{prefix}accuracies: expected [n, {tasks}], n ≥ 1, got {list(accuracies.shape)}")
        if one.gammas is None:
            methods.append(CheckedSet(one.name, accuracies, place))
        else:
            gammas = _numbers(f"{prefix}gammas", one.gammas, str(list(accuracies.shape)))
            if gammas.shape != accuracies.shape:
                raise ValueError(f"{prefix}gammas: expected {list(accuracies.shape)}, got {list(gammas.shape)}")
            for row in gammas:
                if row.min() < -SUM_TOLERANCE or abs(row.sum() - 1) > SUM_TOLERANCE:
                    raise ValueError(
                        f"{prefix}gammas: expected weights of at least 0 that sum to 1, got {row.tolist()}"
                    )
            methods.append(CheckedFront(one.name, accuracies, place, gammas))
    return methods


def checked_individuals(individuals: Mapping[str, Sequence[float]] | None, tasks: int) -> dict[str, look.Array]:
    points: dict[str, look.Array] = {}
    for name, values in (individuals or {}).items():
        points[name] = _numbers(f"individuals[{name!r}]", values, f"[{tasks}]")
        if points[name].shape != (tasks,):
            raise ValueError(f"individuals[{name!r}]: expected [{tasks}], got {list(points[name].shape)}")
    return points


def _numbers(argument: str, values: Any, shape: str) -> look.Array:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected numbers {shape}, got {values!r}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{argument}: expected finite numbers {shape}, got {values!r}")
    return numbers


def fronts_of(methods: Sequence[CheckedSet]) -> list[CheckedFront]:
    return [method for method in methods if isinstance(method, CheckedFront)]


def favoured_task(gamma: look.Array) -> int | None:
    """Return the task of the largest weight, the first of several; None of equal ones."""
    return None if np.ptp(gamma) <= SUM_TOLERANCE else int(np.argmax(gamma >= gamma.max() - SUM_TOLERANCE))


def balance(method: CheckedFront) -> str:
    return ("equal" if favoured_task(method.gammas[method.balanced()]) is None else "most even") + " preference"
