"""Timers of one call with a cold cache, whole steps, and several functions in turn."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pmkernels.graphs import capture, warm_up

# milliseconds of repetitions of one variant; the layer grid has fifteen hundred
WARMUP, REPETITIONS = 2, 8


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call: median, 20th and 80th percentile; ``graph``: replayed from a CUDA graph."""

    ms: float
    p20: float
    p80: float
    graph: bool = False


def rounded(value: float) -> float:
    """Round to four digits: the grid is thousands of figures in a committed file."""
    return float(f"{value:.4g}")


def replayed(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], bool]:
    """Return what replays ``function`` from a CUDA graph, and whether it does; else ``function`` itself."""
    if device.type == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
        try:
            warm_up(function, here)
            return capture(function, here)[0].replay, True
        except RuntimeError:
            # something in it cannot be captured
            torch.cuda.synchronize()
    return function, False


def free_memory(device: torch.device) -> float:
    """Return the bytes that tensors can still take on the device."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def timed(
    function: Callable[[], Any],
    device: torch.device,
    *,
    warmup: int = WARMUP,
    repetitions: int = REPETITIONS,
    graph: bool = True,
) -> Times:
    """Time a call with a cold L2 cache, from a CUDA graph if possible. Off the GPU it is called once, which measures
    nothing.

    ``warmup``, ``repetitions``: milliseconds before the first time, and of all times.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        ms = 1e3 * (time.perf_counter() - start)
        return Times(ms, ms, ms)
    from triton.testing import do_bench

    call, in_graph = replayed(function, device) if graph else (function, False)
    ms, low, high = do_bench(call, warmup=warmup, rep=repetitions, quantiles=[0.5, 0.2, 0.8])
    return Times(ms, low, high, in_graph)


COLD, WARM = "cold", "warm"
# GPU cycles, about as long as the cache is written for a cold one: both times then start with the GPU busy, and none
# waits for the host
WAIT = 100_000


@dataclass(frozen=True)
class Effort:
    """How long each variant is measured. At least ``fewest`` calls, then until ``seconds`` or ``most`` of them.

    ``flushed``: bytes that are written before a call that is to find a cold cache.
    """

    fewest: int
    most: int
    seconds: float
    flushed: int = 2**28

    def suffices(self, times: Sequence[float]) -> bool:
        """Say whether these milliseconds are enough."""
        if len(times) < self.fewest:
            return False
        return len(times) >= self.most or sum(times) >= 1e3 * self.seconds


def percentiles(times: Sequence[float], *points: float) -> list[float]:
    """Return the median, the 20th and the 80th percentile. Behind them come those at ``points``, from 0 to 1."""
    at = torch.tensor([0.5, 0.2, 0.8, *points], dtype=torch.float64)
    values: list[float] = torch.tensor(times, dtype=torch.float64).quantile(at).tolist()
    return values


def quantiles(times: Sequence[float]) -> dict[str, Any]:
    """Return median, 20th, 80th and 99th percentile, and of how many."""
    values = zip(("ms", "p20", "p80", "p99"), map(rounded, percentiles(times, 0.99)), strict=True)
    return {**dict(values), "calls": len(times)}


def _rounds(times: Mapping[str, Sequence[float]], effort: Effort) -> Iterator[list[str]]:
    """Yield whom another round is for, until everyone has as many times as suffice."""
    left = list(times)
    while left:
        yield left
        left = [name for name in left if not effort.suffices(times[name])]


def replay_times(
    functions: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device, cache: str
) -> dict[str, list[float]]:
    """Return the milliseconds of every call, in turn. The cache holds other data, or what the call left."""
    flushed = torch.empty(effort.flushed if cache == COLD else 0, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for left in _rounds(times, effort):
        events = {}
        for name in left:
            function = functions[name]
            if cache == COLD:
                flushed.zero_()
            else:
                function()
            if device.type == "cuda":
                if cache == WARM:
                    torch.cuda._sleep(WAIT)
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                function()
                after.record()
                events[name] = before, after
            else:
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
        if events:
            torch.cuda.synchronize()
        for name, (before, after) in events.items():
            times[name].append(before.elapsed_time(after))
    return times


def suite_device(suite: str, quick: bool) -> torch.device:
    """Return the GPU that a suite is measured on. A rehearsal goes to the CPU where there is none."""
    if not quick and not torch.cuda.is_available():
        raise SystemExit(f"--suite {suite}: expected a CUDA GPU, got none (--quick rehearses it on the CPU)")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_turn(
    functions: Mapping[str, Callable[[int], Any]],
    effort: Effort,
    device: torch.device,
    look: Callable[[str, int, Any], None],
) -> dict[str, list[float]]:
    """Return the milliseconds of every call, by name: one of each function per round. Each round begins with another,
    so that a machine that slows down slows all of them down.

    A function is given the number of the round; what it returns goes to ``look`` after the clock has stopped.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number, left in enumerate(_rounds(times, effort)):
        first = number % len(left)
        for name in left[first:] + left[:first]:
            synchronize(device)
            start = time.perf_counter()
            result = functions[name](number)
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
            look(name, number, result)
    return times


def timed_steps(step: Callable[[], None], device: torch.device, seconds: float) -> dict[str, float]:
    """Time steps one after the other: median, 20th and 80th percentile, and the host's time."""
    hosts: list[float] = []
    whole = 0.0
    # a slow step is not repeated just to see how long the host takes
    while len(hosts) < 3 and whole < 0.2:
        synchronize(device)
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        synchronize(device)
        whole = time.perf_counter() - start
    repeats = max(3, min(50, round(seconds / max(whole, 1e-6))))
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    else:
        # a rehearsal
        times = [1e3 * host for host in hosts]
    median, low, high = percentiles(times)
    return {"ms": median, "p20": low, "p80": high, "host_ms": 1e3 * statistics.median(hosts)}


class Clock:
    """Progress lines with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it."""
        self.lines.append(f"{time.perf_counter() - self.start:6.1f} s  {text}")
        print(self.lines[-1], flush=True)
