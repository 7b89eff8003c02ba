"""What hostile files have in common: where their payload leaves a mark, and what is expected of a reader."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CANARY = "canary"
CANARY_MODULE = "hostile_canary_module"
EXTENSION_CODE = 200
ANYTHING = None
TERABYTE = 2**40


@dataclass(frozen=True)
class Pickled:
    """A hostile pickle.

    Attributes:
        expected: a regular expression for the error. places: where it must be one: r(aw machine), z(ip), l(egacy);
            elsewhere it may be read, to no harm. heavy: takes memory, or could crash C code.
    """

    name: str
    data: bytes
    expected: str | None = ANYTHING
    places: str = "rzl"
    heavy: bool = False


@dataclass(frozen=True)
class Case:
    """One hostile checkpoint.

    Attributes:
        write: puts it into a folder and returns what to open. expected: a regular expression in the error; None: any
            error. harmless: it may also be read. how: ``machine`` for read_pickle, else ``open``. heavy: takes memory,
            time or the C stack where a reader is careless, so it is opened in a process of its own.
    """

    name: str
    write: Callable[[Path], Path] = field(repr=False)
    expected: str | None = ANYTHING
    harmless: bool = False
    how: str = "open"
    heavy: bool = False
