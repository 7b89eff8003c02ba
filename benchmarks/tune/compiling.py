"""Configurations on trial, instead of the library's, and their kernels compiled beforehand, on every core."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.budget.calls import Wanted
from benchmarks.budget.compiling import ARCHITECTURES, measure
from benchmarks.common.launches import Launch, instead_of_launches
from benchmarks.common.modes import precision
from benchmarks.tune.cases import Case, inputs, run
from pmkernels import dispatch
from pmkernels.configs import Asked, Config, Entry

NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Target:
    """What compiling for a GPU takes: capability, multiprocessors, and the configuration file in use."""

    capability: int
    multiprocessors: int
    name: str


@contextmanager
def trial(op: str, config: Config | None) -> Iterator[None]:
    """Launch ``op`` with ``config``; None: as configured."""
    before = dispatch.in_force()

    def forced(asked: Asked, entry: Entry) -> Config:
        if config is not None and asked.op == op:
            return config
        return entry.config if before.launch is None else before.launch(asked, entry)

    with dispatch.using(replace(before, launch=forced)):
        yield


@contextmanager
def active(name: str, text: str | None = None) -> Iterator[None]:
    """Use the configuration file ``name`` on every device; with ``text``, that is what it says."""
    files = {**dispatch.in_force().files, **({} if text is None else {name: text})}
    with dispatch.using(replace(dispatch.in_force(), files=files, file=name)):
        yield


def launches(case: Case, config: Config | None, target: Target) -> list[Launch]:
    """Record what a case would launch on that GPU. On the meta device nothing is computed or allocated."""
    recorded: list[Launch] = []

    def note(_: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append(Launch.of(kernel, arguments, options))

    on_gpu = dispatch.using(replace(dispatch.in_force(), multiprocessors=target.multiprocessors))
    with on_gpu, precision(case.kind), trial(case.op, config), instead_of_launches(note), torch.no_grad():
        run(case, inputs(case, torch.device("meta")))
    return recorded


def _compile(launch: Launch, case: Case, target: Target) -> list[str]:
    """Compile a launch, in a worker, and say what is wrong with it."""
    name = f"sm_{target.capability}"
    known = ARCHITECTURES.get(name)
    arch = known or replace(ARCHITECTURES["sm_90"], name=name, capability=target.capability)
    wanted = Wanted(launch, str(case), case.dtype if case.kind == "16-bit" else case.kind)
    faults = measure([wanted], arch)[0].faults
    # of an architecture whose limits are not known, only what the compiler itself says
    return [fault for fault in faults if known is not None or fault.startswith("does not compile")]


class Compiler:
    """A compiler of launches in processes forked before CUDA is in use. Triton's cache on disk has them when they are
    timed.

    Without processes (``jobs`` = 0), and where one of them fails, a kernel is compiled by its first launch.
    """

    def __init__(self, jobs: int) -> None:
        self.pool = ProcessPoolExecutor(jobs, mp_context=get_context("fork")) if jobs else None
        self.futures: dict[Launch, Future[list[str]]] = {}
        self.keys: dict[tuple[Config | None, Case], list[Launch]] = {}
        self.target: Target | None = None
        self.failed = ""
        if self.pool is not None:
            # all processes are forked by the first task
            self.pool.submit(int).result()

    def submit(self, config: Config | None, cases: Iterable[Case]) -> None:
        """Begin to compile what these cases launch, but for what was begun before."""
        if self.pool is None or self.target is None or self.failed:
            return
        try:
            for case in cases:
                self.keys[config, case] = launches(case, config, self.target)
                for launch in self.keys[config, case]:
                    if launch not in self.futures:
                        self.futures[launch] = self.pool.submit(_compile, launch, case, self.target)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"

    def fault(self, config: Config | None, case: Case, until: float) -> str | None:
        """Wait for what a case launches: why it cannot be used, or None."""
        for launch in self.keys.get((config, case), ()):
            try:
                faults = self.futures[launch].result(timeout=max(until - time.monotonic(), 0.01))
            except TimeoutError:
                return f"{NOT_REACHED}: still compiling"
            except Exception as error:
                self.failed = f"{type(error).__name__}: {error}"
                return None
            if faults:
                return f"{faults[0]} ({case})"
        return None

    def close(self) -> None:
        """Drop what was not compiled."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
