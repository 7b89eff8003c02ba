"""An optimiser step of whole models: ours beside its limit and its baselines, each with a gradient that was checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common.session import Once
from benchmarks.goals.context import Context, as_training_rates, suite

if TYPE_CHECKING:
    # it needs pydantic
    from benchmarks.training import Row

TASKS, BATCH = 8, 32
FEWER = (16, 8)
# seconds of timed steps of each variant
SECONDS = 1.0


class Steps:
    """The variants of one model's step: the case, its truth and the errors of plain PyTorch are made when needed."""

    def __init__(self, context: Context, model: str, *, batch: int = BATCH) -> None:
        self.context, self.model, self.batch = context, model, batch
        self.made = Once(self._make)

    def _make(self) -> tuple[Any, Any, Any, Any]:
        training, context = suite("training"), self.context
        if context.quick:
            architecture, tasks, dtype, batch = training.TINY, 2, torch.float32, 2
        else:
            architecture = next(one for one in training.MODELS if one.name == self.model)
            tasks, dtype, batch = TASKS, context.dtype, self.batch
        plain, case = training.build_case(architecture, tasks, context.device, dtype, batch=batch)
        truth, errors = training.exact_gradient(case)
        return plain, case, truth, errors

    def row(self, variant: str) -> Iterator[Row]:
        """One variant of :data:`benchmarks.training.VARIANTS`, AdaMerging's computation in the model's type."""
        training = suite("training")
        plain, case, truth, errors = self.made()
        make: Callable[[], Any]
        if variant in training.OURS:
            make = functools.partial(training.Ours, case, *training.OURS[variant])
        elif variant in (training.LIMIT, training.LIMIT_GRAPH):
            # without a GPU there are no graphs: a rehearsal runs it as it is
            graph = variant == training.LIMIT_GRAPH and self.context.on_gpu
            make = functools.partial(training.Limit, plain, case, graph)
            truth, errors = training.exact_losses(plain, case)
        else:
            make = functools.partial(self.plainly, case, case.dtype, variant == training.ADAMERGING)
        yield self.finished(training._blank(case, training.STEP, variant, case.dtype), make, truth, errors, case)

    def in_float32(self) -> Iterator[Row]:
        """AdaMerging's computation in float32; afterwards the case has no Pareto model any more."""
        training = suite("training")
        _, case, truth, errors = self.made()
        training.widen(case)
        row = training._blank(case, training.STEP, training.ADAMERGING, torch.float32)
        yield self.finished(row, functools.partial(self.plainly, case, torch.float32, True), truth, errors, case)

    def plainly(self, case: Any, dtype: torch.dtype, together: bool) -> Any:
        """A step in plain PyTorch, merged in the way that is faster here."""
        training = suite("training")
        combine = training.COMBINE[training.fastest_combine(case)]
        return training.Plain(case, lambda part, gamma: training.merged_plainly(part, gamma, combine), dtype, together)

    def finished(self, row: Any, make: Callable[[], Any], truth: Any, errors: Any, case: Any) -> Any:
        """The row with its times, the batch it is of, and what follows from them."""
        training, context = suite("training"), self.context
        row = training.measure(row, make, truth, errors, context.device, 0.05 if context.quick else SECONDS)
        if row.ms is not None:
            batch = case.images[0].shape[0]
            row.images_per_second = 1e3 * case.tasks * batch / row.ms
            dtype = torch.float32 if row.dtype == "float32" else case.dtype
            row.bound_ms = training.bound_ms(case, as_training_rates(context.rates), dtype)
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
        return suite("training")
    except ImportError as error:
        context.session.lacks(f"{group}/all", error)
        return None


def _steps(context: Context, group: str, model: str, seconds: float) -> None:
    training = _available(context, group)
    if training is None:
        return
    steps = Steps(context, model)
    steps.measure(
        group, (training.AUTO, training.ALL, training.ONCE, training.LIMIT_GRAPH, training.ADAMERGING), seconds
    )
    steps.close()


def vit_l_14(context: Context) -> None:
    """Measure a step of ViT-L/14, K = 8: auto, all at once, merged once, the limit, the layer-wise computation."""
    _steps(context, "training-L14", "ViT-L/14", 8)


def vit_b_32(context: Context) -> None:
    """Measure the same of ViT-B/32."""
    _steps(context, "training-B32", "ViT-B/32", 5)


def float32(context: Context) -> None:
    """Measure the layer-wise computation in float32; of fewer images beside ours, because memory may end before."""
    training = _available(context, "float32")
    if training is None:
        return
    for model, batch in (("ViT-B/32", BATCH), ("ViT-L/14", BATCH), *(("ViT-L/14", few) for few in FEWER)):
        steps = Steps(context, model, batch=batch)
        if batch != BATCH:
            steps.measure("float32", (training.AUTO,), 6)
        key = f"float32/{model}, batch {batch}/{training.ADAMERGING}, float32"
        context.session.measure(key, steps.in_float32, 15)
        steps.close()


def few_bytes(context: Context) -> None:
    """Measure the strategies that keep no merged weights, and a whole data-free run."""
    training = _available(context, "rest")
    if training is None:
        return
    large = Steps(context, "ViT-L/14")
    large.measure("rest", ("streamed", "fused"), 8)
    large.close()
    small = Steps(context, "ViT-B/32")
    context.session.measure("rest/ViT-B/32/data-free run", functools.partial(_data_free, context, small), 25)
    small.close()


def _data_free(context: Context, steps: Steps) -> Iterator[Any]:
    training = suite("training")
    _, case, _, _ = steps.made()
    seconds, number = (0.05, 3) if context.quick else (SECONDS, None)
    row = training.data_free_row(case, training.Clock(), seconds, training.LONGEST_RUN, number)
    yield {**vars(row), "batch": BATCH}
