"""An optimiser step of whole models: ours beside its limit and baselines, with checked gradients."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks.common.towers import BATCH, TASKS, TINY, TOWERS
from benchmarks.goals.context import Context
from benchmarks.training.names import ADAMERGING, ALL, AUTO, GUIDED, GUIDED_ALL, LIMIT_GRAPH, ONCE
from benchmarks.training.steps import StepRow, Steps

FEWER = (16, 8)
STEP = (AUTO, ALL, ONCE, LIMIT_GRAPH, GUIDED, GUIDED_ALL, ADAMERGING)


def make_steps(context: Context, model: str, batch: int = BATCH) -> contextlib.closing[Steps]:
    """Return the variants of one model's step. The end of a ``with`` block lets go of them."""

    def rates() -> dict[str, float]:
        return {name: context.rates[name] for name in ("copy", "bfloat16", "float32")}

    def say(line: str) -> None:
        """Say nothing: a session says what it measures."""

    if context.quick:
        return contextlib.closing(Steps(TINY, 2, context.device, torch.float32, rates, batch=2, seconds=0.05, say=say))
    tower = next(one for one in TOWERS if one.name == model)
    return contextlib.closing(Steps(tower, TASKS, context.device, context.dtype, rates, batch=batch, say=say))


def unit(context: Context, key: str, row: Callable[[], StepRow], seconds: float) -> None:
    """Measure one row."""
    context.session.measure(key, lambda: [row()], seconds)


def measure(context: Context, key: str, steps: Steps, variants: Sequence[str], seconds: float) -> None:
    """Measure variants; the first also makes the case."""
    for number, variant in enumerate(variants):
        unit(context, f"{key}/{variant}", functools.partial(steps.row, variant), seconds + 10 * (number == 0))


def _step(context: Context, group: str, model: str, seconds: float) -> None:
    with make_steps(context, model) as steps:
        measure(context, f"{group}/{model}, batch {BATCH}", steps, STEP, seconds)


def vit_l_14(context: Context) -> None:
    """Measure a step of ViT-L/14, K = 8, in every way of :data:`STEP`."""
    _step(context, "training-L14", "ViT-L/14", 8)


def vit_b_32(context: Context) -> None:
    """Measure the same of ViT-B/32."""
    _step(context, "training-B32", "ViT-B/32", 5)


def float32(context: Context) -> None:
    """Measure the layer-wise computation in float32. Of fewer images beside ours, because memory may end before."""
    for model, batch in (("ViT-B/32", BATCH), ("ViT-L/14", BATCH), *(("ViT-L/14", few) for few in FEWER)):
        key = f"float32/{model}, batch {batch}"
        with make_steps(context, model, batch) as steps:
            if batch != BATCH:
                measure(context, key, steps, (AUTO,), 6)
            unit(context, f"{key}/{ADAMERGING}, float32", steps.in_float32, 15)


def few_bytes(context: Context) -> None:
    """Measure the strategies that keep no merged weights, and a whole data-free run."""
    with make_steps(context, "ViT-L/14") as large:
        measure(context, f"rest/ViT-L/14, batch {BATCH}", large, ("streamed", "fused"), 8)
    with make_steps(context, "ViT-B/32") as small:
        data_free = functools.partial(small.data_free_row, 3 if context.quick else None)
        unit(context, "rest/ViT-B/32/data-free run", data_free, 25)
