"""The engine as a user calls it, beside the plain merged model and merging again."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.session import Once
from benchmarks.common.timing import Effort
from benchmarks.common.towers import BATCH
from benchmarks.goals.context import Context
from benchmarks.serving import folded, suite
from benchmarks.serving.names import ENGINE, LIMIT, LIMIT_LINEAR, REMERGE
from pareto_merging.checkpoints import encoders

EFFORT = Effort(100, 200, 1.5)
VARIANTS = (LIMIT, LIMIT_LINEAR, ENGINE, REMERGE)


def _encoder(context: Context) -> dict[str, Any]:
    return suite.TINY_ENCODER if context.quick else suite.ENCODERS[context.tower.name]


@functools.lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="goals-serving-")


# the folded model is one for both groups that measure it, and goes when the second is through
_case: dict[bool, Once] = {}


def shared_case(context: Context) -> Once:
    """Return the folded model, made when it is first asked for."""

    def make() -> folded.Case:
        dtype = context.dtype if context.on_gpu else torch.float32
        return folded.build_case(context.tower.name, _encoder(context), Path(_folder().name), dtype, context.device)

    return _case.setdefault(context.quick, Once(make))


def engine(context: Context) -> None:
    """Measure the engine beside the plain merged model and merging again. Once at a batch, once at one image."""
    case = shared_case(context)
    batches = ((4, 4), (1, 1)) if context.quick else ((BATCH, BATCH), (1, 1))
    for batch, count in batches:
        name = f"serving/{context.tower.name}, batch {batch}"
        context.session.measure(name, functools.partial(_cell, context, case, batch, count), 25)
    case.drop()


def _cell(context: Context, made: Once, batch: int, count: int) -> list[dict[str, Any]]:
    """Measure the engine as a user calls it, from the host. Every call brings new preferences."""
    case = made()
    size = encoders.image_size(_encoder(context))
    effort = suite.QUICK_EFFORT if context.quick else EFFORT
    with torch.no_grad():
        images = suite.make_images(batch, size, case)
        drawn = folded.preferences(count)
        # the plain model has the first preference for all
        truth = suite.Truth(case, images, drawn[0], sorted({1, count}))
        rows = suite.cell_rows(case, images, drawn, truth, count, effort, VARIANTS)
    return [vars(row) for row in rows]
