"""One configuration on one case: whether it is right, and how long it takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.launches import instead_of_launches
from benchmarks.common.modes import poisoned, precision
from benchmarks.common.session import FAILED, Lost
from benchmarks.common.timing import rounded, timed
from benchmarks.tune.cases import Case, run
from benchmarks.tune.compiling import Compiler
from benchmarks.tune.judging import Prepared
from benchmarks.tune.trials import trial
from pmkernels.configs import Config


def microseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call."""
    return rounded(1e3 * timed(function, device).ms)


@dataclass
class Bench:
    """The device that candidates run on, and the compiler that runs ahead of it."""

    device: torch.device
    compiler: Compiler
    # launches on trial that took long enough to have been compiled
    slow: int = 0

    def __post_init__(self) -> None:
        self.like = torch.empty(0, dtype=torch.bfloat16, device=self.device)

    def attempt(self, config: Config, prepared: Prepared, until: float) -> str | None:
        """Run a case once with a configuration: why it cannot be used, or None. Lost if the GPU is."""
        case, spilling = prepared.case, []
        reason = self.compiler.fault(config, case, until)
        if reason is not None:
            return reason

        def watched(before: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            compiled = before(*arguments, **options)
            self.slow += time.perf_counter() - start > 0.3
            if getattr(compiled, "n_spills", 0):
                spilling.append(f"spills {compiled.n_spills} registers ({case})")
            return compiled

        try:
            with (
                precision(case.kind),
                trial(case.op, config),
                poisoned(),
                instead_of_launches(watched),
                torch.no_grad(),
            ):
                prepared.values["out"].fill_(torch.nan)
                results = run(case, prepared.values)
                self.synchronize()
        except Exception as error:
            return f"{self.survived(error)} ({case})"
        return spilling[0] if spilling else prepared.fault(results)

    def synchronize(self) -> None:
        """Wait for the GPU; an error of it that stays comes up here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def survived(self, error: Exception) -> str:
        """Say an error in a line; Lost where the GPU does not answer after it."""
        try:
            self.synchronize()
        except Exception as lost:
            raise Lost(str(lost).strip().splitlines()[0]) from error
        return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])

    def prepare(self, case: Case) -> Prepared | None:
        """Return a case on the device, or None if its memory does not suffice."""
        try:
            return Prepared.make(case, self.device)
        except torch.OutOfMemoryError:
            return None

    def microseconds(self, config: Config, prepared: Prepared) -> float:
        """Return the time of one launch with a cold L2 cache. From a CUDA graph where it can be captured."""
        case = prepared.case
        try:
            with precision(case.kind), trial(case.op, config), torch.no_grad():
                return microseconds(lambda: run(case, prepared.values), self.device)
        except Exception as error:
            self.survived(error)
            return FAILED
