"""What a GPU does at best: everything else is set against these figures."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.modes import precision
from benchmarks.common.rows import dtype_name
from benchmarks.common.timing import replayed, rounded, timed

# milliseconds of a large copy or product: before its times, and of them
WARMUP, REPETITIONS = 25, 100


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    return 1e-3 * timed(function, device, warmup=WARMUP, repetitions=REPETITIONS, graph=False).ms


def _product_rate(dtype: torch.dtype, device: torch.device, quick: bool) -> float:
    """Return the operations per second of a large product of random matrices."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """Measure the bytes per second of a large copy, and operations per second by type."""
    source = torch.randn(2**10 if quick else 2**29, device=device)
    target = torch.empty_like(source)
    rates = {"copy": 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device)}
    types = (torch.float32, torch.bfloat16, torch.float16)
    return rates | {dtype_name(dtype): _product_rate(dtype, device, quick) for dtype in types}


def measured_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Measure the fields of :class:`pmkernels.costs.Rates`. L2's is a slope, of two copies that stay in it."""
    with precision("float32"):
        measured = ceilings(device, quick)
    with precision("tf32"):
        tf32 = _product_rate(torch.float32, device, quick)
    rates = {"half": measured["bfloat16"], "tf32": tf32, "float32": measured["float32"], "memory": measured["copy"]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rates["multiprocessors"] = properties.multi_processor_count
        cache = int(getattr(properties, "L2_cache_size", 0))
        one = torch.zeros(1, device=device)
        rates["launch"] = _warm_seconds(lambda: one.add_(1))
        if cache:
            seconds = {}
            for count in (cache // 64, cache // 16):
                source = torch.randn(count, device=device)
                target = torch.empty_like(source)
                seconds[8 * count] = _warm_seconds(lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
            (few, short), (many, long) = seconds.items()
            if long > short:
                # below the rate of memory it would be no rate of a cache
                rates["cache"] = max((many - few) / (long - short), measured["copy"])
            rates["cache_bytes"] = cache
    return {name: value if name == "multiprocessors" else rounded(value) for name, value in rates.items()}


def _warm_seconds(function: Callable[[], Any], times: int = 50, replays: int = 20) -> float:
    """Return the seconds of one of many calls in a graph, with a warm cache."""
    device = torch.device("cuda", torch.cuda.current_device())
    repeat, _ = replayed(lambda: [function() for _ in range(times)], device)
    repeat()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        repeat()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / (times * replays)
