"""The layers of the serving suite: preference_linear beside F.linear. Each image has a preference; the cache is cold or
warm.

The bound of a layer counts its operations and bytes (:func:`pmkernels.costs.bound`) at the rates of the same run, and x
read once more: the product with B comes before the one with A.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import make_served
from benchmarks.common.rows import Json, LayerRow, dtype_name
from benchmarks.common.timing import COLD, WARM, Effort, quantiles, replay_times, replayed, rounded
from benchmarks.common.towers import RANK, TASKS, TINY, TOWERS, Layer
from pmkernels import costs, dispatch, launch, reference, strategies

OP = "serving layer"
LIMIT = "limit: F.linear"
ADDED = "F.linear, then addmm"
CHOICES = ("fused", "streamed", "auto")
ITEMS = (1, 8, 32)


@dataclass(kw_only=True)
class ServedRow(LayerRow):
    """One variant of one projection at a preference per image. ``cache``: cold or warm when it starts."""

    model: str
    projection: str
    items: int
    cache: str
    calls: int = 0


def bound_ms(layer: Layer, rates: Json | None, dtype: torch.dtype) -> float | None:
    """Return the milliseconds that no kernel can be faster than, at rates of :mod:`benchmarks.common.ceilings`."""
    if rates is None:
        return None
    kind = launch.precision_kind(dtype)
    problem = costs.Problem(layer.rows, layer.n, layer.d, 0, RANK, kind, per_row=True)
    return rounded(1e3 * costs.served_seconds(problem, rates[dtype_name(dtype)], rates["copy"]))


def variants(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return F.linear, the same with t·Aᵀ added by the library, and preference_linear in each strategy."""
    x, weight, bias = values["x"], values["weight"], values["bias"]
    wide, low = pmkernels.widen_weight(weight, values["A"]), values["B"].to(x.dtype).t().contiguous().t()

    def preference(strategy: str) -> Callable[[], Tensor]:
        return lambda: pmkernels.preference_linear(x, wide, values["G"], low, values["gamma"], bias, strategy=strategy)

    def added() -> Tensor:
        core = reference.preference_core(values["G"], values["gamma"][:, 0])
        t = (x @ low).to(core.dtype) @ core.transpose(1, 2)
        y = F.linear(x, weight, bias)
        rows = y.view(-1, y.shape[-1])
        up = wide[:, x.shape[-1] :][:, : t.shape[-1]].t()
        return rows.addmm_(t.to(x.dtype).view(len(rows), -1), up).view_as(y)

    strategies = CHOICES if dispatch.runs_kernels(device) else ("auto",)
    plain = {LIMIT: lambda: F.linear(x, weight, bias), ADDED: added}
    return {**plain, **{strategy: preference(strategy) for strategy in strategies}}


def layer_rows(
    model: str, layer: Layer, dtype: torch.dtype, device: torch.device, effort: Effort, rates: Json | None
) -> Iterator[ServedRow]:
    """Yield a row of every variant, with a cold and a warm cache."""
    values = make_served(layer, TASKS, RANK, dtype, device)
    in_double = {name: v.double() for name, v in values.items()}
    exact = reference.pareto_linear(**in_double)
    exact_plain = F.linear(in_double["x"], in_double["weight"], in_double["bias"])
    plain_error = relative_error([reference.pareto_linear(**values)], [exact])
    title, projection = f"{layer.name}, {layer.items} image{'s' if layer.items > 1 else ''}", layer.name
    about: dict[str, Any] = {"op": OP, "layer": title, "dtype": dtype_name(dtype), "model": model, "cache": COLD}
    about |= {"projection": projection.removeprefix(f"{model} "), "items": layer.items, "rows": layer.rows}
    about |= {"tasks": TASKS, "bound_ms": bound_ms(layer, rates, dtype)}
    ready: dict[str, Callable[[], Any]] = {}
    rows = []
    for name, function in variants(values, device).items():
        row = ServedRow(variant=name, **about)
        rows.append(row)
        try:
            right = row.judge(relative_error([function()], [exact_plain if name == LIMIT else exact]), plain_error)
            row.chosen = None if name in (LIMIT, ADDED) else _chosen(values["x"], layer, name)
            if right:
                ready[name], row.graph = replayed(function, device)
        except Exception as error:
            row.fail(error)
    for cache in (COLD, WARM):
        times = replay_times(ready, effort, device, cache)
        for row in rows:
            timed_row = replace(row, cache=cache)
            if row.variant in times:
                figures = quantiles(times[row.variant])
                timed_row.note({name: value for name, value in figures.items() if name != "p99"})
            yield timed_row


def _chosen(x: Tensor, layer: Layer, strategy: str) -> str:
    if x.device.type != "cuda":
        return "eager" if strategy == "auto" else strategy
    return strategies.choose("preference", strategy, x, rows=layer.rows, n=layer.n, d=layer.d, rank=RANK, tasks=0)


def projections(quick: bool) -> Iterator[tuple[str, Layer]]:
    """Yield the tower's name and its in- and out-projection, for each number of images."""
    for tower in (TINY,) if quick else TOWERS:
        for items in ITEMS[:2] if quick else ITEMS:
            for layer in tower.block_layers(items)[:2]:
                yield tower.name, layer
