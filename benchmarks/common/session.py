"""Measuring unit by unit, as far as time goes. What is there already is not measured again."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeAlias

from benchmarks.common.record import DONE, LACKING, Record

# of a figure that is not finite or not there: JSON has no NaN
FAILED = 1e30
Rows: TypeAlias = Iterable[Any]
# an import of these that fails is a fault
OURS = ("benchmarks", "pareto_merging", "pmkernels")


class Lost(RuntimeError):
    """The GPU no longer answers: nothing after this can be measured in this process."""


def one_line(error: BaseException) -> str:
    """Return an error in at most 300 characters of one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


@dataclass
class Session:
    """One run: its record, when it has to end, and what is wanted of it.

    ``until``: on ``clock``, seconds. ``grace``: how many times its estimate a unit may take before whoever watches the
    run gives it up. ``wanted``: whether a unit's key is asked for.
    """

    record: Record
    until: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    wanted: Callable[[str], bool] = lambda key: True
    synchronize: Callable[[], None] = lambda: None
    grace: float = 4.0
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        """Return seconds until the run has to end."""
        return self.until - self.clock()

    def tell(self, line: str) -> None:
        """Say a line with the time since the start and the time left."""
        ahead = "" if self.until == float("inf") else f", {max(self.left, 0):4.0f} s left"
        self.say(f"[{self.clock() - self.start:4.0f} s{ahead}] {line}")

    def measure(self, key: str, function: Callable[[], Rows], seconds: float) -> None:
        """Measure a unit and save each row as it comes. It is left out if it is there already or time does not suffice.

        Whatever goes wrong inside becomes one more row that says so: running out of memory is a result, other errors
        are wrong. ``function`` gives rows, dataclasses or mappings; ``seconds`` is what it should take on a large GPU.

        Raises:
            Lost: the GPU does not answer after an error.
        """
        if not self.wanted(key) or key in self.record.data["units"]:
            return
        if seconds > self.left:
            self.record.missed(key)
            self.tell(f"{key}: not begun, it takes about {seconds:.0f} s")
            return
        self.record.begin(key, self.grace * seconds + 60, self.clock())
        begin, state = self.clock(), DONE
        try:
            for row in function():
                self._keep(key, as_row(row))
        except Exception as error:
            failed, state = self._failed(key, error)
            self._keep(key, failed)
        self.record.close(key, self.clock() - begin, state)
        gc.collect()

    def _keep(self, key: str, row: Mapping[str, Any]) -> None:
        self.record.add(key, row)
        self.tell(describe(key, row))

    def lacks(self, key: str, error: ImportError) -> None:
        """Note a unit that cannot be measured because something is not installed."""

        def rows() -> Rows:
            raise error

        self.measure(key, rows, 0.0)

    def _failed(self, key: str, error: Exception) -> tuple[Mapping[str, Any], str]:
        """Return what goes into the record instead of figures: a row and the unit's state."""
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OURS:
            lacking = f", for want of {error.name}" if error.name else f": {error}"
            return failure(f"not measured{lacking}", matched=True), LACKING
        short = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
        # what the frames hold must go before anything else is made
        error.__traceback__ = None
        try:
            self.synchronize()
        except Exception as lost:
            self.record.add(key, failure(one_line(error), matched=False))
            self.record.close(key, 0.0)
            raise Lost(one_line(lost)) from error
        return failure("out of memory" if short else one_line(error), matched=short), DONE


def as_row(row: Any) -> dict[str, Any]:
    """Return a row as JSON has it; figures that are not finite are :data:`FAILED`."""
    fields: Mapping[str, Any] = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
    numbers = {name for name, value in fields.items() if isinstance(value, float)}
    return {name: FAILED if name in numbers and not math.isfinite(value) else value for name, value in fields.items()}


def failure(reason: str, *, matched: bool) -> dict[str, Any]:
    """Return a row without figures."""
    return {"variant": "all", "matched": matched, "ms": None, "reason": reason}


def describe(key: str, row: Mapping[str, Any]) -> str:
    """Return one line about a row."""
    about: list[str] = []
    if row.get("ms") is not None:
        about.append(f"{row['ms']:.4g} ms" if row["ms"] < 10 else f"{row['ms']:.1f} ms")
    if row.get("value") is not None:
        about.append(f"{row['value']:.4g} {row.get('unit_of_value', '')}".strip())
    if row.get("cache"):
        about.append(str(row["cache"]))
    if row.get("matched") is False:
        about.append(f"WRONG: error {row.get('error', FAILED):.2e}")
    if row.get("reason"):
        about.append(str(row["reason"]))
    variant = str(row.get("variant", ""))
    name = key if not variant or key.endswith(f"/{variant}") else f"{key}: {variant}"
    return f"{name}: {', '.join(about) or 'right'}"


class Once:
    """A value made when it is first asked for, kept until :meth:`drop`. A failure is remembered and raised again."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, list[Any]()

    def __call__(self) -> Any:
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._made.append(error.with_traceback(None))
        if isinstance(self._made[0], Exception):
            raise self._made[0].with_traceback(None)
        return self._made[0]

    def drop(self) -> None:
        """Let go of the value and of a failure."""
        self._made.clear()


def chosen(keys: Sequence[str] | None) -> Callable[[str], bool]:
    """Tell which units are asked for. They are those whose group is one of ``keys``, all if that is None."""
    return lambda key: keys is None or key.partition("/")[0] in keys
