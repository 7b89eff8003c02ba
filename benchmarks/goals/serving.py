"""A preference for each image: projections and a block of the served model, then the engine as a user calls it."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import limits
from benchmarks import serving_layers as projections
from benchmarks.common.session import Once
from benchmarks.goals.context import Context, Row, dtype_name, suite
from benchmarks.kernels import TOLERANCE, Layer, relative_error
from benchmarks.layers import captured, rounded
from benchmarks.serving_layers import COLD, WARM, Effort, quantiles, replay_times

if TYPE_CHECKING:
    # it needs pydantic and open_clip
    from benchmarks import serving_baselines as baselines

MODEL, BATCH = "ViT-L/14", 32
BLOCK, PLAIN_BLOCK = "a served block", "the plain block"
EFFORT, QUICK_EFFORT = Effort(100, 100, 0.0), Effort(2, 2, 0.0, flushed=0)
MODEL_EFFORT = Effort(100, 200, 1.5)


def _tower(context: Context) -> limits.Tower:
    return projections.TINY if context.quick else next(tower for tower in limits.TOWERS if tower.name == MODEL)


@functools.lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="goals-serving-")


def _make_case(context: Context) -> Any:
    serving = suite("serving")
    name, encoder = (serving.TINY, serving.TINY_ENCODER) if context.quick else (MODEL, serving.ENCODERS[MODEL])
    dtype = context.dtype if context.on_gpu else torch.float32
    return serving.baselines.build_case(name, encoder, Path(_folder().name), dtype, context.device)


# the folded model is one for both groups, and goes when the second is through
_case: dict[bool, Once] = {}


def _shared_case(context: Context) -> Once:
    return _case.setdefault(context.quick, Once(functools.partial(_make_case, context)))


def layers(context: Context) -> None:
    """Measure the projections of attention at 32 images and one, and a whole block, with a cold and a warm cache."""
    tower, effort = _tower(context), QUICK_EFFORT if context.quick else EFFORT
    for items in (3, 1) if context.quick else (BATCH, 1):
        for layer in tower.block_layers(items)[:2]:
            name = f"served-layers/{layer.name}, {items} image{'s' if items > 1 else ''}"
            context.session.measure(name, functools.partial(_projection, context, tower, layer, effort), 3)
    case = _shared_case(context)
    context.session.measure("served-layers/block", lambda: _blocks(context, case(), effort), 20)


def _projection(context: Context, tower: limits.Tower, layer: Layer, effort: Effort) -> Iterator[projections.Row]:
    rates = context.rates if context.on_gpu else None
    with torch.no_grad():
        yield from projections.layer_rows(tower.name, layer, context.dtype, context.device, effort, rates)


def _blocks(context: Context, case: baselines.Case, effort: Effort) -> Iterator[Row]:
    """The block in the middle with a preference for each image, beside that of a plain merged model."""
    from pareto_merging import merge, set_preference
    from pareto_merging.serving.layers import serve_layers

    tower, items = _tower(context), 3 if context.quick else BATCH
    with torch.no_grad():
        gammas = suite("serving_baselines").preferences(items)[0].to(context.device)
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(items, tower.tokens, tower.width, generator=generator).to(context.device, case.dtype)
        wide = copy.deepcopy(case.folded).double()
        merged = merge(case.folded, gammas[0])
        exact = {
            BLOCK: _middle_block(_with_preferences(wide, gammas.double()))(x.double()),
            PLAIN_BLOCK: _middle_block(copy.deepcopy(merged).double())(x.double()),
        }
        loose = _middle_block(_with_preferences(copy.deepcopy(case.folded), gammas))(x)
        served = copy.deepcopy(case.folded)
        serve_layers(served)
        set_preference(served, gammas)
        block, plain = _middle_block(served), _middle_block(merged)
        allowed = relative_error([loose], [exact[BLOCK]])
        run: dict[str, Callable[[], Tensor]] = {PLAIN_BLOCK: lambda: plain(x), BLOCK: lambda: block(x)}
        ready: dict[str, Callable[[], Any]] = {}
        in_graph: dict[str, bool] = {}
        for name, function in run.items():
            graph = captured(lambda function=function: [function()]) if context.on_gpu else None  # type: ignore[misc]
            in_graph[name] = graph is not None
            ready[name] = function if graph is None else graph.replay
        errors = {name: relative_error([function()], [exact[name]]) for name, function in run.items()}
        for cache in (COLD, WARM):
            times = replay_times(ready, effort, context.device, cache)
            for name in run:
                wrong = errors[name] > TOLERANCE * allowed + 1e-6
                row = Row(
                    f"{tower.name} block",
                    f"{name}, {cache}",
                    items * tower.tokens,
                    dtype_name(case.dtype),
                    rounded(errors[name]),
                    rounded(allowed),
                    not wrong,
                    graph=in_graph[name],
                    reason="wrong output" if wrong else None,
                )
                if row.matched:
                    found = quantiles(times[name])
                    row.ms, row.p20, row.p80 = found["ms"], found["p20"], found["p80"]
                yield row


def _with_preferences(model: nn.Module, gammas: Tensor) -> nn.Module:
    from pareto_merging import set_preference

    set_preference(model, gammas)
    return model


def _middle_block(model: nn.Module) -> Callable[[Tensor], Tensor]:
    blocks: Any = model.get_submodule("transformer.resblocks")
    found: Callable[[Tensor], Tensor] = blocks[len(blocks) // 2]
    return found


def engine(context: Context) -> None:
    """Measure the engine beside the plain merged model and merging again, at a batch and at one image."""
    case = _shared_case(context)
    batches = ((4, 4), (1, 1)) if context.quick else ((BATCH, BATCH), (1, 1))
    for batch, count in batches:
        name = f"serving/{_tower(context).name}, batch {batch}"
        context.session.measure(name, functools.partial(_cell, context, case, batch, count), 25)
    case.drop()


def _cell(context: Context, made: Once, batch: int, count: int) -> list[dict[str, Any]]:
    """The engine as a user calls it, new preferences with every call, from the host."""
    serving, case = suite("serving"), made()
    ways = serving.baselines
    encoder = serving.TINY_ENCODER if context.quick else serving.ENCODERS[MODEL]
    size = serving.encoders.image_size(encoder)
    effort = serving.QUICK_EFFORT if context.quick else MODEL_EFFORT
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(batch, 3, size, size, generator=generator).to(case.device, case.dtype)
        drawn = ways.preferences(count)
        # the plain model has the first preference for all
        truth = serving.Truth.of(case, images, drawn[0], sorted({1, count}))
        cell = serving.Cell.make(case, images, drawn, truth, count)
        for name in (ways.LIMIT, ways.LIMIT_LINEAR, ways.ENGINE, ways.REMERGE):
            cell.add(name, functools.partial(ways.VARIANTS[name], case, cell.requests[0]))
        if context.on_gpu:
            for name in (ways.LIMIT, ways.LIMIT_LINEAR, ways.REMERGE):
                if name in cell.ready:
                    graph = functools.partial(ways.graphed, cell.ready[name], images, cell.requests[0])
                    cell.add(f"{name}{ways.GRAPH}", graph, captures=True)
        cell.measure(effort)
    return [vars(row) for row in cell.rows.values()]
