"""``python -m benchmarks.tune``: measure launch configurations and strategies on this GPU; the library picks them up.

What is written is ``pmkernels/configs/<gpu>.json``: the rates of the GPU, launch configurations where one is faster
than what the library has, and the faster strategy of each layer where the cost model would take the other one. A
configuration has a time only if the compiler accepts it without spilling and its outputs, in memory that was filled
with NaN, match float64; before it is taken it is checked again on the ranks, K, types and sizes it will be used for.

In order of value: what the hot path launches (the reduction of dW, the widening, the served layer, the merge), then the
strategies of ViT-L/14 and ViT-B/32, then the rest. What `python -m benchmarks.budget` would refuse is never timed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and "--quick" in sys.argv and not torch.cuda.is_available():
    # before a kernel is imported: without a GPU a rehearsal interprets them
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks import budget, kernels, layers, limits, results
from benchmarks.kernels import Layer, relative_error
from pmkernels import configs, dispatch, strategies
from pmkernels.configs import Asked, Config
from pmkernels.kernels import linear as linear_kernels
from pmkernels.kernels import low_rank as low_rank_kernels
from pmkernels.kernels import merge as merge_kernels
from pmkernels.kernels import preference as preference_kernels
from pmkernels.kernels import weight_grad as weight_grad_kernels
from pmkernels.launch import INTERPRETING, padded_rank
from pmkernels.reference import preference_core

CONFIGS = Path(configs.__file__).parent / "configs"
# what the goals' hot path launches, first of all
HOT = ("merge_grad", "widen", "preference", "merge")
TUNED = (*HOT, "linear", "weight_grad", "shrink", "factor_grad")
OPS = (*TUNED, "strategies")
# candidates of a group, how many of them are timed on every layer, how many of those are checked beforehand
MOST, FINALISTS, CHECKED = 24, 5, 2
# a configuration replaces the present one only if it is that much faster; strategies nearer than that are a tie
GAIN, TIE = 1.02, 1.02
# of the error of plain PyTorch in the same type: of a whole result, and of its worst row or column
TOLERANCE, LINE_TOLERANCE = kernels.TOLERANCE, 2 * kernels.TOLERANCE
# times each finalist is timed on each layer, in turn with the others
ROUNDS = 2
# milliseconds of repetitions: before a time, for one time
WARMUP, REPETITIONS = 2, 8
# of the time budget, in this order: the hot operations, the strategies of the transformers, the other operations, the
# strategies of the other layers
HOT_SHARE, STRATEGY_SHARE, OTHERS_SHARE, REST_SHARE = 0.4, 0.25, 0.3, 0.05
# what relative_error says of a result that is not finite, and the microseconds of a strategy that is wrong
FAILED = 1e30
NOT_REACHED = "not reached"
CONFIG_FIELDS = fields(Config)

LANGUAGE_MODEL_ROWS = 4096
# linear's buckets of rows -> the rows they are timed at; the last: each layer's own number
ROWS: dict[int | None, tuple[int, ...]] = {32: (1, 32), 128: (50, 128), 256: (256,), 512: (257,), None: ()}
# and preference's
PREFERENCE_ROWS: dict[int | None, tuple[int, ...]] = {32: (1, 32), 512: (50, 257), None: ()}
TINY_LAYERS = (Layer("tiny in-projection", 48, 32, 2, 3), Layer("tiny MLP fc", 32, 48, 2, 3))
TASKS = (8, 2, 4)


class Lost(RuntimeError):
    """The GPU no longer answers: nothing after this can be measured."""


@dataclass(frozen=True)
class Case:
    """One launch of one kernel: ``call`` is a configuration's op, except ``forward`` and ``dx``, which are both linear.

    ``groups``: preferences of shrink. ``aligned`` = False starts every tensor of the model off a 16-byte boundary.
    """

    call: str
    n: int
    d: int
    rows: int = 0
    tasks: int = 8
    rank: int = 16
    dtype: str = "bfloat16"
    kind: str = "16-bit"
    per_row: bool = False
    bias: bool = False
    groups: int = 1
    aligned: bool = True

    @property
    def op(self) -> str:
        """As configuration files call it."""
        return "linear" if self.call in ("forward", "dx") else self.call

    def __str__(self) -> str:
        parts = [f"{self.call} {self.n}×{self.d}", f"M={self.rows}" if self.rows else "", f"K={self.tasks}"]
        parts += [f"R={self.rank}", self.kind if self.kind != "16-bit" else self.dtype]
        parts += [name for name in ("per_row", "bias") if getattr(self, name)]
        return " ".join(part for part in (*parts, "" if self.aligned else "unaligned") if part)


Values = dict[str, Any]


def inputs(case: Case, device: torch.device) -> Values:
    """Random arguments on the scale of a real layer; on the meta device only their shapes.

    dy depends on x through Σ_k τ_k, and a dW on it, so that each dλ_k is a sum that does not cancel.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))
    model = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        if generator is None:
            return torch.empty(shape, device=device)
        return scale * torch.randn(shape, generator=generator, device=device)

    def stored(*shape: int, scale: float = 1.0) -> Tensor:
        pad = 0 if case.aligned else 1
        return normal(*shape[:-1], shape[-1] + pad, scale=scale).to(model)[..., pad:]

    n, d, width = case.n, case.d, case.d**-0.5
    found: Values = {"task_vectors": None, "lam": None, "A": None, "B": None}
    if case.call in ("forward", "weight_grad", "shrink", "preference", "widen"):
        found["x"] = stored(case.rows, d)
    if case.call in ("dx", "factor_grad"):
        found["dy"] = stored(case.rows, n)
    if case.call in ("forward", "dx", "merge", "preference"):
        found["weight"] = stored(n, d, scale=width)
    if case.tasks and case.call not in ("shrink", "factor_grad", "preference", "widen"):
        found["task_vectors"] = stored(case.tasks, n, d, scale=0.1 * width)
        found["lam"] = normal(case.tasks, scale=0.3)
    if case.call == "weight_grad":
        dy = F.linear(found["x"], found["task_vectors"].sum(dim=0)).float() + normal(case.rows, n, scale=0.1)
        found["dy"] = dy.to(model)
    if case.call == "merge_grad":
        sums = 0.0 if found["task_vectors"] is None else found["task_vectors"].float().sum(dim=0)
        found["d_weight"] = (sums + stored(n, d, scale=0.1 * width).float()).to(model)
    if case.rank:
        found["A"], found["B"] = normal(n, case.rank), normal(d, case.rank, scale=width)
        found["G"] = normal(case.rank, case.rank, max(case.tasks, 1), scale=0.1)
        found["gamma"] = torch.softmax(normal(case.groups, max(case.tasks, 1)), dim=-1)
        core = preference_core(found["G"], found["gamma"][0])
        # laid out as the operators lay it out
        found["left"] = (core.t() @ found["A"].t()).t()
        found["t"] = normal(case.rows, case.rank)
        # as a served layer holds them
        found["right"] = found["B"].to(model).t().contiguous().t()
        if case.call == "preference":
            found["wide"] = pmkernels.widen_weight(found["weight"], found["A"])
    found["bias"] = stored(n) if case.bias else None
    found["out"] = torch.empty(n, d, dtype=model, device=device)
    return found


def run(case: Case, v: Values) -> list[Tensor]:
    """The launch, with the configuration that dispatch gives it now."""
    if case.op == "linear":
        low_rank = (v["left"], v["B"]) if case.rank and not case.per_row else None
        weights = (v["weight"], v["task_vectors"], v["lam"])
        if case.call == "forward":
            start = (v["t"], v["A"]) if case.per_row else None
            return [linear_kernels.linear_fwd(v["x"], *weights, low_rank=low_rank, start=start, bias=v["bias"])]
        start = (v["t"], v["B"]) if case.per_row else None
        return [linear_kernels.linear_bwd_x(v["dy"], *weights, low_rank=low_rank, start=start)]
    if case.call == "merge":
        low_rank = (v["left"], v["B"]) if case.rank else None
        return [merge_kernels.merge_weight(v["weight"], v["task_vectors"], v["lam"], low_rank, v["out"])]
    if case.call == "shrink":
        return [part for part in low_rank_kernels.shrink(v["x"], v["B"], v["G"], v["gamma"]) if part is not None]
    if case.call == "preference":
        served = (v["wide"], v["G"], v["right"], v["gamma"], v["bias"])
        return [preference_kernels.preference_linear(v["x"], *served)]
    if case.call == "widen":
        return [preference_kernels.widen(v["x"], v["G"], v["right"], v["gamma"])]
    if case.call == "factor_grad":
        return [low_rank_kernels.factor_grad(v["dy"], v["t"], case.n * case.d)]
    factors = {"A": v["A"], "B": v["B"]}
    if case.call == "weight_grad":
        reduced = weight_grad_kernels.weight_grad(v["dy"], v["x"], v["task_vectors"], **factors, need_bias=case.bias)
    else:
        reduced = weight_grad_kernels.weight_grad_of_merge(v["d_weight"], v["task_vectors"], **factors)
    return [part for part in reduced if part is not None]


def computed(case: Case, v: Values, wide: torch.dtype) -> list[Tensor]:
    """The same in PyTorch: in float64 the truth, else what plain PyTorch does in the model's type, sums in ``wide``."""
    exact = wide == torch.float64

    def of(name: str) -> Tensor:
        return v[name].to(wide)

    def merged() -> Tensor:
        found = of("weight")
        if v["lam"] is not None:
            for scale, task_vector in zip(of("lam"), v["task_vectors"], strict=True):
                found = found + scale * task_vector.to(wide)
        if case.rank and not case.per_row:
            found = found + of("left") @ of("B").t()
        return found

    if case.call == "merge":
        return [merged() if exact else merged().to(v["weight"].dtype)]
    if case.op == "linear":
        weight, rows = merged(), v["x" if case.call == "forward" else "dy"]
        weight, rows = (weight, rows.to(wide)) if exact else (weight.to(rows.dtype), rows)
        y = (rows @ (weight.t() if case.call == "forward" else weight)).to(wide)
        if case.per_row:
            y = y + of("t") @ of("A" if case.call == "forward" else "B").t()
        y = y if v["bias"] is None else y + of("bias")
        return [y if exact else y.to(rows.dtype)]
    if case.call in ("shrink", "preference", "widen"):
        s = of("x") @ of("B" if case.call == "shrink" else "right")
        gamma = of("gamma").repeat_interleave(case.rows // case.groups, dim=0)
        mixed = torch.stack([gamma[:, k : k + 1] * (s @ of("G")[:, :, k].t()) for k in range(gamma.shape[1])])
        if case.call == "shrink":
            return [s, mixed.sum(dim=0)]
        x, t = v["x"], mixed.sum(dim=0)
        if case.call == "widen":
            t = F.pad(t, (0, padded_rank(case.rank) - case.rank))
            return [torch.cat([of("x"), t if exact else t.to(x.dtype).to(wide)], dim=1)]
        A = v["wide"][:, case.d : case.d + case.rank].to(wide)
        y = (x.to(wide) if exact else x) @ (of("weight") if exact else v["weight"]).t()
        y = y.to(wide) + t @ A.t() + (0.0 if v["bias"] is None else of("bias"))
        return [y if exact else y.to(x.dtype)]
    if case.call == "factor_grad":
        return [of("dy").t() @ of("t")]
    d_weight = of("d_weight") if case.call == "merge_grad" else _d_weight(v, wide)
    found = []
    if v["task_vectors"] is not None:
        found.append(torch.stack([(task_vector.to(wide) * d_weight).sum() for task_vector in v["task_vectors"]]))
    if case.rank:
        found += [d_weight @ of("B"), d_weight.t() @ of("A")]
    return [*found, of("dy").sum(dim=0)] if case.bias else found


def _d_weight(v: Values, wide: torch.dtype) -> Tensor:
    if wide == torch.float64:
        return v["dy"].to(wide).t() @ v["x"].to(wide)
    return (v["dy"].t() @ v["x"]).to(wide)


@dataclass(frozen=True)
class Errors:
    """Relative errors: the largest of several results, and the largest of a row or column of one of them."""

    whole: float
    line: float

    @classmethod
    def of(cls, found: Sequence[Tensor], truth: Sequence[Tensor]) -> Errors:
        """Rows and columns are compared with the mean size of all: one wrong tile must not hide in a large result."""
        worst = 0.0
        for a, b in zip(found, truth, strict=True):
            if b.ndim != 2:
                continue
            size = float(b.norm()) / math.sqrt(b.numel())
            for dim in (0, 1):
                lines = (a.double() - b).norm(dim=dim) / math.sqrt(b.shape[dim])
                error = float(lines.max()) / max(size, 1e-30)
                worst = max(worst, error if math.isfinite(error) else FAILED)
        return cls(relative_error(found, truth), worst)


@dataclass
class Prepared:
    """A case with its arguments on a device, its result in float64, and the errors of plain PyTorch."""

    case: Case
    values: Values
    truth: list[Tensor]
    plain: Errors

    @classmethod
    def make(cls, case: Case, device: torch.device) -> Prepared:
        """For the weight gradient, plain PyTorch's error is at least that of its dW: few numbers come right by luck."""
        with precision(case.kind), torch.no_grad():
            values = inputs(case, device)
            truth = computed(case, values, torch.float64)
            plain = Errors.of(computed(case, values, torch.float32), truth)
            if case.call == "weight_grad":
                of_dw = Errors.of([_d_weight(values, torch.float32)], [_d_weight(values, torch.float64)])
                plain = Errors(max(plain.whole, of_dw.whole), max(plain.line, of_dw.line))
        return cls(case, values, truth, plain)

    def fault(self, found: Sequence[Tensor]) -> str | None:
        """What is wrong with a result, or None."""
        errors, more = Errors.of(found, self.truth), self.rounding()
        for name, error, allowed in (
            ("error", errors.whole, TOLERANCE * self.plain.whole + more),
            ("error of a row or column", errors.line, LINE_TOLERANCE * (self.plain.line + more)),
        ):
            if not error <= allowed:
                return f"wrong: {name} {error:.2e}, allowed {allowed:.2e} ({self.case})"
        return None

    def rounding(self) -> float:
        """An error that is no fault where plain PyTorch has none: of three TF32 products, or of one that is cut off."""
        if self.case.kind == "tf32":
            return 1e-3
        return 1e-4 if self.case.call in ("merge_grad", "shrink", "factor_grad", "widen") else 1e-6


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """float32 products as that kind of entry has them: TF32 or exact."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def trial(op: str, config: Config | None) -> Iterator[None]:
    """Every launch of ``op`` with ``config``; None: as configured."""
    before = dispatch.in_force()

    def forced(asked: Asked, entry: configs.Entry) -> Config:
        if config is not None and asked.op == op:
            return config
        return entry.config if before.launch is None else before.launch(asked, entry)

    with dispatch.using(replace(before, launch=forced)):
        yield


@contextmanager
def active(name: str, text: str | None = None) -> Iterator[None]:
    """The configuration file ``name`` in use on every device; with ``text``, that is what it says."""
    files = {**dispatch.in_force().files, **({} if text is None else {name: text})}
    with dispatch.using(replace(dispatch.in_force(), files=files, file=name)):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated here is NaN until something is written to it."""
    enabled, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn)


@contextmanager
def _jit_run(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """``function`` instead of Triton's launch of a kernel, which it gets first."""
    jit = triton.runtime.jit.JITFunction
    before = jit.run
    jit.run = lambda *arguments, **options: function(before, *arguments, **options)
    try:
        yield before
    finally:
        jit.run = before


# Compiling beforehand, on every core


@dataclass(frozen=True)
class Target:
    """What compiling for a GPU takes: its capability and multiprocessors, and the configuration file in use."""

    capability: int
    multiprocessors: int
    name: str
    text: str | None = None

    @property
    def architecture(self) -> budget.Architecture | None:
        """Its limits, where they are known."""
        return budget.ARCHITECTURES.get(f"sm_{self.capability}")


def launches(case: Case, config: Config | None, target: Target) -> list[budget.Launch]:
    """What a case would launch on that GPU, found out on the meta device: nothing is computed or allocated."""
    found: list[budget.Launch] = []
    dtype = case.dtype if case.kind == "16-bit" else case.kind

    def record(_: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        parts = [kernel.__name__, *map(budget._argument_key, arguments), *(f"{k}={v!r}" for k, v in options.items())]
        found.append(budget.Launch(kernel, str(case), dtype, "", arguments, options, "|".join(parts)))

    with (
        dispatch.using(replace(dispatch.in_force(), multiprocessors=target.multiprocessors)),
        precision(case.kind),
        trial(case.op, config),
        _jit_run(record),
        torch.no_grad(),
    ):
        run(case, inputs(case, torch.device("meta")))
    return found


def _compile(case: Case, config: Config | None, index: int, target: Target) -> list[str]:
    """In a worker: compile one of a case's launches, and say what is wrong with it."""
    with active(target.name, target.text):
        launch = launches(case, config, target)[index]
    known = target.architecture
    arch = known or replace(budget.ARCHITECTURES["sm_90"], name=f"sm_{target.capability}", capability=target.capability)
    faults = budget.measure(launch, arch).faults
    # of an architecture whose limits are not known, only what the compiler itself says
    return [fault for fault in faults if known is not None or fault.startswith("does not compile")]


class Compiler:
    """Compiles launches in processes forked before CUDA is in use: Triton's cache on disk has them when they are timed.

    Without processes (``jobs`` = 0), and where one of them fails, a kernel is compiled by its first launch.
    """

    def __init__(self, jobs: int) -> None:
        self.pool = ProcessPoolExecutor(jobs, mp_context=get_context("fork")) if jobs else None
        self.futures: dict[str, Future[list[str]]] = {}
        self.keys: dict[tuple[Config | None, Case], list[str]] = {}
        self.target: Target | None = None
        self.failed = ""
        if self.pool is not None:
            # all processes are forked by the first task
            self.pool.submit(int).result()

    def submit(self, config: Config | None, cases: Iterable[Case]) -> None:
        """Begin to compile what these cases launch, but for what was begun before."""
        if self.pool is None or self.target is None or self.failed:
            return
        for case in cases:
            try:
                todo = launches(case, config, self.target)
                self.keys[config, case] = [launch.key for launch in todo]
                for index, launch in enumerate(todo):
                    if launch.key not in self.futures:
                        self.futures[launch.key] = self.pool.submit(_compile, case, config, index, self.target)
            except Exception as error:
                self.failed = f"{type(error).__name__}: {error}"
                return

    def fault(self, config: Config | None, case: Case, until: float) -> str | None:
        """Wait for what a case launches: why it cannot be used, or None."""
        for key in self.keys.get((config, case), ()):
            try:
                faults = self.futures[key].result(timeout=max(until - time.monotonic(), 0.01))
            except TimeoutError:
                return f"{NOT_REACHED}: still compiling"
            except Exception as error:
                self.failed = f"{type(error).__name__}: {error}"
                return None
            if faults:
                return f"{faults[0]} ({case})"
        return None

    def close(self) -> None:
        """Drop what was not compiled."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


# One configuration on one case


@dataclass
class Bench:
    """The device that candidates run on, and the compiler that runs ahead of it."""

    device: torch.device
    compiler: Compiler
    # launches on trial that took long enough to have been compiled
    slow: int = 0

    def __post_init__(self) -> None:
        self.like = torch.empty(0, dtype=torch.bfloat16, device=self.device)

    def attempt(self, config: Config, prepared: Prepared, until: float) -> str | None:
        """Run a case once with a configuration: why it cannot be used, or None. Lost if the GPU is."""
        case, spilling = prepared.case, []
        reason = self.compiler.fault(config, case, until)
        if reason is not None:
            return reason

        def watched(before: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            compiled = before(*arguments, **options)
            self.slow += time.perf_counter() - start > 0.3
            if getattr(compiled, "n_spills", 0):
                spilling.append(f"spills {compiled.n_spills} registers ({case})")
            return compiled

        try:
            with precision(case.kind), trial(case.op, config), poisoned(), _jit_run(watched), torch.no_grad():
                prepared.values["out"].fill_(torch.nan)
                found = run(case, prepared.values)
                self.synchronize()
        except Exception as error:
            return f"{self.survived(error)} ({case})"
        return spilling[0] if spilling else prepared.fault(found)

    def synchronize(self) -> None:
        """Wait for the GPU; an error of it that stays comes up here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def survived(self, error: Exception) -> str:
        """An error in a line; Lost where the GPU does not answer after it."""
        try:
            self.synchronize()
        except Exception as lost:
            raise Lost(str(lost).strip().splitlines()[0]) from error
        return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])

    def prepare(self, case: Case) -> Prepared | None:
        """A case on the device, or None if it does not fit in its memory."""
        try:
            return Prepared.make(case, self.device)
        except torch.OutOfMemoryError:
            return None

    def microseconds(self, config: Config, prepared: Prepared) -> float:
        """The time of one launch, with a cold L2 cache, from a CUDA graph where it can be captured."""
        case = prepared.case
        try:
            with precision(case.kind), trial(case.op, config), torch.no_grad():
                return microseconds(lambda: run(case, prepared.values), self.device)
        except Exception as error:
            self.survived(error)
            return FAILED


def microseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median, replayed from a CUDA graph with a cold L2 cache; off the GPU one call, which measures nothing."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return layers.rounded((time.perf_counter() - start) * 1e6)
    from triton.testing import do_bench

    graph = layers.captured(function)
    ms = do_bench(graph.replay if graph is not None else function, warmup=WARMUP, rep=REPETITIONS, quantiles=[0.5])
    return layers.rounded(1e3 * (ms[0] if isinstance(ms, list) else ms))


# The groups: what one line of the file is for


@dataclass
class Group:
    """One op, type and bucket of rows: its candidates, the present one first, and what they are tried on."""

    op: str
    kind: str
    max_rows: int | None
    max_rank: int | None
    candidates: list[Config]
    screen: list[Case]
    cases: list[Case]
    checks: list[Case]
    rejected: dict[Config, str] = field(default_factory=dict)
    screened: dict[Config, dict[Case, float]] = field(default_factory=dict)
    times: dict[Config, dict[Case, float]] = field(default_factory=dict)
    chosen: Config | None = None
    # the configuration of this run, or why there is none
    state: str = NOT_REACHED

    @property
    def present(self) -> Config:
        """What the library takes without this file."""
        return self.candidates[0]

    @property
    def name(self) -> str:
        """For people."""
        rows = f"≤ {self.max_rows} rows" if self.max_rows is not None else "any rows" if self.op == "linear" else ""
        return " ".join(part for part in (self.op, self.kind, rows) if part)


def describe(config: Config) -> str:
    """The fields that are not as a Config has them by default."""
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in sparse(config).items())


def sparse(config: Config) -> dict[str, int]:
    """A Config as files have it: tile sizes that are used, warps and stages, and what is not the default."""
    always = ("num_warps", "num_stages")
    return {
        f.name: getattr(config, f.name)
        for f in CONFIG_FIELDS
        if f.name in always or getattr(config, f.name) != f.default
    }


def candidates(op: str, kind: str, max_rows: int | None) -> Iterator[Config]:
    """Launch configurations worth a try, the likelier ones first."""
    exact = kind == "float32"
    tiles: tuple[tuple[int, int, int], ...]
    if op == "linear" and kind == "16-bit":
        first, second = {32: (32, 16), 128: (64, 128), 256: (64, 128), 512: (128, 64), None: (128, 256)}[max_rows]
        tiles = ((64, 64, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4))
        depths = ((8, 1), (4, 1), (1, 2))
        for block_m, of, ways in ((first, tiles, depths), (second, tiles[:3], depths[:2])):
            for (n, d, warps), (unroll, stages) in itertools.product(of, ways):
                yield Config(block_m, n, d, warps, stages, unroll)
    elif op == "linear":
        tiles = (
            ((64, 16, 8), (64, 32, 8), (32, 32, 4), (64, 16, 4)) if exact else ((64, 32, 8), (64, 16, 8), (128, 32, 8))
        )
        blocks = (32, 64) if exact else (64, 128)
        for block_m, (n, d, warps), (unroll, stages) in itertools.product(blocks, tiles, ((1, 2), (4, 1))):
            yield Config(block_m, n, d, warps, stages, unroll)
    elif op == "weight_grad" and kind == "16-bit":
        tiles = ((64, 128, 8), (128, 128, 8), (64, 128, 4), (128, 256, 8), (64, 256, 8), (64, 64, 4))
        for stages, block_m, (n, d, warps) in itertools.product((3, 4), (64, 32), tiles):
            yield Config(block_m, n, d, warps, stages)
    elif op == "weight_grad":
        tiles = (
            ((64, 64, 8), (64, 128, 8), (64, 64, 4))
            if exact
            else ((64, 64, 8), (64, 128, 8), (128, 128, 8), (64, 64, 4))
        )
        for stages, block_m, (n, d, warps) in itertools.product((2, 3), (32, 16) if exact else (32, 64), tiles):
            yield Config(block_m, n, d, warps, stages)
    elif op == "merge":
        tiles = ((16, 128, 4), (8, 256, 4), (32, 64, 4), (32, 128, 8), (16, 256, 8), (4, 512, 4), (64, 64, 8))
        for (n, d, warps), (unroll, stages) in itertools.product(tiles, ((8, 1), (4, 1), (1, 2))):
            yield Config(0, n, d, warps, stages, unroll)
    elif op == "merge_grad":
        # blocks of 64 and more: the partial sums of P and Q stay below a weight
        for n, d, warps in itertools.product((64, 128), (64, 128), (4, 8)):
            yield Config(16, n, d, warps, 2)
    elif op == "preference":
        # few rows: weights are read, by many programs with many loads in flight; many: large tiles
        tiles = ((64, 128, 4), (64, 64, 4), (32, 128, 4), (128, 64, 4), (64, 128, 8))
        if max_rows is None:
            tiles = ((128, 64, 8), (256, 64, 8), (128, 64, 4), (64, 64, 4))
        around: tuple[int, ...] = {32: (32, 16), 512: (64, 32, 128)}.get(max_rows or 0, (128, 256))
        for block_m, (n, d, warps), stages in itertools.product(around, tiles, (3, 4)):
            yield Config(block_m, n, d, warps, stages)
    elif op == "widen":
        for block_m, d, warps, stages in itertools.product((32, 64, 16), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_d=d, num_warps=warps, num_stages=stages)
    elif op == "shrink":
        for block_m, d, warps, stages in itertools.product((64, 32, 128), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_d=d, num_warps=warps, num_stages=stages)
    elif op == "factor_grad":
        for block_m, n, warps, stages in itertools.product((64, 32, 128), (64, 128), (4, 8), (3, 2)):
            yield Config(block_m=block_m, block_n=n, num_warps=warps, num_stages=stages)


def _own_rows(layer: Layer, few: bool) -> int:
    """A layer's rows: one image, or a batch of them; a language model has no number of its own."""
    if layer.tokens == 1:
        return LANGUAGE_MODEL_ROWS // (16 if few else 1)
    return layer.tokens * (1 if few else layer.items)


def _rank(layer: Layer) -> int:
    return kernels.RANK if limits.has_low_rank(layer.name) else 0


def timing_cases(op: str, max_rows: int | None, among: Sequence[Layer]) -> list[Case]:
    """What candidates of a group are timed on: every layer."""
    found = []
    for layer in among:
        rank = _rank(layer)
        shape: dict[str, Any] = {"n": layer.n, "d": layer.d}
        if op == "linear":
            for rows in ROWS.get(max_rows) or (_own_rows(layer, few=False),):
                found += [
                    Case("forward", **shape, rows=rows, rank=rank, bias=True),
                    Case("dx", **shape, rows=rows, rank=rank),
                ]
        elif op == "preference":
            for rows in PREFERENCE_ROWS[max_rows] or (_own_rows(layer, few=False),):
                # a preference for each image, or as many as there can be
                groups = layer.items if rows % layer.items == 0 else 1
                found += [Case(op, **shape, rows=rows, groups=groups, bias=True)] if rank else []
        elif op == "weight_grad":
            found.append(Case(op, **shape, rows=_own_rows(layer, few=max_rows is not None), rank=rank))
        elif op in ("merge", "merge_grad"):
            found += [Case(op, **shape, tasks=tasks, rank=rank) for tasks in ((8, 2) if op == "merge" else (8,))]
        elif rank:
            rows = _own_rows(layer, few=False)
            groups = layer.items if op in ("shrink", "widen") and rows % layer.items == 0 else 1
            found.append(Case(op, **shape, rows=rows, groups=groups))
    return found


def check_cases(op: str, kind: str, max_rows: int | None, max_rank: int | None, tiny: bool) -> list[Case]:
    """What a configuration must also be right on: K, ranks, types and sizes that no timed layer has."""
    n, d = (48, 80) if tiny else (1040, 528)
    rows = min(max_rows or 1000, 257) - 3 if max_rows else (37 if tiny else 1000)
    rows = min(rows, 37) if tiny else rows
    base = Case("forward" if op == "linear" else op, n, d, rows)
    found: list[Case] = []
    if op == "linear":
        for call in ("forward", "dx"):
            for tasks, rank in ((1, 4), (2, 16), (4, 32), (32, 16), (8, 64), (8, 0)):
                found.append(replace(base, call=call, tasks=tasks, rank=rank))
            for tasks in (8, 0):
                found.append(replace(base, call=call, tasks=tasks, per_row=True))
            found.append(replace(base, call=call, rows=1))
        found.append(replace(base, bias=True))
    elif op in ("weight_grad", "merge_grad", "merge"):
        base = replace(base, rows=rows if op == "weight_grad" else 0)
        found = [replace(base, tasks=tasks, rank=rank) for tasks, rank in ((1, 4), (2, 16), (4, 32), (32, 16), (8, 0))]
        if op == "weight_grad":
            found += [replace(base, bias=True), replace(base, rows=1)]
        else:
            found += [replace(base, rank=64), replace(base, tasks=0)]
    else:
        # these are also used where tensors are not aligned
        ranks = [rank for rank in (4, 16, 32, 64) if max_rank is None or rank <= max_rank]
        found = [replace(base, tasks=tasks, rank=rank) for rank, tasks in itertools.product(ranks, (1, 32))]
        found.append(replace(base, n=n + 1, d=d + 1, aligned=False))
        if op in ("shrink", "widen"):
            found.append(replace(base, rows=4 * rows, groups=4))
        if op == "preference":
            found += [replace(base, groups=rows), replace(base, bias=True), replace(base, rows=1)]
    if kind != "16-bit":
        return [replace(case, kind=kind, dtype="float32") for case in found]
    half = [replace(case, dtype="float16") for case in found if (case.tasks, case.rank) in ((2, 16), (1, 16), (4, 32))]
    return found + half


def groups(target: Target, ops: Sequence[str], previous: str | None, quick: bool) -> list[list[Group]]:
    """Everything that can be tuned, most important first, in batches: a batch is decided before the next one begins.

    The lines that the library has now are candidates too: those of the file in use, the default's, and those of
    ``previous``, an earlier file of this GPU.
    """
    among = TINY_LAYERS if quick else sorted(layers.LAYERS, key=lambda layer: "ViT-L" not in layer.name)
    wanted: list[list[tuple[str, str, int | None, int | None]]] = [
        [("merge_grad", "16-bit", None, None)],
        [("widen", "16-bit", None, 32), *(("preference", "16-bit", rows, 32) for rows in PREFERENCE_ROWS)],
        [("merge", "16-bit", None, None)],
        [("linear", "16-bit", rows, None) for rows in ROWS],
        [("weight_grad", "16-bit", None, None), ("weight_grad", "16-bit", 512, None)],
        [("shrink", "16-bit", None, 32), ("factor_grad", "16-bit", None, 32)],
    ]
    for kind in ("tf32", "float32"):
        wanted.append(
            [(op, kind, rows, None) for op, rows in (("linear", None), ("linear", 128), ("weight_grad", None))]
        )
    if quick:
        # one line of each op, the hot ones first
        lines = {line[0]: line for batch in reversed(wanted) for line in reversed(batch)}
        rest = [lines[op] for op in TUNED if op not in (*HOT, "linear")]
        wanted = [[lines[op] for op in HOT], [("linear", "16-bit", 32, None)], rest]
    found = []
    for batch in wanted:
        found.append([group(target, *line, among, previous, quick) for line in batch if line[0] in ops])
    return [batch for batch in found if batch]


def group(
    target: Target,
    op: str,
    kind: str,
    max_rows: int | None,
    max_rank: int | None,
    among: Sequence[Layer],
    previous: str | None,
    quick: bool,
) -> Group:
    """One group with its candidates and cases."""
    top = 1 if op in ("merge", "merge_grad") else (max_rows or 2**14)
    rank = min(kernels.RANK, max_rank or kernels.RANK)
    present = [dispatch.lookup(name, op, kind, top, rank, True) for name in (target.name, "default")]
    if previous is not None:
        earlier = configs.read_entries(previous)
        present += [e.config for e in earlier if e.fits(Asked(op, kind, top, rank, True))][:1]
    found = list(dict.fromkeys([*present, *candidates(op, kind, max_rows)]))[: 2 if quick else MOST]
    cases = timing_cases(op, max_rows, among)
    if kind != "16-bit":
        cases = [replace(case, kind=kind, dtype="float32") for case in cases]
    checks = check_cases(op, kind, max_rows, max_rank, quick)
    if quick:
        cases = [replace(case, tasks=2, dtype="float16") for case in cases]
        checks = [replace(case, tasks=min(case.tasks, 2), dtype="float16") for case in checks[:2]]
    return Group(op, kind, max_rows, max_rank, found, cases[:2], cases, checks)


# Choosing


def scores(times: Mapping[Config, Mapping[Case, float]]) -> list[tuple[Config, float]]:
    """Configurations with their mean time over the best one's, case by case (geometric), best first.

    Only cases that every configuration has a time for are counted.
    """
    shared = [case for case in next(iter(times.values()), {}) if all(case in of for of in times.values())]
    if not shared:
        return []
    best = {case: min(of[case] for of in times.values()) for case in shared}
    found = {
        config: math.exp(sum(math.log(of[case] / best[case]) for case in shared) / len(shared))
        for config, of in times.items()
    }
    return sorted(found.items(), key=lambda item: item[1])


def better(times: Mapping[Config, Mapping[Case, float]], present: Config) -> list[Config]:
    """The configurations at least GAIN times as fast as the present one, best first; all, if it has no time."""
    found = scores(times)
    limit = dict(found).get(present, math.inf)
    return [config for config, score in found if config != present and score * GAIN <= limit]


def screen(group: Group, bench: Bench, until: float) -> None:
    """Every candidate on the first few cases, as far as time goes."""
    prepared = [p for case in group.screen if (p := bench.prepare(case)) is not None]
    for config in group.candidates if prepared else ():
        times: dict[Case, float] = {}
        for p in prepared:
            reason = NOT_REACHED if time.monotonic() > until else bench.attempt(config, p, until)
            if reason is not None:
                group.rejected[config] = reason
                break
            times[p.case] = bench.microseconds(config, p)
        else:
            group.screened[config] = times


def finalists(group: Group) -> list[Config]:
    """The fastest of the screening, and the present one; nothing where that was not reached."""
    if group.rejected.get(group.present, "").startswith(NOT_REACHED):
        return []
    found = [config for config, _ in scores(group.screened)][:FINALISTS]
    return found if group.present in found or group.present in group.rejected else [*found, group.present]


def final(group: Group, bench: Bench, until: float) -> None:
    """The finalists on every case; in turn, so that a change of clocks touches them alike."""
    group.times = {config: {} for config in finalists(group)}
    for case in group.cases:
        p = bench.prepare(case)
        if p is None:
            continue
        reasons: dict[Config, str | None] = {}
        for config in group.times:
            reasons[config] = NOT_REACHED if time.monotonic() > until else bench.attempt(config, p, until)
        if any(reason is not None and reason.startswith(NOT_REACHED) for reason in reasons.values()):
            break
        for config, reason in reasons.items():
            if reason is not None:
                group.rejected[config] = reason
                del group.times[config]
        found: dict[Config, list[float]] = {config: [] for config in group.times}
        for _ in range(ROUNDS):
            for config in group.times:
                found[config].append(bench.microseconds(config, p))
        for config, times in found.items():
            group.times[config][case] = min(times)
    measured = len(next(iter(group.times.values()), {}))
    if measured and 2 * measured >= len(group.cases):
        group.state = "timed"


def decide(group: Group, bench: Bench, until: float) -> None:
    """Take the fastest candidate that is right wherever it will be used."""
    for config in better(group.times, group.present):
        reason: str | None = None
        for case in group.checks:
            p = bench.prepare(case)
            reason = NOT_REACHED if p is None or time.monotonic() > until else bench.attempt(config, p, until)
            if reason is not None:
                break
        if reason is None:
            group.chosen, group.state = config, "tuned"
            return
        if reason.startswith(NOT_REACHED):
            group.state = f"{NOT_REACHED}: no time or memory left to check {describe(config)}"
            return
        group.rejected[config] = reason
    group.state = "as before" if group.present not in group.rejected else f"rejected: {group.rejected[group.present]}"


def tune(batch: Sequence[Group], bench: Bench, until: float, say: Callable[[str], None]) -> None:
    """Screen, time and decide a batch of groups; kernels of the next group are compiled meanwhile."""
    compiler, start = bench.compiler, time.monotonic()

    def by(group: Group, begin: float, end: float) -> float:
        """When a group has to be through a part of the batch's time."""
        return start + (until - start) * (begin + (end - begin) * (batch.index(group) + 1) / len(batch))

    for group in batch:
        for config in group.candidates:
            compiler.submit(config, group.screen)
    for group in batch:
        screen(group, bench, by(group, 0.0, 0.5))
        for config in finalists(group):
            compiler.submit(config, group.cases)
    for group in batch:
        final(group, bench, by(group, 0.5, 0.85))
        if group.state == "timed":
            for config in better(group.times, group.present)[:CHECKED]:
                compiler.submit(config, group.checks)
    for group in batch:
        if group.state == "timed":
            decide(group, bench, until)
        say(f"{group.name}: {group.state}" + (f", {describe(group.chosen)}" if group.chosen is not None else ""))


def lines(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Lines of the file, narrower buckets first. The first line that fits is taken: below a tuned bucket every other
    one has its line too, with what it had. Without any change, the lines say what there was.
    """
    families: dict[tuple[str, str], list[Group]] = {}
    for group in sorted(found, key=lambda g: math.inf if g.max_rows is None else g.max_rows):
        families.setdefault((group.op, group.kind), []).append(group)
    unchanged = all(group.chosen is None for group in found)
    written: list[dict[str, Any]] = []
    for family in families.values():
        last = max((i for i, group in enumerate(family) if unchanged or group.chosen is not None), default=-1)
        of_family: list[tuple[Group, Config]] = []
        for group in family[: last + 1]:
            config = group.present if group.chosen is None else group.chosen
            if of_family and of_family[-1][1] == config:
                # the wider line serves both
                of_family.pop()
            of_family.append((group, config))
        for group, config in of_family:
            line: dict[str, Any] = {"op": group.op, "dtype": group.kind}
            if group.op not in ("widen", "shrink", "factor_grad"):
                line["aligned"] = True
            line |= {key: value for key in ("max_rows", "max_rank") if (value := getattr(group, key)) is not None}
            written.append({**line, "config": sparse(config)})
    return written


# Rates and strategies


def measured_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Fields of :class:`pmkernels.costs.Rates`. L2's rate is a slope, of two sizes of copies that stay in it."""
    with precision("float32"):
        found = kernels.ceilings(device, quick)
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    with precision("tf32"):
        tf32 = 2 * size**3 / (kernels.timed(lambda: a @ b, device)[0] * 1e-3)
    rates = {"half": found["bfloat16"], "tf32": tf32, "float32": found["float32"], "memory": found["copy"]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rates["multiprocessors"] = properties.multi_processor_count
        cache = int(getattr(properties, "L2_cache_size", 0))
        one = torch.zeros(1, device=device)
        rates["launch"] = _warm_seconds(lambda: one.add_(1))
        if cache:
            seconds = {}
            for count in (cache // 64, cache // 16):
                source = torch.randn(count, device=device)
                target = torch.empty_like(source)
                seconds[8 * count] = _warm_seconds(lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
            (few, short), (many, long) = seconds.items()
            if long > short:
                # below the rate of memory it would be no rate of a cache
                rates["cache"] = max((many - few) / (long - short), found["copy"])
            rates["cache_bytes"] = cache
    return {name: float(f"{value:.4g}") if name != "multiprocessors" else value for name, value in rates.items()}


def _warm_seconds(function: Callable[[], Any], times: int = 50, replays: int = 20) -> float:
    """Seconds of one of many calls in a CUDA graph, with a warm cache."""
    graph = layers.captured(lambda: [function() for _ in range(times)])
    repeat: Callable[[], Any] = graph.replay if graph is not None else (lambda: [function() for _ in range(times)])
    repeat()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        repeat()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / (times * replays)


@dataclass(frozen=True)
class Point:
    """One operation of one layer, whose strategies are compared over rows."""

    op: str
    n: int
    d: int
    tasks: int
    rank: int

    def choose(self, rows: int, like: Tensor) -> str:
        """What ``auto`` takes with the configuration file in use, for tensors like that."""
        return strategies.choose(self.op, "auto", like, rows=rows, n=self.n, d=self.d, tasks=self.tasks, rank=self.rank)


def decided(times: Mapping[int, tuple[float, float]]) -> dict[int, str]:
    """Rows -> the faster strategy, of times (fused, streamed). A tie goes with the next smaller number of rows that is
    decided, else the next larger one: noise must not make crossovers. Nothing decided at all: nothing.
    """
    found: dict[int, str | None] = {}
    last: str | None = None
    for rows in sorted(times):
        fused, streamed = times[rows]
        if max(fused, streamed) > TIE * min(fused, streamed):
            last = "fused" if fused < streamed else "streamed"
        found[rows] = last
    first = next((label for label in found.values() if label is not None), None)
    return {} if first is None else {rows: label or first for rows, label in found.items()}


def boundaries(best: Mapping[int, str], predicted: Mapping[int, str]) -> dict[int, str]:
    """The rows that a file must name so that the nearest one says, for every measured number, what was measured.

    None where the cost model is right everywhere; else both sides of each crossover, or one line if there is none.
    """
    if all(predicted[rows] == label for rows, label in best.items()):
        return {}
    ordered = sorted(best)
    found: dict[int, str] = {}
    for before, after in itertools.pairwise(ordered):
        if best[before] != best[after]:
            found |= {before: best[before], after: best[after]}
    return found or {ordered[0]: best[ordered[0]]}


@dataclass
class Strategies:
    """Microseconds (fused, streamed) of each operation over rows, what was wrong, and what time did not suffice for."""

    times: dict[Point, dict[int, tuple[float, float]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def measure(self, bench: Bench, layer: Layer, tasks: int, powers: Sequence[int], until: float) -> None:
        """One layer with K task vectors; an operation counts only with all its rows."""
        device, title = bench.device, f"strategies of {layer.name}, K = {tasks}"
        # the interpreter cuts bfloat16 off where a GPU rounds
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        everything = sorted({*powers, *({layer.tokens, layer.items * layer.tokens} if layer.tokens > 1 else ())})
        free = layers.free_memory(device)
        rows = [m for m in everything if layers.needed_memory(layer, tasks, m) <= free]
        if not rows or time.monotonic() > until:
            self.missing.append(title)
            return
        case = layers.Case.make(layer, tasks, rows[-1], dtype, device)
        for name, op in layers.OPERATIONS.items():
            times: dict[int, tuple[float, float]] = {}
            for m in rows:
                if time.monotonic() > until:
                    self.missing.append(f"{title}, {name}")
                    return
                with torch.no_grad():
                    times[m] = self._both(bench, case, name, m)
            self.times[Point(op, layer.n, layer.d, tasks, _rank(layer))] = times

    def measure_preference(self, bench: Bench, layer: Layer, powers: Sequence[int], until: float) -> None:
        """A served layer with a preference for each image; it counts only with all its rows."""
        title, times = f"preference of {layer.name}", dict[int, tuple[float, float]]()
        for case in preference_cases(layer, powers):
            # the interpreter cuts bfloat16 off where a GPU rounds
            case = case if bench.device.type == "cuda" else replace(case, dtype="float16")
            prepared = None if time.monotonic() > until else bench.prepare(case)
            if prepared is None:
                self.missing.append(title)
                return
            v = prepared.values
            served = (v["x"], v["wide"], v["G"], v["right"], v["gamma"].view(case.groups, 1, -1), v["bias"])
            if case.groups == 1:
                served = (*served[:4], v["gamma"][0], v["bias"])
            else:
                served = (v["x"].view(case.groups, -1, case.d), *served[1:])

            def variant(strategy: str, served: tuple[Any, ...] = served, rows: int = case.rows) -> layers.Variant:
                return lambda: [pmkernels.preference_linear(*served, strategy=strategy).view(rows, -1)]

            def fault(found: Sequence[Tensor], prepared: Prepared = prepared) -> str | None:
                return prepared.fault(found)

            with torch.no_grad():
                times[case.rows] = self._compared(bench, variant, fault, f"{title}, M = {case.rows}")
        self.times[Point("preference", layer.n, layer.d, 0, _rank(layer))] = times

    def _both(self, bench: Bench, case: layers.Case, name: str, rows: int) -> tuple[float, float]:
        truth, plain = layers.truth(case, name, rows)
        variants = layers.variants(case, name, rows)

        def fault(found: Sequence[Tensor]) -> str | None:
            error = relative_error(found, truth)
            allowed = error <= TOLERANCE * plain + 1e-6
            return None if allowed else f"error {error:.2e}, plain PyTorch {plain:.2e}"

        what = f"{name} of {case.layer.name}, K = {case.tasks}, M = {rows}"
        return self._compared(bench, variants.__getitem__, fault, what)

    def _compared(
        self,
        bench: Bench,
        variant: Callable[[str], layers.Variant],
        fault_of: Callable[[Sequence[Tensor]], str | None],
        what: str,
    ) -> tuple[float, float]:
        """Microseconds of fused and streamed. A strategy that is wrong counts as slower than anything."""
        found = []
        for strategy in ("fused", "streamed"):
            us = FAILED
            try:
                fault = fault_of(variant(strategy)())
                if fault is None:
                    us = microseconds(variant(strategy), bench.device)
            except Exception as error:
                fault = bench.survived(error)
            if fault is not None:
                self.wrong.append(f"{what}, {strategy}: {fault}")
            found.append(us)
        return found[0], found[1]


def strategy_cases(layer: Layer, tasks: int, powers: Sequence[int]) -> Iterator[Case]:
    """What measuring the strategies of a layer launches, to be compiled before."""
    shape: dict[str, Any] = {"n": layer.n, "d": layer.d, "tasks": tasks, "rank": _rank(layer)}
    yield from (Case("merge", **shape), Case("merge_grad", **shape))
    for rows in sorted({*powers, layer.tokens, layer.items * layer.tokens}):
        yield from (
            Case("forward", **shape, rows=rows, bias=True),
            Case("dx", **shape, rows=rows),
            Case("weight_grad", **shape, rows=rows),
        )


def preference_cases(layer: Layer, powers: Sequence[int]) -> Iterator[Case]:
    """What measuring the strategies of a served layer launches: a preference for each image where rows are images."""
    for rows in sorted({*powers, *({layer.tokens, layer.items * layer.tokens} if layer.tokens > 1 else ())}):
        groups = layer.items if rows == layer.items * layer.tokens else 1
        yield Case("preference", layer.n, layer.d, rows, rank=_rank(layer), groups=groups, bias=True)


def choices(
    measured: Mapping[Point, Mapping[int, tuple[float, float]]], like: Tensor
) -> tuple[list[dict[str, Any]], dict[Point, dict[int, str]]]:
    """Lines of the file, where the cost model with the rates and tiles in use would choose otherwise; all labels."""
    written, labels = [], {}
    for point, times in measured.items():
        best = labels[point] = decided(times)
        predicted = {rows: point.choose(rows, like) for rows in best}
        for rows, label in boundaries(best, predicted).items():
            line = {"op": point.op, "dtype": "16-bit", "n": point.n, "d": point.d, "tasks": point.tasks}
            written.append({**line, "rank": point.rank, "rows": rows, "best": label})
    return written, labels


# The file, and what is said of it


def validate(
    name: str,
    text: str,
    found: Sequence[Group],
    base: str,
    labels: Mapping[Point, Mapping[int, str]],
    like: Tensor,
) -> list[str]:
    """Read a file as the library does: what it says that this run did not find."""
    faults = []

    def looked_up() -> dict[tuple[str, int], Config]:
        table, below = {}, dict.fromkeys((g.op, g.kind) for g in found)
        for op, kind in below:
            for rows in (2**power for power in range(15)):
                table[f"{op} {kind}", rows] = dispatch.lookup(
                    dispatch.gpu_file(like.device), op, kind, rows, kernels.RANK, True
                )
        return table

    with active(base):
        before = looked_up()
    with active(name, text):
        dispatch.in_force().entries(name)
        after = looked_up()
        for point, best in labels.items():
            faults += [
                f"{point} at {rows} rows: {label} was measured, the file gives {point.choose(rows, like)}"
                for rows, label in best.items()
                if point.choose(rows, like) != label
            ]
    families: dict[str, list[Group]] = {}
    for group in sorted(found, key=lambda g: math.inf if g.max_rows is None else g.max_rows):
        families.setdefault(f"{group.op} {group.kind}", []).append(group)
    for (family, rows), config in after.items():
        owner = next((g for g in families[family] if g.max_rows is None or rows <= g.max_rows), None)
        expected = before[family, rows] if owner is None or owner.chosen is None else owner.chosen
        if config != expected:
            faults.append(f"{family} at {rows} rows: {describe(expected)} was meant, the file gives {describe(config)}")
    return faults


def _mean(times: Mapping[Case, float], cases: Iterable[Case]) -> float:
    values = [times[case] for case in cases]
    return math.exp(sum(map(math.log, values)) / len(values))


def table(
    found: Sequence[Group], labels: Mapping[Point, Mapping[int, str]], rates: Mapping[str, float], written: int
) -> str:
    """Gains, crossovers and rates."""
    rows = ["| group | before µs | now µs | gain | configuration |", "|---|---:|---:|---:|---|"]
    for group in found:
        config = group.chosen or group.present
        before, now = group.times.get(group.present), group.times.get(config)
        cells = "–", "–", "–"
        if before is not None and now is not None:
            shared = before.keys() & now.keys()
            if shared:
                old, new = _mean(before, shared), _mean(now, shared)
                cells = f"{old:.2f}", f"{new:.2f}", f"{old / new:.2f}×"
        rows.append(f"| {group.name} | {' | '.join(cells)} | {describe(config) if group.chosen else group.state} |")
    if labels:
        rows += ["", "Rows from which on streamed is faster than fused, as measured:", ""]
        operations = ("forward", "dx", "weight_grad", "preference")
        rows += [f"| layer | K | {' | '.join(operations)} |", f"|---|{'---:|' * (1 + len(operations))}"]
        shapes = dict.fromkeys((p.n, p.d, p.rank, p.tasks) for p in labels)
        for n, d, rank, tasks in shapes:
            ends = [_crossover(labels.get(Point(op, n, d, tasks, rank))) for op in operations]
            rows.append(f"| {n}×{d}, r = {rank} | {tasks} | {' | '.join(ends)} |")
        rows += ["", f"{written} strategy lines written: where the cost model would choose otherwise."]
    rows += ["", "Rates: " + ", ".join(f"{name} {value:.4g}" for name, value in rates.items())]
    return "\n".join(rows)


def _crossover(best: Mapping[int, str] | None) -> str:
    if not best:
        return "–"
    fused = [rows for rows, label in best.items() if label == "fused"]
    later = [rows for rows in best if not fused or rows > max(fused)]
    return str(min(later)) if later else "never"


def recorded(group: Group) -> dict[str, Any]:
    """A group for the full record: every candidate, its times in microseconds or why it was rejected."""
    tried = []
    for config in group.candidates:
        times = group.times.get(config) or group.screened.get(config, {})
        tried.append(
            {
                "config": sparse(config),
                "rejected": group.rejected.get(config),
                "final": config in group.times,
                "times": {str(case): us for case, us in times.items()},
            }
        )
    return {
        "op": group.op,
        "dtype": group.kind,
        "max_rows": group.max_rows,
        "max_rank": group.max_rank,
        "state": group.state,
        "present": sparse(group.present),
        "chosen": None if group.chosen is None else sparse(group.chosen),
        "candidates": tried,
    }


EPILOG = """\
examples:
  python -m benchmarks.tune                          eight minutes; the library uses the result from its next start on
  python -m benchmarks.tune --minutes 3 --ops linear strategies
                                                     part of it; other ops keep the lines that the file has
  python -m benchmarks.tune --out /tmp/gpu.json --record /tmp/record.json
                                                     leave the library as it is, and keep every candidate's times
  python -m benchmarks.tune --quick                  a rehearsal on any machine: tiny shapes, measures nothing

After it, `python -m benchmarks.budget` compiles every line of the file for its architecture and `make gpu` tests them.
What time did not suffice for keeps its defaults, and the file lists it under "untuned".
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two candidates each: proves that it runs")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: pmkernels/configs/<gpu>.json; --quick: a temporary file)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="stop after that long, with what there is (default: 8)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes that compile; 0: none, each first launch compiles (default: one per core but one)",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=Path(),
        help="also write every candidate's times (default path: benchmarks/results/tune-<gpu>-<date>.json)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 1 if something the library would use is wrong, 2 if nothing can run."""
    chosen = parse(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not chosen.quick:
        print("tune: expected a CUDA GPU, got none (--quick rehearses on the CPU)", file=sys.stderr)
        return 2
    if on_gpu == INTERPRETING:
        wanted = "unset on a GPU" if on_gpu else "1 before the start, without a GPU"
        print(f"tune: TRITON_INTERPRET: expected {wanted}", file=sys.stderr)
        return 2
    jobs = max((os.cpu_count() or 2) - 1, 1) if chosen.jobs is None else max(chosen.jobs, 0)
    # forked before the GPU is in use
    compiler = Compiler(jobs if on_gpu else 0)
    try:
        return _tune(
            chosen, compiler, ["python -m benchmarks.tune", *(sys.argv[1:] if arguments is None else arguments)]
        )
    finally:
        compiler.close()


def _target(device: torch.device) -> tuple[str, str, Target]:
    """The GPU's name for people and for files, and what there is for it besides a file of its own."""
    if device.type != "cuda":
        return "rehearsal", "rehearsal", Target(90, 132, "default")
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    base = arch if arch in dispatch.in_force().files else "default"
    target = Target(10 * major + minor, dispatch.multiprocessors(device), base)
    return torch.cuda.get_device_name(device), dispatch.gpu_name(device.index), target


def _tune(chosen: argparse.Namespace, compiler: Compiler, command: Sequence[str]) -> int:
    start = time.monotonic()
    end = start + 60 * chosen.minutes

    def say(line: str) -> None:
        now = time.monotonic()
        print(f"[{now - start:4.0f} s, {max(end - now, 0):4.0f} s left] {line}", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # captures may collect garbage, thousands of times: what was imported need not be looked through
        gc.freeze()
    title, name, target = _target(device)
    compiler.target = target
    out = chosen.out or (_temporary() if chosen.quick else CONFIGS / f"{name}.json")
    previous = out.read_text(encoding="utf-8") if out.exists() and out.stat().st_size else None
    bench, strategies = Bench(device, compiler), Strategies()
    untuned: list[str] = []
    if chosen.quick:
        say("a rehearsal: tiny shapes, nothing is measured")
    report = results.header(command) | {"suite": "tune", "quick": chosen.quick, "gpu": name}
    report["clocks_before"] = results.clocks()
    rates = measured_rates(device, chosen.quick)
    say("rates measured")
    with active(target.name):
        # what is not asked for is not tried, but a file without any line is none
        batches = groups(target, [op for op in TUNED if op in chosen.ops] or TUNED[:1], previous, chosen.quick)
    found = [group for batch in batches for group in batch]
    head = {
        "gpu": f"{'a rehearsal, in which nothing was measured' if chosen.quick else f'{title}, as measured'} by "
        "python -m benchmarks.tune",
        "architectures": [f"sm_{target.capability}"] if device.type == "cuda" else [],
    }
    machine = {key: value for key, value in results.machine().items() if key in ("gpu", "driver", "torch", "triton")}

    def file(written: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        kept = [] if previous is None else [e for e in json.loads(previous)["entries"] if e["op"] not in chosen.ops]
        own = lines(found) if set(chosen.ops) & set(TUNED) or not kept else []
        tuned = {**results.header(command), **machine, "untuned": untuned}
        return {**head, "tuned": tuned, "rates": rates, "entries": [*own, *kept], "strategies": [*written]}

    def tune_batches(batches: Sequence[Sequence[Group]], until: float) -> None:
        for i, batch in enumerate(batches):
            now, left = time.monotonic(), sum(len(b) for b in batches[i:])
            with active(target.name):
                tune(batch, bench, now + (until - now) * len(batch) / left, say)

    def measure_strategies(among: Sequence[Layer], until: float) -> None:
        text = json.dumps(file())
        compiler.target = replace(target, name=name, text=text)
        with active(name, text):
            _measure_strategies(strategies, bench, among, chosen.quick, until, say)
        compiler.target = target

    wanted = batches if set(chosen.ops) & set(TUNED) else []
    hot = [batch for batch in wanted if batch[0].kind == "16-bit" and batch[0].op in HOT]
    others = [batch for batch in wanted if batch not in hot]
    among = TINY_LAYERS if chosen.quick else layers.LAYERS
    # ViT-L/14 before ViT-B/32
    transformers = [layer for layer in among if layer.tokens > 1]
    transformers.sort(key=lambda layer: layer.tokens, reverse=True)
    phases: list[tuple[float, Callable[[float], None]]] = []
    if hot:
        phases.append((HOT_SHARE, lambda until: tune_batches(hot, until)))
    if "strategies" in chosen.ops:
        phases.append((STRATEGY_SHARE, lambda until: measure_strategies(transformers, until)))
    if others:
        phases.append((OTHERS_SHARE, lambda until: tune_batches(others, until)))
    if "strategies" in chosen.ops:
        no_transformers = [layer for layer in among if layer not in transformers]
        phases.append((REST_SHARE, lambda until: measure_strategies(no_transformers, until)))
    try:
        for number, (share, phase) in enumerate(phases):
            now, later = time.monotonic(), sum(other for other, _ in phases[number:])
            # what an earlier phase leaves is for those after it
            phase(now + share / later * (end - now))
    except Lost as error:
        untuned.append(f"everything after the GPU was lost: {error}")
    untuned += strategies.missing
    done = ("tuned", "as before")
    untuned += [f"{g.name}: {g.state}" for g in found if g.op in chosen.ops and g.state not in done]
    with active(name, json.dumps(file())):
        written, labels = choices(strategies.times, bench.like)
    if "strategies" not in chosen.ops and previous is not None:
        written = json.loads(previous).get("strategies", [])
    results.write(out, file(written))
    faults = validate(name, out.read_text(encoding="utf-8"), found, target.name, labels, bench.like)
    say(f"written and read again: {out}")
    wrong = [*strategies.wrong]
    wrong += [f"{group.name}: {group.rejected[group.present]}" for group in found if _uses_a_wrong_one(group)]
    if chosen.record is not None:
        path = chosen.record if chosen.record != Path() else results.RESULTS / f"tune-{name}-{report['date']}.json"
        report |= {"rates": rates, "groups": [recorded(group) for group in found], "wrong": wrong, "untuned": untuned}
        report["strategies"] = [
            {**asdict(point), "times": {str(m): list(us) for m, us in times.items()}, "best": labels.get(point, {})}
            for point, times in strategies.times.items()
        ]
        results.write(path, report | {"clocks_after": results.clocks(), "environment": results.machine()})
        say(f"every candidate: {path}")
    print(table(found, labels, rates, len(written)))
    notes = [f"REJECTED {g.name}, {describe(c)}: {why}" for g in found for c, why in g.rejected.items() if _wrong(why)]
    if compiler.failed:
        notes.append(f"from then on kernels were compiled by their first launch: {compiler.failed}")
    if compiler.futures:
        notes.append(f"{len(compiler.futures)} kernels compiled ahead; {bench.slow} trial launches took over 0.3 s")
    notes += [f"UNTUNED {line}" for line in untuned] + [f"WRONG {line}" for line in (*wrong, *faults)]
    if chosen.quick:
        notes.append("a rehearsal: none of these figures is a measurement")
    print("\n".join(notes))
    return 1 if wrong or faults else 0


def _measure_strategies(
    strategies: Strategies,
    bench: Bench,
    among: Sequence[Layer],
    quick: bool,
    until: float,
    say: Callable[[str], None],
) -> None:
    """Every one of these layers with every K, all of their kernels compiled ahead."""
    powers, tasks = ((1,), (2,)) if quick else (layers.POWERS, TASKS)
    todo = list(itertools.product(tasks, among))
    for count, layer in todo:
        bench.compiler.submit(None, strategy_cases(layer, count, powers))
    for count, layer in todo:
        for case in strategy_cases(layer, count, powers):
            bench.compiler.fault(None, case, until)
        strategies.measure(bench, layer, count, powers, until)
        say(f"strategies of {layer.name}, K = {count}")
    served = [layer for layer in among if _rank(layer)]
    for layer in served:
        bench.compiler.submit(None, _both_kernels(layer, powers))
    for layer in served:
        for case in _both_kernels(layer, powers):
            bench.compiler.fault(None, case, until)
        strategies.measure_preference(bench, layer, powers, until)
        say(f"strategies of {layer.name} with a preference per image")


def _both_kernels(layer: Layer, powers: Sequence[int]) -> Iterator[Case]:
    for case in preference_cases(layer, powers):
        yield from (case, replace(case, call="widen", bias=False))


def _wrong(reason: str) -> bool:
    return reason.startswith("wrong")


def _uses_a_wrong_one(group: Group) -> bool:
    return group.chosen is None and _wrong(group.rejected.get(group.present, ""))


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="pmkernels-tune-")) / "rehearsal.json"


if __name__ == "__main__":
    sys.exit(main())
