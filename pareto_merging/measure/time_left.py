"""How long a comparison will still take, from what it has taken."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Method
from pareto_merging.methods.registry import METHODS


class TimeLeft:
    """The time that waiting methods will take, judged by those done, quick ones apart.

    Args:
        weights: runs that each method takes, see :func:`count_runs`. waiting: pairs of seed and method.
    """

    def __init__(self, weights: Mapping[str, float], waiting: Sequence[tuple[int, str]]) -> None:
        self._weights = weights
        self._waiting, self._done, self._spent = ({True: 0.0, False: 0.0} for _ in range(3))
        for _, key in waiting:
            self._waiting[METHODS[key].learns] += weights[key]

    def done(self, key: str, seconds: float | None) -> None:
        """Count one method as done, after so many seconds; None if it was skipped."""
        learns = METHODS[key].learns
        self._waiting[learns] -= self._weights[key]
        if seconds is not None:
            self._done[learns] += self._weights[key]
            self._spent[learns] += seconds

    def seconds(self) -> float | None:
        """Return the seconds that are probably left; None while nothing like what waits was done."""
        left = 0.0
        for learns, weight in self._waiting.items():
            if weight < 1e-6:
                continue
            if self._done[learns]:
                left += weight * self._spent[learns] / self._done[learns]
            elif learns:
                return None
        return left


def count_runs(
    method: Method, settings: MethodSettings, preferences: Sequence[tuple[list[str], Tensor]], effort: int
) -> float:
    """Return how many runs of itself a method takes, roughly."""
    tasks = len(preferences[0][1])
    runs = min(effort, len(method.choices(tasks, settings)))
    if method.runs_per_preference:
        # the equal one was run when the setting was chosen
        runs += len(preferences) - 1 if tasks <= 2 else tasks
    return float(runs)
