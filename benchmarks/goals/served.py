"""Projections and a block of the served model at a preference per image."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.errors import relative_error
from benchmarks.common.layer_case import Source
from benchmarks.common.rows import LayerRow, dtype_name
from benchmarks.common.timing import COLD, WARM, Effort, quantiles, replay_times, replayed
from benchmarks.common.towers import BATCH, Layer, Tower
from benchmarks.goals.context import Context
from benchmarks.serving.layers import ServedRow, layer_rows

BLOCK, PLAIN_BLOCK = "a served block", "the plain block"
EFFORT, QUICK_EFFORT = Effort(100, 100, 0.0), Effort(2, 2, 0.0, flushed=0)


def layers(context: Context) -> None:
    """Measure projections of attention and a whole block, with cold and warm cache. Batches are 32 images and one."""
    tower, effort = context.tower, QUICK_EFFORT if context.quick else EFFORT
    for items in (3, 1) if context.quick else (BATCH, 1):
        for layer in tower.block_layers(items)[:2]:
            name = f"served-layers/{layer.name}, {items} image{'s' if items > 1 else ''}"
            context.session.measure(name, functools.partial(_projection, context, tower, layer, effort), 3)
    context.session.measure("served-layers/block", lambda: _blocks(context, effort), 20)


def _projection(context: Context, tower: Tower, layer: Layer, effort: Effort) -> Iterator[ServedRow]:
    rates = context.rates if context.on_gpu else None
    with torch.no_grad():
        yield from layer_rows(tower.name, layer, context.dtype, context.device, effort, rates)


@torch.no_grad()
def _blocks(context: Context, effort: Effort) -> Iterator[LayerRow]:
    """Measure the block in the middle at a preference per image, beside a merged one."""
    # it needs pydantic and open_clip, which projections do without
    from benchmarks.goals.serving import shared_case

    tower, items, case = context.tower, 3 if context.quick else BATCH, shared_case(context)()
    source = Source(context.device, seed=4)
    x = source.normal(items, tower.tokens, tower.width, dtype=case.dtype)
    run, exact, allowed = _two_blocks(case.folded, x)
    rows, ready = {}, {}
    for name, function in run.items():
        row = LayerRow(layer=f"{tower.name} block", dtype=dtype_name(case.dtype), variant=name, rows=x[..., 0].numel())
        row.judge(relative_error([function()], [exact[name]]), allowed, wrong="wrong output")
        ready[name], row.graph = replayed(function, context.device)
        rows[name] = row
    for cache in (COLD, WARM):
        times = replay_times(ready, effort, context.device, cache)
        for name, row in rows.items():
            figures = quantiles(times[name]) if row.matched else {}
            shown = {figure: value for figure, value in figures.items() if figure in ("ms", "p20", "p80")}
            yield replace(row, variant=f"{name}, {cache}", **shown)


def _two_blocks(folded: nn.Module, x: Tensor) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor], float]:
    """Return both blocks' calls on x, their float64 results, and the folded one's error."""
    from benchmarks.serving.folded import preferences
    from pareto_merging import merge
    from pareto_merging.serving.layers import serve_layers

    gammas = preferences(len(x))[0].to(x.device)
    served, merged = copy.deepcopy(folded), merge(folded, gammas[0])
    serve_layers(served)
    block, plain = _middle_block(served, gammas), _middle_block(merged)
    exact = {
        BLOCK: _middle_block(copy.deepcopy(folded).double(), gammas.double())(x.double()),
        PLAIN_BLOCK: _middle_block(copy.deepcopy(merged).double())(x.double()),
    }
    loose = _middle_block(copy.deepcopy(folded), gammas)(x)
    return {PLAIN_BLOCK: lambda: plain(x), BLOCK: lambda: block(x)}, exact, relative_error([loose], [exact[BLOCK]])


def _middle_block(model: nn.Module, gammas: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the block in the middle. Each image has a preference where they are given."""
    from pareto_merging import set_preference

    if gammas is not None:
        set_preference(model, gammas)
    blocks: Any = model.get_submodule("transformer.resblocks")
    block: Callable[[Tensor], Tensor] = blocks[len(blocks) // 2]
    return block
