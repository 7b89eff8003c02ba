"""A results file that is whole after every row, whatever ends the run.

A run consists of units, each with a key and one or more rows. The file is written anew, atomically, when a unit begins,
after each of its rows and when it is done: a kill at any moment leaves a file with every row until then. What was under
way is measured again by a later run. Needs no PyTorch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pareto_merging.system.files import write_json as write_json

# states of a unit: measured (right or wrong), out of reach of this machine
DONE, LACKING = "done", "lacking"
# how a run ended
COMPLETE, RUNNING, TIME_LIMIT = "complete", "running", "time limit"
# what must agree between two runs whose rows stand in one table
IDENTITY = ("gpu", "driver", "torch", "triton", "triton_key", "quick")


class RecordError(ValueError):
    """A file that is no record, or one that does not fit this run."""


class Record:
    """One results file: ``data`` as it stands in it, rows by unit."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def new(cls, path: Path, header: Mapping[str, Any]) -> "Record":
        """Begin a file with ``header`` (command, commit, date, suite …) and no rows."""
        empty: dict[str, Any] = {"environment": {}, "runs": [], "units": {}, "rows": []}
        return cls(path, {**header, **empty, "not_reached": [], "running": None, "ended": RUNNING})

    @classmethod
    def read(cls, path: Path, suite: str) -> "Record":
        """Read the file of an earlier run.

        Raises:
            RecordError: no such file, not JSON, or no record of that suite; the message says what came.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecordError(f"{path}: expected a results file, got {error.strerror or error}") from error
        except ValueError as error:
            raise RecordError(f"{path}: expected JSON, got {error}") from error
        actual = data.get("suite") if isinstance(data, dict) else type(data).__name__
        if actual != suite:
            raise RecordError(f"{path}: expected a results file of the suite {suite!r}, got {actual!r}")
        for name, kind in (("units", dict), ("rows", list), ("runs", list), ("environment", dict)):
            if not isinstance(data.get(name), kind):
                raise RecordError(f"{path}: {name}: expected a {kind.__name__}, got {type(data.get(name)).__name__}")
        return cls(path, {"not_reached": [], "running": None, "ended": RUNNING, **data})

    def resume(self) -> None:
        """Forget how the earlier run ended. What it did not measure, also for want of a package, is tried now."""
        units = {key: unit for key, unit in self.data["units"].items() if unit.get("state") != LACKING}
        rows = [row for row in self.data["rows"] if isinstance(row, dict) and row.get("unit") in units]
        self.data |= {"units": units, "rows": rows, "not_reached": [], "running": None, "ended": RUNNING}

    def write(self) -> None:
        """Write the file as it stands."""
        write_json(self.path, self.data)

    def identify(self, environment: Mapping[str, Any]) -> None:
        """Note where the run takes place.

        Raises:
            RecordError: the rows that are there were measured elsewhere.
        """
        before = self.data["environment"]
        for name in IDENTITY if before else ():
            if before.get(name) != environment.get(name):
                raise RecordError(
                    f"{self.path}: {name}: expected {environment.get(name)!r}, as here, got {before.get(name)!r}: "
                    "figures from two places do not go into one table"
                )
        self.data["environment"] = {**before, **environment}

    def begin(self, key: str, limit: float, now: float) -> None:
        """Note that a unit is under way since ``now``, for at most ``limit`` seconds. Both are of time.monotonic."""
        self.data["rows"] = [row for row in self.data["rows"] if row["unit"] != key]
        self.data["running"] = {"unit": key, "since": now, "limit": limit}
        self.write()

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Note one more row of a unit."""
        self.data["rows"].append({"unit": key, **row})
        self.write()

    def close(self, key: str, seconds: float, state: str = DONE) -> None:
        """Note that a unit has all its rows and how long they took. It is not measured again."""
        self.data["units"][key] = {"state": state, "seconds": round(seconds, 2)}
        self.data["running"] = None
        self.write()

    def missed(self, key: str) -> None:
        """Note a unit that time did not suffice for."""
        if key not in self.data["not_reached"]:
            self.data["not_reached"].append(key)
        self.write()

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Return rows whose output was wrong, or whose measurement failed."""
        return [row for row in self.data["rows"] if row.get("matched") is False]
