"""Microbenchmarks in pytest-benchmark's form: ``pytest benchmarks/micro --benchmark-only``.

On a CUDA GPU every call is timed with the synchronisation that waits for it, after calls that compile and tune. On
other machines plain PyTorch (``eager``) is timed, with fewer rows, and what needs a GPU is skipped: an interpreted
kernel measures nothing. A benchmark's outputs are compared with float64 first, and it fails where they are wrong.

Times are a caller's: launches from Python are in them, and the L2 cache is as the last call left it. For work on the
GPU alone, with a cold cache, there are ``python -m benchmarks.goals`` and ``python -m benchmarks.run``. As many calls
are timed, one a round, as fit in ``--benchmark-max-time``, from ``--benchmark-min-rounds`` to 1000.

Two commits on one machine, each id with itself::

    git switch main
    pytest benchmarks/micro --benchmark-only --benchmark-save=main
    git switch my-work
    pytest benchmarks/micro --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%

Runs lie in ``.benchmarks/<system and Python>``, which git ignores. ``--benchmark-compare`` takes the last run, or a
number, ``=0001``. A run on another GPU is refused; another driver, torch or Triton is warned of.

``pytest benchmarks/micro --help`` lists the options that choose points; a path comes before them. Ids are the points,
``test_forward[ViT-L/14-in-projection-rows8224-K8-r16-bfloat16-auto]``, and ``-k "forward and auto"`` selects by them.
``pytest benchmarks/micro --benchmark-group-by=group,param:rows`` sets strategies side by side.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.common.arguments import sizes
from benchmarks.common.layer_case import Variant
from benchmarks.common.towers import RANK, TASKS, TOWERS
from benchmarks.limits.predictions import rates_of
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, LogitsPoint, Measure, Point, TowerPoint
from benchmarks.suites.kernels import LOGITS
from pmkernels import STRATEGIES, costs, dispatch, launch

# calls before the first that is timed: compilation, the library's choices, clocks
WARM_UP = 3
# more say nothing new about a median, and take GPU time
MOST_ROUNDS = 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOWER_NAMES = {cases.label(tower.name): tower for tower in TOWERS}


def expected(what: str, right: Callable[[str], Any], read: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return a parser that says what it expected where a text is not right."""

    def parse(text: str) -> Any:
        if not right(text):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return read(text)

    return parse


def number(least: int) -> Callable[[str], Any]:
    """Return a parser of whole numbers from ``least`` on."""
    return expected(f"whole numbers of at least {least}", lambda text: text.isdecimal() and int(text) >= least, int)


def one_of(names: Collection[str]) -> Callable[[str], Any]:
    """Return a parser of those names."""
    return expected(f"any of {', '.join(names)}", lambda text: text in names)


LAYER = expected(
    f"OUTxIN, as in 3072x1024, or one of {', '.join(cases.LAYERS)}", lambda text: text in cases.LAYERS or sizes(text)
)
LOGITS_SHAPE = expected("ROWSxCLASSES, as in 256x1000", sizes)


@dataclass(frozen=True)
class Axis:
    """A parameter of benchmarks. ``option`` sets its values, ``word`` stands before one in an id."""

    option: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    word: str = ""


# in the order of an id
AXES = {
    "layer": Axis(
        "--layers", LAYER, "LAYER", f"layers: {', '.join(cases.LAYERS)}, or OUTxIN (default: the in-projections)"
    ),
    "tower": Axis(
        "--towers", one_of(TOWER_NAMES), "MODEL", f"models whose vectors are merged (default: {', '.join(TOWER_NAMES)})"
    ),
    "logits": Axis(
        *(
            "--logits",
            LOGITS_SHAPE,
            "ROWSxCLASSES",
            "shapes of logits (default: several; fewer without a GPU)",
            "logits",
        )
    ),
    "rows": Axis(
        "--rows", number(1), "M", "rows of x (default: those of one image and, on a GPU, of the layer's batch)", "rows"
    ),
    "K": Axis("--tasks", number(1), "K", f"task vectors (default: {TASKS})", "K"),
    "r": Axis(
        "--ranks", number(0), "R", f"ranks of the low-rank term, 0: there is none (default: {RANK}, in MLPs 0)", "r"
    ),
    "dtype": Axis(
        *("--dtypes", one_of(DTYPES), "DTYPE"), f"types: {', '.join(DTYPES)} (default: bfloat16 on a GPU, else float32)"
    ),
    "strategy": Axis(
        *("--strategies", one_of(STRATEGIES), "STRATEGY"),
        f"strategies: {', '.join(STRATEGIES)} (default: all; without a GPU all but eager are skipped)",
    ),
}

# asked for once
machine = functools.cache(results.machine)


def default_values(axis: str, chosen: dict[str, Any], on_gpu: bool) -> Sequence[Any]:
    """Return the values of an axis without its option, given those of the axes before."""
    if axis == "rows":
        layer = cases.find_layer(chosen["layer"])
        return (layer.tokens, layer.rows) if on_gpu else (layer.tokens,)
    if axis == "r":
        return (cases.find_layer(chosen["layer"]).rank,)
    return {
        "layer": tuple(name for name in cases.LAYERS if name.endswith("in-projection")),
        "tower": tuple(TOWER_NAMES),
        "logits": tuple(f"{rows}x{classes}" for rows, classes in (LOGITS if on_gpu else LOGITS[:2])),
        "K": (TASKS,),
        "dtype": ("bfloat16",) if on_gpu else ("float32",),
        "strategy": STRATEGIES,
    }[axis]


def points(
    axes: Sequence[str], config: pytest.Config, chosen: dict[str, Any], on_gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of ``axes``, each as a dictionary. The last axis is the fastest."""
    if not axes:
        yield chosen
        return
    first, *others = axes
    values = config.getoption(AXES[first].option, None) or default_values(first, chosen, on_gpu)
    for value in dict.fromkeys(values):
        yield from points(others, config, {**chosen, first: value}, on_gpu)


def reason_to_skip(point: dict[str, Any], low_rank: bool, on_gpu: bool) -> str | None:
    """Return why a point is not measured here, or None where it is."""
    if low_rank and point["r"] == 0:
        return "r = 0: expected a low-rank term, got none"
    if not on_gpu and point["strategy"] != "eager":
        return "strategies other than eager: expected a CUDA GPU, got none (interpreting a kernel measures nothing)"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("micro", "microbenchmarks (benchmarks/micro): points to measure, every combination")
    for axis in AXES.values():
        group.addoption(axis.option, nargs="+", type=axis.parse, metavar=axis.metavar, default=None, help=axis.help)


def pytest_configure(config: pytest.Config) -> None:
    if launch.INTERPRETING and torch.cuda.is_available():
        raise pytest.UsageError("TRITON_INTERPRET: expected unset, because an interpreted kernel measures nothing")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function not in cases.OFFERS:
        return
    strategies, low_rank = cases.OFFERS[metafunc.function]
    axes = [axis for axis in AXES if axis in metafunc.fixturenames]
    on_gpu, parameters = torch.cuda.is_available(), []
    for point in points(axes, metafunc.config, {}, on_gpu):
        if point["strategy"] not in strategies:
            continue
        reason = reason_to_skip(point, low_rank, on_gpu)
        marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
        name = "-".join(f"{AXES[axis].word}{value}" for axis, value in point.items())
        parameters.append(pytest.param(*point.values(), id=name, marks=marks))
    metafunc.parametrize(axes, parameters)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # the clock at this moment: another in every run
    for name in ("hz_actual", "hz_actual_friendly"):
        machine_info["cpu"].pop(name, None)
    machine_info.update({name: machine().get(name) for name in ("gpu", "driver", "cuda", "torch", "triton", "threads")})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    here, other = (info.get("gpu") or "no GPU" for info in (machine_info, compared_benchmark["machine_info"]))
    if here != other:
        raise pytest.UsageError(f"--benchmark-compare: expected a run on a machine with {here}, got one with {other}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def row_point(layer: str, rows: int, K: int, r: int, dtype: str, strategy: str, device: torch.device) -> Point:
    """Return a layer at a number of rows."""
    return Point(cases.find_layer(layer), rows, K, r, DTYPES[dtype], strategy, device)


@pytest.fixture
def weight_point(layer: str, K: int, r: int, dtype: str, strategy: str, device: torch.device) -> Point:
    """Return a layer where no rows take part."""
    return Point(cases.find_layer(layer), 0, K, r, DTYPES[dtype], strategy, device)


@pytest.fixture
def tower_point(tower: str, K: int, dtype: str, strategy: str, device: torch.device) -> TowerPoint:
    return TowerPoint(TOWER_NAMES[tower], K, DTYPES[dtype], strategy, device)


@pytest.fixture
def logits_point(logits: str, dtype: str, strategy: str, device: torch.device) -> LogitsPoint:
    rows, classes = map(int, logits.split("x"))
    return LogitsPoint(rows, classes, DTYPES[dtype], strategy, device)


def facts(case: Case, device: torch.device, median: float | None) -> dict[str, Any]:
    """Return what is kept beside a case's times: where, what, and its rate. The rate is at the median, in seconds."""
    least, gpu = case.least, dispatch.gpu_name(device.index) if device.type == "cuda" else ""
    figures: dict[str, Any] = {name: machine().get(name) for name in ("gpu", "torch", "triton")}
    figures |= {"chosen": case.choice, "operations": least.operations, "bytes": least.bytes}
    if gpu in costs.GPUS:
        figures["bound_us"] = 1e6 * least.seconds(rates_of(gpu), launch.precision_kind(case.point.dtype))
    if median is not None:
        figures["gb_per_s"] = 1e-9 * least.bytes / median
        if least.operations:
            figures["tflop_per_s"] = 1e-12 * least.operations / median
    return figures


def rounds_of(seconds: float, config: pytest.Config) -> int:
    """Return how many calls of so many seconds are timed, by pytest-benchmark's options."""
    fitting = math.ceil(float(config.getoption("benchmark_max_time")) / seconds)
    return max(config.getoption("benchmark_min_rounds"), min(fitting, MOST_ROUNDS))


def finished(run: Variant, device: torch.device) -> Callable[[], None]:
    """Return a function that calls ``run`` and waits until a GPU has done it."""

    def call() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


@pytest.fixture
def measure(benchmark: Any, device: torch.device, pytestconfig: pytest.Config) -> Measure:
    """Return the function that makes a case, checks it and times it."""

    def run(*fields: Any, **named: Any) -> None:
        case = cases.make_case(*fields, **named)
        benchmark.group = case.group
        error, plain = case.check()
        call, seconds = finished(case.run, device), 0.0
        for _ in range(WARM_UP):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        benchmark.pedantic(call, rounds=rounds_of(seconds, pytestconfig))
        median = None if benchmark.stats is None else benchmark.stats.stats.median
        benchmark.extra_info.update(facts(case, device, median), error=error, plain_error=plain)

    return run
