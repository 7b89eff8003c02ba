"""A comparison's results, one for each method and seed, as they are kept in files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pareto_merging.errors import UserError
from pareto_merging.methods.interface import Choice
from pareto_merging.methods.registry import METHODS

FORMAT = "pareto-comparison-result"
# the keys of every result, and those of one that was measured, as they stand in files
_ABOUT = ("method", "title", "seed", "is_bound", "tasks", "reference_point")
_MEASURED = ("preference_aware", "choice", "seconds", "peak_bytes", "facts")


@dataclass(frozen=True)
class Point:
    """One model of a method on the held-out images.

    Attributes:
        kinds: what its preference is: ``equal``, ``priority:TASK``, ``one-hot:TASK``, ``grid``.
        gamma: the preference [K]; None for a method that gives one model.
        accuracy, entropy: of each evaluated task, in percent and in nats.
    """

    kinds: list[str]
    gamma: list[float] | None
    accuracy: list[float]
    entropy: list[float]


@dataclass(frozen=True)
class UnseenScore:
    """The model chosen for a task without a checkpoint.

    Accuracy (%), entropy (nats) and γ, None for the only one.
    """

    accuracy: float
    entropy: float
    gamma: list[float] | None


@dataclass
class Try:
    """One setting that a method tried.

    Attributes:
        seconds, peak_bytes: of the run; None where it failed. score: agreement in percent; None where nothing was to
            choose. error: how it failed, on one line.
    """

    choice: Choice
    warnings: list[str] = field(default_factory=list)
    seconds: float | None = None
    peak_bytes: int | None = None
    score: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON without what a failed try does not have."""
        return {
            "choice": self.choice,
            **({"warnings": self.warnings} if self.warnings else {}),
            **({} if self.seconds is None else {"seconds": self.seconds, "peak_bytes": self.peak_bytes}),
            **({"score": self.score} if self.error is None else {"error": self.error}),
        }


@dataclass(frozen=True)
class Tuning:
    """The settings that a method tried, and the seconds of all of them."""

    tries: list[Try]
    seconds: float


@dataclass(frozen=True)
class Result:
    """A method with one seed; as it stands one that gave no model, for ``reason``.

    Attributes:
        tasks: those that are evaluated. reference_point: chance on each of them, in percent.
        tuning: None where the method was skipped, because what it needs is not there.
    """

    method: str
    title: str
    seed: int
    is_bound: bool
    tasks: list[str]
    reference_point: list[float]
    tuning: Tuning | None = None
    reason: str = ""

    @property
    def status(self) -> Literal["done", "failed", "skipped"]:
        """Return whether the method was measured, failed or was skipped."""
        return "skipped" if self.tuning is None else "failed"

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON of the result's file."""
        value = {"format": FORMAT, **{name: getattr(self, name) for name in _ABOUT}}
        if self.tuning is not None:
            value["candidates"] = [tried.to_json() for tried in self.tuning.tries]
            value["tuning_seconds"] = self.tuning.seconds
        value["status"] = self.status
        return value | ({"reason": self.reason} if self.status != "done" else {})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Result":
        """Return the result of :meth:`to_json`; titles, facts, entropies and times may be left out.

        Raises:
            KeyError, TypeError: another value.
        """
        value = {"title": value["method"], "facts": {}, "candidates": [], "tuning_seconds": 0.0, "reason": "", **value}
        tuning = None
        if value["status"] != "skipped":
            tuning = Tuning([Try(**tried) for tried in value["candidates"]], value["tuning_seconds"])
        about = {name: value[name] for name in _ABOUT}
        if value["status"] != "done":
            return Result(**about, tuning=tuning, reason=value["reason"])
        return Measured(
            **about,
            **{name: value[name] for name in _MEASURED},
            tuning=tuning,
            points=[Point(**{"entropy": [], **point}) for point in value["points"]],
            unseen={name: UnseenScore(**score) for name, score in value.get("unseen", {}).items()},
        )


@dataclass(frozen=True, kw_only=True)
class Measured(Result):
    """A method that gave a model, or one for each preference, and their measurements.

    Attributes:
        choice: the setting chosen. seconds, peak_bytes: of its run. facts: what it found beside the weights.
        points: its models. unseen: by task without a checkpoint.
    """

    preference_aware: bool
    choice: Choice
    seconds: float
    peak_bytes: int
    facts: dict[str, Any]
    points: list[Point]
    unseen: dict[str, UnseenScore] = field(default_factory=dict)

    @property
    def status(self) -> Literal["done", "failed", "skipped"]:
        """Return that it was measured."""
        return "done"

    @property
    def accuracies(self) -> list[list[float]]:
        """Return the accuracies of its models, [n][tasks] in percent."""
        return [point.accuracy for point in self.points]

    @property
    def gammas(self) -> list[list[float]] | None:
        """Return the preferences of its models, [n][K]; None for a single model."""
        return [point.gamma or [] for point in self.points] if self.preference_aware else None

    def point(self, *kinds: str) -> Point | None:
        """Return the model at the preference of the first of these kinds that was measured."""
        return next((point for kind in kinds for point in self.points if kind in point.kinds), None)

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON of the result's file."""
        return {
            **super().to_json(),
            **{name: getattr(self, name) for name in _MEASURED},
            "points": [asdict(point) for point in self.points],
            **({"unseen": {name: asdict(score) for name, score in self.unseen.items()}} if self.unseen else {}),
        }


def result_name(key: str, seed: int) -> str:
    """Return the name of one result's file."""
    return f"{key}-seed-{seed}.json"


def read_result(path: Path) -> Result | None:
    """Return the result in a file, None where there is no file. UserError for another file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a result of a comparison, got {error}") from error
    try:
        if value["format"] == FORMAT:
            return Result.from_json(value)
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: expected a result of a comparison, got another file")


def stored_results(folder: Path, first: Sequence[str] = ()) -> list[Result]:
    """Return a comparison folder's results: by seed, then ``first``, then in the order of METHODS."""
    order = {key: place for place, key in enumerate(dict.fromkeys((*first, *METHODS)))}
    results = [read_result(path) for path in folder.glob("*-seed-*.json")]
    known = [result for result in results if result is not None and result.method in order]
    return sorted(known, key=lambda result: (result.seed, order[result.method]))
