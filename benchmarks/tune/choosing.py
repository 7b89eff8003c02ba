"""Choosing among candidates: run and judged on few cases, timed on all, checked in use."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.common.launches import instead_of_launches
from benchmarks.common.modes import poisoned, precision
from benchmarks.common.session import FAILED, Lost
from benchmarks.common.timing import rounded, timed
from benchmarks.tune.cases import Case, Prepared, run
from benchmarks.tune.compiling import NOT_REACHED, Compiler, trial
from benchmarks.tune.groups import CHECKED, FINALISTS, Group, describe
from pmkernels.configs import Config

# a configuration replaces the present one only if it is that much faster; strategies nearer than that are a tie
GAIN, TIE = 1.02, 1.02
# times each finalist is timed on each layer, in turn with the others
ROUNDS = 2


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

    def attempt(self, config: Config, prepared: Prepared, until: float) -> str | None:
        """Run a case once with a configuration: why it cannot be used, or None. Lost if the GPU is."""
        case, spilling = prepared.case, []
        reason = NOT_REACHED if time.monotonic() > until else self.compiler.fault(config, case, until)
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


def scores(times: Mapping[Config, Mapping[Case, float]]) -> list[tuple[Config, float]]:
    """Return configurations with their mean time over the best one's, best first. The mean is geometric, of the cases'
    ratios.

    Only cases that every configuration has a time for are counted.
    """
    shared = [case for case in next(iter(times.values()), {}) if all(case in of for of in times.values())]
    if not shared:
        return []
    best = {case: min(of[case] for of in times.values()) for case in shared}
    means = [(config, geometric_mean(of[case] / best[case] for case in shared)) for config, of in times.items()]
    return sorted(means, key=lambda item: item[1])


def better(times: Mapping[Config, Mapping[Case, float]], present: Config) -> list[Config]:
    """Return the configurations at least GAIN times as fast as the present one, best first. All, if it has no time."""
    ranked = scores(times)
    limit = dict(ranked).get(present, math.inf)
    return [config for config, score in ranked if config != present and score * GAIN <= limit]


def screen(group: Group, bench: Bench, until: float) -> None:
    """Try every candidate on the first few cases, as far as time goes."""
    prepared = [p for case in group.screen if (p := bench.prepare(case)) is not None]
    for config in group.candidates if prepared else ():
        times: dict[Case, float] = {}
        for p in prepared:
            reason = bench.attempt(config, p, until)
            if reason is not None:
                group.rejected[config] = reason
                break
            times[p.case] = bench.microseconds(config, p)
        else:
            group.screened[config] = times


def finalists(group: Group) -> list[Config]:
    """Return the fastest of the screening, and the present one. Nothing where that was not reached."""
    if group.rejected.get(group.present, "").startswith(NOT_REACHED):
        return []
    fastest = [config for config, _ in scores(group.screened)][:FINALISTS]
    return fastest if group.present in fastest or group.present in group.rejected else [*fastest, group.present]


def final(group: Group, bench: Bench, until: float) -> None:
    """Time the finalists on every case, in turn. A change of clocks then touches them alike."""
    group.times = {config: {} for config in finalists(group)}
    for case in group.cases:
        p = bench.prepare(case)
        if p is None:
            continue
        reasons = {config: bench.attempt(config, p, until) for config in group.times}
        faulty = {config: reason for config, reason in reasons.items() if reason is not None}
        if any(reason.startswith(NOT_REACHED) for reason in faulty.values()):
            break
        group.rejected |= faulty
        for config in faulty:
            del group.times[config]
        rounds = [{config: bench.microseconds(config, p) for config in group.times} for _ in range(ROUNDS)]
        for config, times in group.times.items():
            times[case] = min(each[config] for each in rounds)
    measured = len(next(iter(group.times.values()), {}))
    if measured and 2 * measured >= len(group.cases):
        group.state = "timed"


def decide(group: Group, bench: Bench, until: float) -> None:
    """Take the fastest candidate that is right wherever it will be used."""
    for config in better(group.times, group.present):
        reason: str | None = None
        for case in group.checks:
            p = bench.prepare(case)
            reason = NOT_REACHED if p is None else bench.attempt(config, p, until)
            if reason is not None:
                break
        if reason is None:
            group.chosen, group.state = config, "tuned"
            return
        if reason.startswith(NOT_REACHED):
            group.state = f"{NOT_REACHED}: no time or memory left to check {describe(config)}"
            return
        group.rejected[config] = reason
    group.state = "as before" if group.present not in group.rejected else f"rejected: {group.rejected[group.present]}"


def tune(batch: Sequence[Group], bench: Bench, until: float, say: Callable[[str], None]) -> None:
    """Screen, time and decide a batch of groups. Kernels of the next group are compiled meanwhile."""
    compiler, start = bench.compiler, time.monotonic()

    def by(group: Group, begin: float, end: float) -> float:
        """Return when a group has to be through a part of the batch's time."""
        return start + (until - start) * (begin + (end - begin) * (batch.index(group) + 1) / len(batch))

    for group in batch:
        for config in group.candidates:
            compiler.submit(config, group.screen)
    for group in batch:
        screen(group, bench, by(group, 0.0, 0.5))
        for config in finalists(group):
            compiler.submit(config, group.cases)
    for group in batch:
        final(group, bench, by(group, 0.5, 0.85))
        if group.state == "timed":
            for config in better(group.times, group.present)[:CHECKED]:
                compiler.submit(config, group.checks)
    for group in batch:
        if group.state == "timed":
            decide(group, bench, until)
        say(f"{group.name}: {group.state}" + (f", {describe(group.chosen)}" if group.chosen is not None else ""))
