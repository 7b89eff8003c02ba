"""Choosing among candidates: screened on few cases, timed on all, checked in use."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.tune.bench import Bench
from benchmarks.tune.candidates import describe
from benchmarks.tune.cases import Case
from benchmarks.tune.compiling import NOT_REACHED
from benchmarks.tune.groups import CHECKED, FINALISTS, Group
from pmkernels.configs import Config

# a configuration replaces the present one only if it is that much faster; strategies nearer than that are a tie
GAIN, TIE = 1.02, 1.02
# times each finalist is timed on each layer, in turn with the others
ROUNDS = 2


def scores(times: Mapping[Config, Mapping[Case, float]]) -> list[tuple[Config, float]]:
    """Return configurations with their mean time over the best one's, best first. The mean is geometric, of the cases'
    ratios.

    Only cases that every configuration has a time for are counted.
    """
    shared = [case for case in next(iter(times.values()), {}) if all(case in of for of in times.values())]
    if not shared:
        return []
    best = {case: min(of[case] for of in times.values()) for case in shared}
    means = {
        config: math.exp(sum(math.log(of[case] / best[case]) for case in shared) / len(shared))
        for config, of in times.items()
    }
    return sorted(means.items(), key=lambda item: item[1])


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
            reason = NOT_REACHED if time.monotonic() > until else bench.attempt(config, p, until)
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
        reasons: dict[Config, str | None] = {}
        for config in group.times:
            reasons[config] = NOT_REACHED if time.monotonic() > until else bench.attempt(config, p, until)
        if any(reason is not None and reason.startswith(NOT_REACHED) for reason in reasons.values()):
            break
        for config, reason in reasons.items():
            if reason is not None:
                group.rejected[config] = reason
                del group.times[config]
        rounds: dict[Config, list[float]] = {config: [] for config in group.times}
        for _ in range(ROUNDS):
            for config in group.times:
                rounds[config].append(bench.microseconds(config, p))
        for config, times in rounds.items():
            group.times[config][case] = min(times)
    measured = len(next(iter(group.times.values()), {}))
    if measured and 2 * measured >= len(group.cases):
        group.state = "timed"


def decide(group: Group, bench: Bench, until: float) -> None:
    """Take the fastest candidate that is right wherever it will be used."""
    for config in better(group.times, group.present):
        reason: str | None = None
        for case in group.checks:
            p = bench.prepare(case)
            reason = NOT_REACHED if p is None or time.monotonic() > until else bench.attempt(config, p, until)
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
