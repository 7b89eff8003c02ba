"""The launches of all calls, recorded instead of run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.budget.calls import call, cases, other_calls, preference_calls
from benchmarks.common.launches import Launch, instead_of_launches
from pmkernels import configs, dispatch
from pmkernels.configs import Asked, Config, Entry


@dataclass(frozen=True)
class Wanted:
    """One distinct launch to be compiled, and the first call that it is of."""

    launch: Launch
    case: str
    dtype: str

    @property
    def configuration(self) -> str:
        """Return the tiles, warps and stages in a few letters."""
        parts = [
            f"{name.lower().removeprefix('block_')}{value}"
            for name, value in self.launch.decoded_options.items()
            if name.startswith("BLOCK_") or name in ("num_warps", "num_stages")
        ]
        return " ".join(parts).replace("num_warps", "w").replace("num_stages", "s")


@contextmanager
def _recording(file: str, launches: dict[Launch, Wanted], used: set[str]) -> Iterator[list[str]]:
    """Record what would be launched on a GPU of that configuration file. Yields what it is for: [case, dtype]."""
    now = ["", ""]

    def note(_: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch.of(kernel, arguments, options)
        launches.setdefault(launch, Wanted(launch, *now))

    def noting(_: Asked, entry: Entry) -> Config:
        used.add(repr(entry))
        return entry.config

    force = replace(dispatch.in_force(), file=file, runs=True, launch=noting)
    with instead_of_launches(note), dispatch.using(force):
        yield now


def record(file: str) -> tuple[list[Wanted], list[str]]:
    """Return the distinct launches with a configuration file, and its unused entries."""
    launches: dict[Launch, Wanted] = {}
    used: set[str] = set()
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        with _recording(file, launches, used) as now:
            for case in cases():
                now[:] = [str(case), case.dtype]
                call(case)
            for what in preference_calls():
                now[:] = what
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            now[:] = ["other shapes", "any"]
            other_calls()
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    own = configs.read_entries(dispatch.in_force().files[file])
    return list(launches.values()), [repr(e) for e in own if repr(e) not in used]
