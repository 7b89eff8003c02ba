"""An optimiser step of whole models: ours beside its limit and its baselines, each with a gradient that was checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common.session import Once, Unavailable
from benchmarks.goals.context import Context, as_training_rates

if TYPE_CHECKING:
    # it needs pydantic
    from benchmarks import training

TASKS, BATCH = 8, 32
FEWER = (16, 8)
# seconds of timed steps of each variant
SECONDS = 1.0


def _suite() -> Any:
    """benchmarks.training.

    Raises:
        Unavailable: it needs what is not installed here.
    """
    try:
        from benchmarks import training
    except ImportError as error:
        raise Unavailable(f"not measured, for want of {error.name}") from error
    return training


class Steps:
    """The variants of one model's step: the case, its truth and the errors of plain PyTorch are made when needed."""

    def __init__(self, context: Context, model: str, *, batch: int = BATCH) -> None:
        self.context, self.model, self.batch = context, model, batch
        self.made = Once(self._make)

    def _make(self) -> tuple[Any, Any, Any, Any]:
        suite, context = _suite(), self.context
        if context.quick:
            architecture, tasks, dtype, batch = suite.TINY, 2, torch.float32, 2
        else:
            architecture = next(one for one in suite.MODELS if one.name == self.model)
            tasks, dtype, batch = TASKS, context.dtype, self.batch
        plain, case = suite.build_case(architecture, tasks, context.device, dtype, batch=batch)
        truth, errors = suite.exact_gradient(case)
        return plain, case, truth, errors

    def row(self, variant: str) -> Iterator[training.Row]:
        """One variant of :data:`benchmarks.training.VARIANTS`, AdaMerging's computation in the model's type."""
        suite = _suite()
        plain, case, truth, errors = self.made()
        make: Callable[[], Any]
        if variant in suite.OURS:
            make = functools.partial(suite.Ours, case, *suite.OURS[variant])
        elif variant in (suite.LIMIT, suite.LIMIT_GRAPH):
            # without a GPU there are no graphs: a rehearsal runs it as it is
            graph = variant == suite.LIMIT_GRAPH and self.context.on_gpu
            make, truth, errors = functools.partial(suite.Limit, plain, case, graph), None, {}
        else:
            make = functools.partial(self.plainly, case, case.dtype, variant == suite.ADAMERGING)
        yield self.finished(suite._blank(case, suite.STEP, variant, case.dtype), make, truth, errors, case)

    def in_float32(self) -> Iterator[training.Row]:
        """AdaMerging's computation in float32; afterwards the case has no Pareto model any more."""
        suite = _suite()
        _, case, truth, errors = self.made()
        suite.widen(case)
        row = suite._blank(case, suite.STEP, suite.ADAMERGING, torch.float32)
        yield self.finished(row, functools.partial(self.plainly, case, torch.float32, True), truth, errors, case)

    def plainly(self, case: Any, dtype: torch.dtype, together: bool) -> Any:
        """A step in plain PyTorch, merged in the way that is faster here."""
        suite = _suite()
        combine = suite.COMBINE[suite.fastest_combine(case)]
        return suite.Plain(case, lambda part, gamma: suite.merged_plainly(part, gamma, combine), dtype, together)

    def finished(self, row: Any, make: Callable[[], Any], truth: Any, errors: Any, case: Any) -> Any:
        """The row with its times, the batch it is of, and what follows from them."""
        suite, context = _suite(), self.context
        row = suite.measure(row, make, truth, errors, context.device, 0.05 if context.quick else SECONDS)
        if row.ms is not None:
            batch = case.images[0].shape[0]
            row.images_per_second = 1e3 * case.tasks * batch / row.ms
            dtype = torch.float32 if row.dtype == "float32" else case.dtype
            row.bound_ms = suite.bound_ms(case, as_training_rates(context.rates), dtype)
            row.run_steps = case.settings.steps_for(case.tasks)
            row.run_seconds = row.run_steps * row.ms / 1e3
        return {**vars(row), "batch": self.batch}

    def measure(self, group: str, variants: Sequence[str], seconds: float) -> None:
        """Measure variants as units of a group; the first also makes the case."""
        for number, variant in enumerate(variants):
            key = f"{group}/{self.model}, batch {self.batch}/{variant}"
            self.context.session.measure(key, functools.partial(self.row, variant), seconds + 10 * (number == 0))

    def close(self) -> None:
        """Let go of the models."""
        self.made.drop()


def _available(context: Context, group: str) -> Any:
    """benchmarks.training, or None where it cannot be imported, which is then a unit's reason."""
    try:
        return _suite()
    except Unavailable as error:
        context.session.measure(f"{group}/all", functools.partial(_lacking, str(error)), 0)
        return None


def _lacking(reason: str) -> Iterator[Any]:
    raise Unavailable(reason)


def _steps(context: Context, group: str, model: str, seconds: float) -> None:
    suite = _available(context, group)
    if suite is None:
        return
    steps = Steps(context, model)
    steps.measure(group, (suite.AUTO, suite.ALL, suite.ONCE, suite.LIMIT_GRAPH, suite.ADAMERGING), seconds)
    steps.close()


def vit_l_14(context: Context) -> None:
    """Measure a step of ViT-L/14, K = 8: auto, all at once, merged once, the limit, the layer-wise computation."""
    _steps(context, "training-L14", "ViT-L/14", 8)


def vit_b_32(context: Context) -> None:
    """Measure the same of ViT-B/32."""
    _steps(context, "training-B32", "ViT-B/32", 5)


def float32(context: Context) -> None:
    """Measure the layer-wise computation in float32; of fewer images beside ours, because memory may end before."""
    suite = _available(context, "float32")
    if suite is None:
        return
    for model, batch in (("ViT-B/32", BATCH), ("ViT-L/14", BATCH), *(("ViT-L/14", few) for few in FEWER)):
        steps = Steps(context, model, batch=batch)
        if batch != BATCH:
            steps.measure("float32", (suite.AUTO,), 6)
        key = f"float32/{model}, batch {batch}/{suite.ADAMERGING}, float32"
        context.session.measure(key, steps.in_float32, 15)
        steps.close()


def few_bytes(context: Context) -> None:
    """Measure the strategies that keep no merged weights, and a whole data-free run."""
    suite = _available(context, "rest")
    if suite is None:
        return
    large = Steps(context, "ViT-L/14")
    large.measure("rest", ("streamed", "fused"), 8)
    large.close()
    small = Steps(context, "ViT-B/32")
    context.session.measure("rest/ViT-B/32/data-free run", functools.partial(_data_free, context, small), 25)
    small.close()


def _data_free(context: Context, steps: Steps) -> Iterator[Any]:
    suite = _suite()
    _, case, _, _ = steps.made()
    seconds, number = (0.05, 3) if context.quick else (SECONDS, None)
    row = suite.data_free_row(case, suite.Clock(), seconds, suite.LONGEST_RUN, number)
    yield {**vars(row), "batch": BATCH}
