"""Launch configurations: what the files ``configs/*.json`` say, and which of them are in force.

A file is named after the GPU where one was tuned by ``python -m benchmarks.tune`` (``nvidia-h200.json``: launches,
rates and fastest strategies as measured), else after its architecture (``sm_90.json``), else ``default.json`` is taken.
``python -m benchmarks.budget`` compiles every entry without a GPU. :mod:`pmkernels.dispatch` puts a :class:`Configs` in
force.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Config:
    """The launch of one kernel: tile sizes, warps per program, and stages of its loop."""

    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 4
    num_stages: int = 2
    # task vectors loaded at a time: see weight_tile
    unroll: int = 1
    # parts that D (linear) or M (weight_grad) is cut into; 0: by the rules of pmkernels.launch
    splits: int = 0

    def options(self, *constants: str) -> dict[str, Any]:
        """Return the options of a launch and the named constants of its kernel. BLOCK_M, …, UNROLL, STAGES."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        values = {**sizes, "UNROLL": self.unroll, "STAGES": self.num_stages}
        # a·b + c is one instruction on every GPU
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**{name: values[name] for name in constants}, **options}


class Asked(NamedTuple):
    """A launch to configure: kernel, type (``float32``, ``tf32``, ``16-bit``), rows, rank and layout."""

    op: str
    dtype: str
    rows: int
    rank: int
    aligned: bool


@dataclass(frozen=True)
class Entry:
    """One line of a configuration file: a Config and what it is for. The first line that fits is taken."""

    op: str
    dtype: str
    config: Config
    max_rows: int | None = None
    max_rank: int | None = None
    aligned: bool | None = None

    def fits(self, asked: Asked) -> bool:
        """Say whether this line is for that launch."""
        return (
            self.op == asked.op
            and self.dtype in (asked.dtype, "any")
            and (self.max_rows is None or asked.rows <= self.max_rows)
            and (self.max_rank is None or asked.rank <= self.max_rank)
            and (self.aligned is None or self.aligned == asked.aligned)
        )


@dataclass(frozen=True)
class Choice:
    """The fastest strategy as measured for one operation of one layer at that many rows."""

    op: str
    dtype: str
    n: int
    d: int
    tasks: int
    rank: int
    rows: int
    best: str


@functools.lru_cache(maxsize=64)
def _read(text: str) -> dict[str, Any]:
    lines: dict[str, Any] = json.loads(text)
    return lines


def read_entries(text: str) -> list[Entry]:
    """Read the entries of a configuration file's JSON. A field that no Config or Entry has is a TypeError."""
    return [Entry(**{**line, "config": Config(**line["config"])}) for line in _read(text)["entries"]]


def read_rates(text: str) -> dict[str, Any]:
    """Read the measured rates of a configuration file's JSON: fields of :class:`pmkernels.costs.Rates`."""
    rates = _read(text).get("rates", {})
    return {**rates, "measured": True} if rates else {}


def architectures(text: str) -> tuple[str, ...]:
    """Return the architectures a configuration file's JSON is for (``sm_90``). None named: any."""
    return tuple(_read(text).get("architectures", ()))


def config_files() -> dict[str, str]:
    """Return every shipped configuration file: name without ``.json`` -> text."""
    folder = resources.files("pmkernels") / "configs"
    return {f.name[: -len(".json")]: f.read_text() for f in folder.iterdir() if f.name.endswith(".json")}


# the strategies by name, which pmkernels.strategies fills and describes
TABLE: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Configs:
    """What launches and choices go by. Each field replaces what the library finds out by itself.

    ``files``: configuration files by name, as they are now. ``file``: the one that every device takes, ``None``: its
    own. ``multiprocessors``: of every device. ``runs``: whether kernels run, on every device and as if it were a GPU.
    ``auto``: the strategy that ``auto`` stands for where it supports the case; a name that is not in the table is a
    ValueError. ``launch``: gives the configuration of a launch from what was asked for and the line that fits.
    """

    files: Mapping[str, str] = field(default_factory=config_files)
    file: str | None = None
    multiprocessors: int | None = None
    runs: bool | None = None
    auto: str | None = None
    launch: Callable[[Asked, Entry], Config] | None = None

    def __post_init__(self) -> None:
        if self.auto not in (None, "auto", *TABLE):
            raise ValueError(f"auto: expected one of {', '.join(('auto', *TABLE))}, got {self.auto!r}")
        # what is read from them is cached
        object.__setattr__(self, "files", MappingProxyType(dict(self.files)))

    def entries(self, name: str) -> tuple[Entry, ...]:
        """Return the lines of a file, then those of its architectures, then the default ones."""
        files = self.files
        names = [name, *(architectures(files[name]) if name in files else ()), "default"]
        return tuple(entry for n in dict.fromkeys(names) if n in files for entry in read_entries(files[n]))

    def choices(self, name: str) -> tuple[Choice, ...]:
        """Return what a file says was measured to be fastest."""
        lines = _read(self.files[name]).get("strategies", ()) if name in self.files else ()
        return tuple(Choice(**line) for line in lines)
