"""The training suite: one optimiser step of a vision transformer, beside other ways.

Everything is measured side by side in one run, on the same models, images and heads, at the same preference: ours in
every strategy; the model merged once per step with autograd; the usual layer-wise AdaMerging computation in float32 and
in the model's type; and the limit, the same forwards and backwards of a plain model that was merged beforehand. Each
variant ends in the gradient of all learned parameters and an Adam step, and has a time only if that gradient is as near
to the same computation in a wider type as plain PyTorch's is. Weights, task vectors, images and heads are made up: time
does not depend on their values. Images are on the GPU already: nothing is read or decoded.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.common.ceilings import ceilings
from benchmarks.common.errors import TOLERANCE, Gradient, group_errors
from benchmarks.common.pages import NOT_MET
from benchmarks.common.rows import Row, dtype_name
from benchmarks.common.session import Once
from benchmarks.common.suites import Save, nowhere
from benchmarks.common.timing import Clock, free, suite_device, synchronize, timed_steps
from benchmarks.common.towers import BATCH, RANK, TINY, TOWERS, VIT_B, Tower, vision_transformer
from benchmarks.training import runners
from benchmarks.training.models import CLASSES, Case, bound_ms, build_case, widen
from benchmarks.training.names import (
    ADAMERGING,
    ALL,
    AUTO,
    DATA_FREE,
    GUIDED,
    GUIDED_ALL,
    LIMIT,
    LIMIT_GRAPH,
    ONCE,
    STEP,
)
from benchmarks.training.runners import COMBINE, GUIDED_WAYS, OURS, Combine, Guided, Limit, Ours, Plain, Profile, Runner
from benchmarks.training.summary import goals
from pareto_merging import MethodSettings, learn_pareto_set, set_strategy
from pmkernels import dispatch

# seconds of steps that are timed for each variant
SECONDS = 1.0
# a data-free run that would take longer is not run to its end
LONGEST_RUN = 20.0
VARIANTS = {
    8: (*OURS, *GUIDED_WAYS, ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
    2: (AUTO, ALL, "streamed", "fused", ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
    4: (AUTO, ALL, "streamed", "fused", ONCE, ADAMERGING, LIMIT, LIMIT_GRAPH),
}


@dataclass(kw_only=True)
class StepRow(Row):
    """One variant of a step: memory, and what follows from its milliseconds. ``reason`` may be what the run warned of.

    ``host_ms``: until the call returns; ours looks at the gradient once in a step, so it waits inside. ``bound_ms``:
    of the products, attention and merge, counted. ``run_seconds``: of the whole run of ``run_steps`` steps, computed
    from ``ms`` unless ``run_measured``.
    """

    model: str
    tasks: int
    batch: int = BATCH
    host_ms: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    bound_ms: float | None = None
    run_steps: int | None = None
    run_seconds: float | None = None
    run_measured: bool = False


def measure(
    row: StepRow,
    make: Callable[[], Runner],
    truth: Gradient,
    plain: Mapping[str, float],
    device: torch.device,
    seconds: float,
) -> StepRow:
    """Return ``row`` with what was measured of the variant that ``make`` makes. Whatever goes wrong is its reason.

    ``plain``: the errors of plain PyTorch in this type. A gradient that is further away by more than TOLERANCE has no
    time; neither has what runs out of memory, which is not wrong.
    """
    runner: Runner | None = None
    try:
        free(device)
        if device.type == "cuda":
            # or the most that any variant before took would count for this one
            torch.cuda.reset_peak_memory_stats()
        runner = make()
        for _ in range(runner.warm_up):
            runner.step()
        errors = group_errors(runner.gradient(), truth)
        worst = max(errors, key=lambda group: errors[group] / (plain.get(group, 0.0) + 1e-6))
        row.error, row.plain_error = errors[worst], plain.get(worst, 0.0)
        row.matched = all(error <= TOLERANCE * plain.get(group, 0.0) + 1e-6 for group, error in errors.items())
        if row.matched:
            row.note(timed_steps(runner.step, device, seconds))
            row.resident_bytes = runner.resident()
            row.reason = "; ".join(dict.fromkeys(runner.notes)) or None
            if device.type == "cuda":
                row.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            row.reason = f"wrong {worst}" if worst == "loss" else f"wrong gradient of {worst}"
    except Exception as error:
        row.fail(error)
    finally:
        if runner is not None:
            runner.close()
        runner = None
        free(device)
    return row


def blank(case: Case, op: str, variant: str, dtype: torch.dtype) -> StepRow:
    """Return a row without figures."""
    about: dict[str, Any] = {"model": case.tower.name, "tasks": case.tasks, "batch": len(case.images[0])}
    return StepRow(op=op, layer=case.title, dtype=dtype_name(dtype), variant=variant, **about)


def _run_data_free(case: Case, row: StepRow, settings: MethodSettings) -> None:
    """Note how long a whole run takes; what it learns is undone."""
    assert case.pareto is not None
    set_strategy(case.pareto, "auto")
    kept = {name: parameter.detach().clone() for name, parameter in case.learned.items()}
    synchronize(case.device)
    start = time.perf_counter()
    try:
        learn_pareto_set(case.pareto, None, settings, progress=False)
        synchronize(case.device)
        row.run_seconds, row.run_measured = time.perf_counter() - start, True
    except Exception as error:
        # the rest of the case is measured all the same
        row.fail(error)
        row.ms = row.run_seconds = None
    with torch.no_grad():
        for name, parameter in case.learned.items():
            parameter.copy_(kept[name])


class Steps:
    """The variants of a step of one model with K tasks. What they share is made when it is first needed.

    ``rates``: gives the ceilings of this run. ``seconds``: of timed steps per variant. ``profiles``: where a profile of
    ``auto`` goes, by the model's name.
    """

    def __init__(
        self,
        tower: Tower,
        tasks: int,
        device: torch.device,
        dtype: torch.dtype,
        rates: Callable[[], Mapping[str, float]],
        *,
        batch: int = BATCH,
        seconds: float | None = None,
        say: Callable[[str], None] = print,
        profiles: dict[str, Profile] | None = None,
    ) -> None:
        self.device, self.rates, self.say, self.profiles = device, rates, say, profiles
        self.seconds = SECONDS if seconds is None else seconds

        def make() -> Case:
            case = build_case(tower, tasks, device, dtype, batch=batch)
            say(f"{case.title}: made from {case.source}")
            return case

        self._made, self._combine = Once(make), Once(self._fastest)
        self._truth = Once(lambda: runners.exact_gradient(self.case))
        self._losses = Once(lambda: runners.exact_losses(self.case))
        self._guided = Once(lambda: runners.guided_gradient(self.case))

    @property
    def case(self) -> Case:
        """Return what every variant is given."""
        case: Case = self._made()
        return case

    def _fastest(self) -> Combine:
        name = runners.fastest_combine(self.case)
        self.say(f"{self.case.title}: the baselines merge by {name}")
        return COMBINE[name]

    def _runner(self, variant: str, dtype: torch.dtype) -> Runner:
        if variant in GUIDED_WAYS:
            return Guided(self.case, GUIDED_WAYS[variant])
        if variant in OURS:
            return Ours(self.case, *OURS[variant], profiles=self.profiles if variant == AUTO else None)
        if variant in (LIMIT, LIMIT_GRAPH):
            # without a GPU there are no graphs: a rehearsal runs it as it is
            return Limit(self.case, variant == LIMIT_GRAPH and self.device.type == "cuda")
        # merged in the way that is faster here
        merge = functools.partial(runners.merged_plainly, combine=self._combine())
        return Plain(self.case, merge, dtype, variant == ADAMERGING)

    def row(self, variant: str, dtype: torch.dtype | None = None) -> StepRow:
        """Measure one of :data:`VARIANTS`; ``dtype``: another type than the model's, after :meth:`widen`."""
        case = self.case
        dtype = case.dtype if dtype is None else dtype
        judges = {GUIDED: self._guided, GUIDED_ALL: self._guided, LIMIT: self._losses, LIMIT_GRAPH: self._losses}
        truth, errors = judges.get(variant, self._truth)()
        make = functools.partial(self._runner, variant, dtype)
        row = measure(blank(case, STEP, variant, dtype), make, truth, errors, self.device, self.seconds)
        if row.ms is not None:
            row.images_per_second = 1e3 * case.tasks * row.batch / row.ms
            row.bound_ms = bound_ms(case, self.rates(), dtype)
            row.run_steps = case.settings.steps_for(case.tasks)
            row.run_seconds = row.run_steps * row.ms / 1e3
        return self._told(row)

    def data_free_row(self, steps: int | None) -> StepRow:
        """Measure a step without data, and a whole run of ``steps`` if short. Short: up to :data:`LONGEST_RUN`."""
        case, row = self.case, blank(self.case, DATA_FREE, AUTO, self.case.dtype)
        settings = case.settings.model_copy(update={"objective": "weight-distance"})
        try:
            truth = runners.distance_gradient(case, torch.float64)
            plain = group_errors(runners.distance_gradient(case, torch.float32), truth)
        except torch.cuda.OutOfMemoryError:
            row.reason = "out of memory in the check"
            return self._told(row)
        # closed forms of float32 numbers that nearly cancel: what counts is that Adam's sign and size are right
        plain = {group: max(error, 1e-3) for group, error in plain.items()}
        make = functools.partial(Ours, case, "auto", "auto", settings=settings)
        measure(row, make, truth, plain, self.device, self.seconds)
        if row.ms is not None:
            published = MethodSettings.model_validate({"objective": "weight-distance", "steps": steps})
            row.run_steps = published.steps_for(case.tasks)
            row.run_seconds = row.run_steps * row.ms / 1e3
            if row.run_seconds <= LONGEST_RUN:
                self.say(f"{case.title}: a whole data-free run")
                _run_data_free(case, row, published)
        return self._told(row)

    def _told(self, row: StepRow) -> StepRow:
        about = ("" if row.ms is None else f"{row.ms:.2f} ms", row.reason)
        self.say(f"{row.layer}: {row.variant}, {row.dtype}: {', '.join(filter(None, about))}")
        return row

    def in_float32(self) -> StepRow:
        """Measure AdaMerging's computation in float32; afterwards the case has no Pareto model any more."""
        self._truth()
        widen(self.case)
        return self.row(ADAMERGING, torch.float32)

    def forget(self) -> None:
        """Let go of all but the plain model, which is all that the limit needs."""
        self.case.pareto, self.case.parts, self.case.learned = None, {}, {}
        self._truth.drop()
        self._guided.drop()

    def close(self) -> None:
        """Let go of the models."""
        for once in (self._made, self._truth, self._losses, self._guided, self._combine):
            once.drop()


def case_rows(
    steps: Steps, variants: Sequence[str], *, data_free: bool = False, run_steps: int | None = None
) -> Iterator[StepRow]:
    """Yield a row for each of ``variants``, AdaMerging's computation in float32 too; ``run_steps``: without data."""
    yield from map(steps.row, (variant for variant in (*OURS, *GUIDED_WAYS) if variant in variants))
    if data_free:
        yield steps.data_free_row(run_steps)
    if ONCE in variants:
        yield steps.row(ONCE)
    if ADAMERGING in variants:
        if steps.case.dtype != torch.float32:
            yield steps.row(ADAMERGING)
        yield steps.in_float32()
    steps.forget()
    limits = (LIMIT, LIMIT_GRAPH) if steps.device.type == "cuda" else (LIMIT,)
    yield from map(steps.row, (variant for variant in limits if variant in variants))


def _variants(device: torch.device, tasks: int) -> list[str]:
    """Return what can run here: kernels need a GPU, or to be interpreted."""
    kernels = dispatch.runs_kernels(device)
    return [variant for variant in VARIANTS[tasks] if kernels or variant not in ("streamed", "fused")]


def run(quick: bool, save: Save = nowhere) -> dict[str, Any]:
    """Return all rows. ``quick``: a tiny model on any device, which proves that it runs and measures nothing.

    ``save`` gets the report after every row.
    """
    device = suite_device("training", quick)
    clock = Clock()
    if quick:
        clock.say("a rehearsal with a tiny model: it measures nothing")
    rates = ceilings(device, quick)
    profiles: dict[str, Profile] = {}
    sources: dict[str, str] = {}
    report: dict[str, Any] = {"quick": quick, "batch": BATCH, "classes": CLASSES, "rank": RANK, "ceilings": rates}
    report |= {"sources": sources, "rows": [], "profiles": {}, "progress": clock.lines}

    def keep(row: StepRow) -> None:
        report["rows"].append(asdict(row))
        save(report)

    def add(
        tower: Tower, tasks: int, dtype: torch.dtype, variants: Sequence[str], data_free: bool, **options: Any
    ) -> None:
        sources[tower.name] = vision_transformer(TINY)[1]
        run_steps = options.pop("run_steps", None)
        steps = Steps(tower, tasks, device, dtype, lambda: rates, say=clock.say, **options)
        try:
            for row in case_rows(steps, variants, data_free=data_free, run_steps=run_steps):
                keep(row)
        except Exception as error:
            title = f"{tower.name}, K = {tasks}"
            row = StepRow(op=STEP, layer=title, dtype=dtype_name(dtype), variant="all", model=tower.name, tasks=tasks)
            row.fail(error)
            clock.say(f"{title}: {row.reason}")
            keep(row)
        steps.close()
        free(device)

    # float32 against float64: a mistake that the rounding of bfloat16 could hide
    every = [v for v in _variants(device, 8) if quick or not v.startswith("limit")]
    # three tasks are more than an interpreter can do in time
    tasks = 3 if device.type == "cuda" else 2
    add(TINY, tasks, torch.float32, every, True, batch=2, seconds=0.05, run_steps=3)
    for tower in () if quick else TOWERS:
        # plain PyTorch and a step without graphs say nothing new with fewer tasks
        for tasks in VARIANTS:
            kept = profiles if tasks == 8 else None
            add(tower, tasks, torch.bfloat16, _variants(device, tasks), tower is VIT_B and tasks == 8, profiles=kept)
    missed = {goal.where for goal in goals(report) if goal.status == NOT_MET}
    report["profiles"] = {model: profile for model, profile in profiles.items() if model in missed}
    clock.say("done")
    return report
