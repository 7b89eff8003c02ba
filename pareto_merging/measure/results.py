"""A comparison's results, one for each method and seed, as they are kept in files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from pareto_merging.errors import UserError
from pareto_merging.methods.interface import Choice
from pareto_merging.methods.registry import METHODS

FORMAT = "pareto-comparison-result"


# a whole number in a file stays one
Number = int | float


class Stored(BaseModel, extra="allow", strict=True):
    """What stands in a file, in the order of its keys. Those that are unknown here are kept."""


class Point(Stored):
    """One model of a method on the held-out images.

    Attributes:
        kinds: what its preference is: ``equal``, ``priority:TASK``, ``one-hot:TASK``, ``grid``.
        gamma: the preference [K]; None for a method that gives one model.
        accuracy, entropy: of each evaluated task, in percent and in nats.
    """

    kinds: list[str]
    gamma: list[Number] | None
    accuracy: list[Number]
    entropy: list[Number] = []


class UnseenScore(Stored):
    """The model chosen for a task without a checkpoint. Accuracy (%), entropy (nats) and γ, None for the only one."""

    accuracy: Number
    entropy: Number
    gamma: list[Number] | None


class Try(Stored):
    """One setting that a method tried.

    Attributes:
        seconds, peak_bytes: of the run; None where it failed. score: agreement in percent; None where nothing was to
            choose. error: how it failed, on one line.
    """

    choice: Choice
    warnings: list[str] = []
    seconds: Number | None = None
    peak_bytes: int | None = None
    score: Number | None = None
    error: str | None = None


class Result(Stored):
    """A method with one seed; as it stands one that gave no model, for ``reason``.

    Attributes:
        tasks: those that are evaluated. reference_point: chance on each of them, in percent.
        candidates, tuning_seconds: what was tried, and the seconds of all tries; nothing where the method was skipped,
            because what it needs is not there.
    """

    method: str
    title: str
    seed: int
    is_bound: bool
    tasks: list[str]
    reference_point: list[Number]
    candidates: list[Try] = []
    tuning_seconds: Number = 0.0
    status: Literal["done", "failed", "skipped"]
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON of the result's file: what was given, and no default."""
        return {"format": FORMAT, **self.model_dump(exclude_unset=True)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Result":
        """Return the result of :meth:`to_json`; titles, facts, entropies and times may be left out.

        Raises KeyError, TypeError or ValidationError for another value.
        """
        kind = Measured if value["status"] == "done" else Result
        return kind.model_validate({"title": value["method"], **value})


class Measured(Result):
    """A method that gave a model, or one for each preference, and their measurements.

    Attributes:
        choice: the setting chosen. seconds, peak_bytes: of its run. facts: what it found beside the weights.
        points: its models. unseen: by task without a checkpoint.
    """

    preference_aware: bool
    choice: Choice
    seconds: Number
    peak_bytes: int
    facts: dict[str, Any] = {}
    points: list[Point]
    unseen: dict[str, UnseenScore] = {}

    @property
    def accuracies(self) -> list[list[Number]]:
        """Return the accuracies of its models, [n][tasks] in percent."""
        return [point.accuracy for point in self.points]

    @property
    def gammas(self) -> list[list[Number]] | None:
        """Return the preferences of its models, [n][K]; None for a single model."""
        return [point.gamma or [] for point in self.points] if self.preference_aware else None

    def point(self, *kinds: str) -> Point | None:
        """Return the model at the preference of the first of these kinds that was measured."""
        return next((point for kind in kinds for point in self.points if kind in point.kinds), None)


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
    except (KeyError, TypeError, ValidationError):
        pass
    raise UserError(f"{path}: expected a result of a comparison, got another file")


def stored_results(folder: Path, first: Sequence[str] = ()) -> list[Result]:
    """Return a comparison folder's results: by seed, then ``first``, then in the order of METHODS."""
    order = {key: place for place, key in enumerate(dict.fromkeys((*first, *METHODS)))}
    results = [read_result(path) for path in folder.glob("*-seed-*.json")]
    known = [result for result in results if result is not None and result.method in order]
    return sorted(known, key=lambda result: (result.seed, order[result.method]))
