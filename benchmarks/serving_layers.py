"""The layers of the serving suite: preference_linear beside F.linear, a preference per image, cold and warm cache.

The bound of a layer counts its operations and bytes (:func:`pmkernels.costs.bound`) at the rates of the same run, and x
read once more: the product with B comes before the one with A.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks import limits
from benchmarks.kernels import TOLERANCE, Layer, relative_error
from benchmarks.layers import captured, rounded
from benchmarks.serving_baselines import RANK, TASKS
from pmkernels import costs, dispatch, reference
from pmkernels.launch import precision_kind
from pmkernels.strategies import choose

OP = "serving layer"
LIMIT = "limit: F.linear"
ADDED = "F.linear, then addmm"
CHOICES = ("fused", "streamed", "auto")
ITEMS = (1, 8, 32)
COLD, WARM = "cold", "warm"
# GPU cycles, about as long as the cache is written for a cold one: both times then start with the GPU busy, and none
# waits for the host
WAIT = 100_000
FAILED = 1e30
TINY = limits.Tower("tiny ViT", 32, 2, 5, 4, 8)


@dataclass(frozen=True)
class Effort:
    """How long each variant is measured: at least ``fewest`` calls, then until ``seconds`` or ``most`` of them.

    ``flushed``: bytes that are written before a call that is to find a cold cache.
    """

    fewest: int
    most: int
    seconds: float
    flushed: int = 2**28

    def suffices(self, times: Sequence[float]) -> bool:
        """Whether these milliseconds are enough."""
        if len(times) < self.fewest:
            return False
        return len(times) >= self.most or sum(times) >= 1e3 * self.seconds


def quantiles(times: Sequence[float]) -> dict[str, Any]:
    """Median, 20th, 80th and 99th percentile, and of how many."""
    points = torch.tensor([0.5, 0.2, 0.8, 0.99], dtype=torch.float64)
    values = torch.tensor(times, dtype=torch.float64).quantile(points).tolist()
    return {**dict(zip(("ms", "p20", "p80", "p99"), map(rounded, values), strict=True)), "calls": len(times)}


@dataclass
class Row:
    """One variant of one projection at a preference per image; ``cache``: cold or warm when it starts.

    ``chosen``: the strategy, also what ``auto`` stands for. ``bound_ms``: of the operation with preferences, at rates
    measured in the same run.
    """

    op: str
    layer: str
    dtype: str
    variant: str
    error: float
    plain_error: float
    matched: bool
    model: str
    projection: str
    items: int
    rows: int
    cache: str
    chosen: str | None = None
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    calls: int = 0
    bound_ms: float | None = None
    reason: str | None = None


def layer_values(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random parts of a folded projection, inputs [items, tokens, D] and a preference per item."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0, into: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, into)

    width = layer.d**-0.5
    return {
        "x": make(layer.items, layer.tokens, layer.d, into=dtype),
        "weight": make(layer.n, layer.d, scale=width, into=dtype),
        "A": make(layer.n, RANK),
        "G": make(RANK, RANK, TASKS, scale=0.1),
        "B": make(layer.d, RANK, scale=width),
        "gamma": torch.softmax(make(layer.items, 1, TASKS), dim=-1),
        "bias": make(layer.n, into=dtype),
    }


def replay_times(
    functions: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device, cache: str
) -> dict[str, list[float]]:
    """Milliseconds of every call, in turn, each from a cache that holds other data, or what the call itself left."""
    flushed = torch.empty(effort.flushed if cache == COLD else 0, dtype=torch.int8, device=device)
    found: dict[str, list[float]] = {name: [] for name in functions}
    left = list(functions)
    while left:
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
                found[name].append(1e3 * (time.perf_counter() - start))
        if events:
            torch.cuda.synchronize()
        for name, (before, after) in events.items():
            found[name].append(before.elapsed_time(after))
        left = [name for name in left if not effort.suffices(found[name])]
    return found


def bound_ms(layer: Layer, rates: Mapping[str, float] | None, dtype: torch.dtype) -> float | None:
    """Milliseconds that no kernel can be faster than, at rates as :func:`benchmarks.kernels.ceilings` measures them."""
    if rates is None:
        return None
    problem = costs.Problem(layer.items * layer.tokens, layer.n, layer.d, 0, RANK, precision_kind(dtype), per_row=True)
    operations = rates[str(dtype).removeprefix("torch.")]
    return rounded(1e3 * costs.served_seconds(problem, operations, rates["copy"]))


def layer_rows(
    model: str,
    layer: Layer,
    dtype: torch.dtype,
    device: torch.device,
    effort: Effort,
    rates: Mapping[str, float] | None,
) -> Iterator[Row]:
    """F.linear, t·Aᵀ added to it by the library, and preference_linear in each strategy that runs here, with a cold and
    a warm cache."""
    values = layer_values(layer, dtype, device)
    in_double = {name: v.double() for name, v in values.items()}
    exact = reference.pareto_linear(**in_double)
    exact_plain = F.linear(in_double["x"], in_double["weight"], in_double["bias"])
    plain_error = relative_error([reference.pareto_linear(**values)], [exact])
    x, weight, bias = values["x"], values["weight"], values["bias"]
    wide, low = pmkernels.widen_weight(weight, values["A"]), values["B"].to(dtype).t().contiguous().t()

    def preference(strategy: str) -> Callable[[], Tensor]:
        return lambda: pmkernels.preference_linear(x, wide, values["G"], low, values["gamma"], bias, strategy=strategy)

    def added() -> Tensor:
        core = reference.preference_core(values["G"], values["gamma"][:, 0])
        t = (x @ low).to(core.dtype) @ core.transpose(1, 2)
        y = F.linear(x, weight, bias)
        rows = y.view(-1, layer.n)
        return rows.addmm_(t.to(dtype).view(len(rows), -1), wide[:, layer.d :][:, : t.shape[-1]].t()).view_as(y)

    strategies = CHOICES if dispatch.runs_kernels(device) else ("auto",)
    variants: dict[str, Callable[[], Tensor]] = {LIMIT: lambda: F.linear(x, weight, bias)}
    variants |= {ADDED: added, **{strategy: preference(strategy) for strategy in strategies}}
    ready: dict[str, Callable[[], Any]] = {}
    rows = []
    for name, function in variants.items():
        row = Row(
            OP,
            f"{layer.name}, {layer.items} image{'s' if layer.items > 1 else ''}",
            str(dtype).removeprefix("torch."),
            name,
            0.0,
            rounded(plain_error),
            True,
            model=model,
            projection=layer.name.removeprefix(f"{model} "),
            items=layer.items,
            rows=layer.items * layer.tokens,
            cache=COLD,
            bound_ms=bound_ms(layer, rates, dtype),
        )
        rows.append(row)
        try:
            row.error = rounded(relative_error([function()], [exact_plain if name == LIMIT else exact]))
            row.matched = row.error <= TOLERANCE * plain_error + 1e-6
            row.chosen = None if name in (LIMIT, ADDED) else _chosen(x, layer, name)
            if row.matched:
                graph = captured(lambda function=function: [function()]) if device.type == "cuda" else None  # type: ignore[misc]
                ready[name] = function if graph is None else graph.replay
        except Exception as error:
            row.matched, row.error, row.reason = False, FAILED, f"{type(error).__name__}: {error}"[:300]
    for cache in (COLD, WARM):
        times = replay_times(ready, effort, device, cache)
        for row in rows:
            found = copy.copy(row)
            found.cache = cache
            for figure, value in quantiles(times[row.variant]).items() if row.variant in times else ():
                if figure != "p99":
                    setattr(found, figure, value)
            yield found


def _chosen(x: Tensor, layer: Layer, strategy: str) -> str:
    if x.device.type != "cuda":
        return "eager" if strategy == "auto" else strategy
    rows = layer.items * layer.tokens
    return choose("preference", strategy, x, rows=rows, n=layer.n, d=layer.d, rank=RANK, tasks=0)


def projections(quick: bool) -> Iterator[tuple[str, Layer]]:
    """The tower's name and its in- and out-projection, for each number of images."""
    for tower in (TINY,) if quick else limits.TOWERS:
        for items in ITEMS[:2] if quick else ITEMS:
            for layer in tower.block_layers(items)[:2]:
                yield tower.name, layer


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per layer and cache: µs of the limit, and of each variant with its ratio to the limit and the bound."""
    names = [name for name in (ADDED, *CHOICES) if any(row["variant"] == name for row in rows)]
    bounded = any(row["bound_ms"] is not None for row in rows)
    columns = ["layer", "cache", "limit µs", *(["bound µs"] if bounded else [])]
    columns += [f"{name} µs (to limit{', bound' if bounded else ''})" for name in names]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["cache"]), {})[row["variant"]] = row
    for (layer, cache), group in groups.items():
        limit = group.get(LIMIT, {"ms": None})["ms"]
        cells = [layer, cache, f"{1e3 * limit:.1f}" if limit else "–"]
        cells += [f"{1e3 * next(iter(group.values()))['bound_ms']:.1f}"] if bounded else []
        cells += [_cell(group.get(name), limit) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None, limit: float | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return f"wrong: error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}"
    about = [row["chosen"]] if row["variant"] == "auto" else []
    about += [f"{row['ms'] / other:.2f}×" for other in (limit, row["bound_ms"]) if other]
    return f"{1e3 * row['ms']:.1f} ({', '.join(about)})"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """One image, cold beside warm: a bar per variant and projection, the bound as a line across it."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["items"] == 1 and row["ms"]]
    if not shown:
        return []
    layers = list(dict.fromkeys((row["model"], row["projection"]) for row in shown))
    names = list(dict.fromkeys(row["variant"] for row in shown))
    with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(4.0, 1.9 * len(layers)), 2.9), dpi=200, layout="constrained")
        panels = figure.subplots(1, len(layers), squeeze=False).flatten()
        for panel, (model, projection) in zip(panels, layers, strict=True):
            own = [row for row in shown if (row["model"], row["projection"]) == (model, projection)]
            for number, name in enumerate(names):
                for place, cache in enumerate((COLD, WARM)):
                    for row in own:
                        if (row["variant"], row["cache"]) == (name, cache):
                            at = place + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                            error = [[1e3 * (row["ms"] - row["p20"])], [1e3 * (row["p80"] - row["ms"])]]
                            style: dict[str, Any] = {"color": f"C{number}", "width": 0.8 / len(names)}
                            style["label"] = name if place == 0 else None
                            panel.bar(at, 1e3 * row["ms"], yerr=error, error_kw={"linewidth": 0.6}, **style)
            if own[0]["bound_ms"]:
                panel.axhline(1e3 * own[0]["bound_ms"], color="black", linewidth=0.8, linestyle="--", label="bound")
            panel.set(title=f"{model}\n{projection}", xticks=[0, 1], xticklabels=[COLD, WARM])
        panels[0].set_ylabel("one image (µs)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)
    return [path]
