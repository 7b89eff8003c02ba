"""An optimiser step of whole models: ours beside its limit and baselines, with checked gradients."""

import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks.common.towers import BATCH, TASKS, TINY, TOWERS
from benchmarks.goals.context import Context, as_training_rates
from benchmarks.training.names import ADAMERGING, ALL, AUTO, LIMIT_GRAPH, ONCE
from benchmarks.training.steps import StepRow, Steps

FEWER = (16, 8)
STEP = (AUTO, ALL, ONCE, LIMIT_GRAPH, ADAMERGING)


class Group:
    """The variants of one model's step as units of a group. Let go of at the end of a ``with`` block."""

    def __init__(self, context: Context, name: str, model: str, *, batch: int = BATCH) -> None:
        self.context, self.key = context, f"{name}/{model}, batch {batch}"

        def rates() -> dict[str, float]:
            return as_training_rates(context.rates)

        if context.quick:
            self.steps = Steps(TINY, 2, context.device, torch.float32, rates, batch=2, seconds=0.05, say=_nothing)
        else:
            tower = next(one for one in TOWERS if one.name == model)
            self.steps = Steps(tower, TASKS, context.device, context.dtype, rates, batch=batch, say=_nothing)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.steps.close()

    def measure(self, variants: Sequence[str], seconds: float) -> None:
        """Measure variants; the first also makes the case."""
        for number, variant in enumerate(variants):
            self.unit(variant, functools.partial(self.steps.row, variant), seconds + 10 * (number == 0))

    def unit(self, name: str, make: Callable[[], StepRow], seconds: float) -> None:
        """Measure one row."""
        self.context.session.measure(f"{self.key}/{name}", lambda: [make()], seconds)


def _nothing(line: str) -> None:
    """Say nothing: a session says what it measures."""


def vit_l_14(context: Context) -> None:
    """Measure a step of ViT-L/14, K = 8, in every way of :data:`STEP`."""
    with Group(context, "training-L14", "ViT-L/14") as group:
        group.measure(STEP, 8)


def vit_b_32(context: Context) -> None:
    """Measure the same of ViT-B/32."""
    with Group(context, "training-B32", "ViT-B/32") as group:
        group.measure(STEP, 5)


def float32(context: Context) -> None:
    """Measure the layer-wise computation in float32. Of fewer images beside ours, because memory may end before."""
    for model, batch in (("ViT-B/32", BATCH), ("ViT-L/14", BATCH), *(("ViT-L/14", few) for few in FEWER)):
        with Group(context, "float32", model, batch=batch) as group:
            if batch != BATCH:
                group.measure((AUTO,), 6)
            group.unit(f"{ADAMERGING}, float32", group.steps.in_float32, 15)


def few_bytes(context: Context) -> None:
    """Measure the strategies that keep no merged weights, and a whole data-free run."""
    with Group(context, "rest", "ViT-L/14") as large:
        large.measure(("streamed", "fused"), 8)
    with Group(context, "rest", "ViT-B/32") as small:
        steps = 3 if context.quick else None
        measure = functools.partial(small.steps.data_free_row, steps)
        context.session.measure("rest/ViT-B/32/data-free run", lambda: [measure()], 25)
