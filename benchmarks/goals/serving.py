"""The engine as a user calls it, beside the plain merged model and merging again."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.common.session import Once
from benchmarks.common.timing import Effort
from benchmarks.common.towers import BATCH, VIT_L
from benchmarks.goals.context import Context
from benchmarks.goals.served import tower_of
from benchmarks.goals.shared_case import shared_case
from benchmarks.serving import cells, folded, names, suite, variants
from pareto_merging.checkpoints import encoders

EFFORT = Effort(100, 200, 1.5)


def engine(context: Context) -> None:
    """Measure the engine beside the plain merged model and merging again. Once at a batch, once at one image."""
    case = shared_case(context)
    batches = ((4, 4), (1, 1)) if context.quick else ((BATCH, BATCH), (1, 1))
    for batch, count in batches:
        name = f"serving/{tower_of(context).name}, batch {batch}"
        context.session.measure(name, functools.partial(_cell, context, case, batch, count), 25)
    case.drop()


def _cell(context: Context, made: Once, batch: int, count: int) -> list[dict[str, Any]]:
    """Measure the engine as a user calls it, from the host. Every call brings new preferences."""
    case = made()
    encoder = suite.TINY_ENCODER if context.quick else suite.ENCODERS[VIT_L.name]
    size = encoders.image_size(encoder)
    effort = suite.QUICK_EFFORT if context.quick else EFFORT
    with torch.no_grad():
        images = suite.make_images(batch, size, case)
        drawn = folded.preferences(count)
        # the plain model has the first preference for all
        truth = cells.Truth.of(case, images, drawn[0], sorted({1, count}))
        cell = cells.Cell.make(case, images, drawn, truth, count)
        for name in (names.LIMIT, names.LIMIT_LINEAR, names.ENGINE, names.REMERGE):
            cell.add(name, functools.partial(variants.VARIANTS[name], case, cell.requests[0]))
        if context.on_gpu:
            for name in (names.LIMIT, names.LIMIT_LINEAR, names.REMERGE):
                if name in cell.ready:
                    graph = functools.partial(variants.graphed, cell.ready[name], images, cell.requests[0])
                    cell.add(f"{name}{names.GRAPH}", graph, captures=True)
        cell.measure(effort)
    return [vars(row) for row in cell.rows.values()]
