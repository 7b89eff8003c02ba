"""What pictures show: methods' solutions, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pareto_merging.measure.figures import look
from pareto_merging.preferences import SUM_TOLERANCE


@dataclass(frozen=True)
class Set:
    """One method's solutions. ``accuracies`` [n, K] in percent, ``gammas`` [n, K] (None for the only model)."""

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
        colour = look.COLOURS[self.place % len(look.COLOURS)]
        return look.mark(look.MARKERS[self.place % len(look.MARKERS)], size) | {"color": colour}

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

    def favoured(self) -> list[int | None]:
        """Return each preference's task of the largest weight. The first of several, None of equal ones."""
        largest = [int(np.argmax(gamma >= gamma.max() - SUM_TOLERANCE)) for gamma in self.gammas]
        return [None if np.ptp(g) <= SUM_TOLERANCE else task for g, task in zip(self.gammas, largest, strict=True)]

    def balanced(self) -> int:
        """Return the row of the preference that is nearest to the equal one."""
        return int(np.abs(self.gammas - 1 / self.gammas.shape[1]).max(axis=1).argmin())

    def balance(self) -> str:
        """Say what that preference is."""
        return ("equal" if self.favoured()[self.balanced()] is None else "most even") + " preference"


def checked(
    task_names: Sequence[str],
    sets: Sequence[Set],
    exactly: int | None = None,
    at_least: int = 1,
    name: str = "sets[{}].",
) -> list[CheckedSet]:
    """Return sets as arrays; ``name`` is theirs in an error.

    Raises ValueError for another shape, a value that is not finite, a preference outside the simplex.
    """
    tasks = len(task_names)
    if tasks < at_least or exactly not in (None, tasks):
        raise ValueError(f"task_names: expected {exactly or f'at least {at_least}'} names, got {tasks}")
    if not sets:
        raise ValueError("sets: expected at least one, got none")
    methods: list[CheckedSet] = []
    for place, one in enumerate(sets):
        prefix = name.format(place)
        accuracies = _numbers(f"{prefix}accuracies", one.accuracies, (None, tasks), f"[n, {tasks}], n ≥ 1")
        if one.gammas is None:
            methods.append(CheckedSet(one.name, accuracies, place))
        else:
            gammas = _numbers(f"{prefix}gammas", one.gammas, accuracies.shape, str(list(accuracies.shape)))
            for row in gammas:
                if row.min() < -SUM_TOLERANCE or abs(row.sum() - 1) > SUM_TOLERANCE:
                    wanted = "weights of at least 0 that sum to 1"
                    raise ValueError(f"{prefix}gammas: expected {wanted}, got {row.tolist()}")
            methods.append(CheckedFront(one.name, accuracies, place, gammas))
    return methods


def checked_individuals(individuals: Mapping[str, Sequence[float]] | None, tasks: int) -> dict[str, look.Array]:
    return {
        name: _numbers(f"individuals[{name!r}]", values, (tasks,), f"[{tasks}]")
        for name, values in (individuals or {}).items()
    }


def _numbers(argument: str, values: Any, shape: Sequence[int | None], expected: str) -> look.Array:
    """Return values as an array; a size of None is any but 0."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected numbers {expected}, got {values!r}") from error
    if not np.isfinite(numbers).all():
        raise ValueError(f"{argument}: expected finite numbers {expected}, got {values!r}")
    pairs = zip(numbers.shape, shape, strict=False)
    if numbers.ndim != len(shape) or not all(size == wanted if wanted else size > 0 for size, wanted in pairs):
        raise ValueError(f"{argument}: expected {expected}, got {list(numbers.shape)}")
    return numbers


def first_front(methods: Sequence[CheckedSet]) -> CheckedFront | None:
    return next((method for method in methods if isinstance(method, CheckedFront)), None)
