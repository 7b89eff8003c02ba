"""The microbenchmarks: every operation on tiny shapes, their ids, and a comparison of two runs by pytest-benchmark."""

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import towers
from benchmarks.common.towers import Layer
from benchmarks.limits import predictions
from benchmarks.micro import cases, conftest
from benchmarks.micro.cases import Case, LogitsPoint, Point, TowerPoint
from pmkernels import costs, dispatch, strategies
from pmkernels.costs import Bound

ROOT = Path(__file__).parents[3]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks/micro").glob("test_*.py"))
CPU = torch.device("cpu")
TINY = ("--layers", "40x24", "--rows", "6", "--tasks", "3", "--ranks", "2", "--logits", "6x10", "--towers", "ViT-B/32")
QUICK = ("--benchmark-max-time=0.001", "--benchmark-min-rounds=2", "-p", "no:cacheprovider")
OF_ROWS, OF_WEIGHTS = "40x24-rows6-K3-r2-float32-", "40x24-K3-r2-float32-"
IDS = {
    "test_entropy[logits6x10-float32-eager]",
    "test_entropy_and_gradient[logits6x10-float32-eager]",
    f"test_forward[{OF_ROWS}eager]",
    f"test_dx[{OF_ROWS}eager]",
    f"test_forward_and_backward[{OF_ROWS}eager]",
    f"test_merge[{OF_WEIGHTS}eager]",
    f"test_served_per_image[{OF_ROWS}eager]",
    f"test_served_per_row[{OF_ROWS}eager]",
    f"test_widen_rows[{OF_ROWS}eager]",
    f"test_widen_weight[{OF_WEIGHTS}eager]",
    f"test_projection[{OF_WEIGHTS}eager]",
    f"test_projection_and_gradient[{OF_WEIGHTS}eager]",
    "test_merge_vectors[ViT-B/32-K3-float32-eager]",
    "test_vectors_gradient[ViT-B/32-K3-float32-eager]",
    f"test_weight_gradient[{OF_ROWS}eager]",
    f"test_weight_gradient_reduction[{OF_WEIGHTS}eager]",
}


def operations() -> dict[str, Callable[..., None]]:
    """Return every microbenchmark by its name."""
    modules = [importlib.import_module(f"benchmarks.micro.{name}") for name in MODULES]
    return {key: function for module in modules for key, function in vars(module).items() if key.startswith("test_")}


def points(function: Callable[..., None], dtype: torch.dtype, strategy: str, r: int) -> list[Any]:
    """Return the tiny points of a microbenchmark, by the fixture that it asks for."""
    _, fixture = inspect.signature(function).parameters
    layer = Layer("tiny", 40, 24, 3, 5)
    return {
        "row_point": [Point(layer, rows, 3, r, dtype, strategy, CPU) for rows in (1, 15)],
        "weight_point": [Point(layer, 0, 3, r, dtype, strategy, CPU)],
        "logits_point": [LogitsPoint(6, 10, dtype, strategy, CPU)],
        "tower_point": [TowerPoint(towers.TINY, 3, dtype, strategy, CPU)],
    }[fixture]


@pytest.mark.parametrize("name", operations())
def test_every_strategy_is_right_and_counted(name: str) -> None:
    """Kernels are interpreted here: what a GPU would time, it would also have checked."""
    function = operations()[name]
    strategies, low_rank = cases.OFFERS[function]
    for dtype in (torch.float32, torch.float16):
        for strategy in strategies:
            for r in (2,) if low_rank else (0, 2):
                for point in points(function, dtype, strategy, r):
                    measured: list[Case] = []
                    function(
                        lambda *fields, into=measured, **named: into.append(cases.make_case(*fields, **named)), point
                    )
                    (case,) = measured
                    error, plain = case.check()
                    assert 0 <= error < 0.1 and 0 <= plain < 0.1
                    assert case.least.bytes > 0
                    assert case.point.dtype == dtype
                    # without a GPU auto is eager, also where kernels are interpreted
                    assert (case.choice == "eager") == (strategy in ("auto", "eager")), case


def test_a_wrong_result_is_not_timed() -> None:
    wrong = Case(
        "forward",
        Point(Layer("tiny", 40, 24, 3, 5), 1, 3, 2, torch.float32, "fused", CPU),
        run=lambda: [torch.tensor([1.0, 2.1])],
        theirs=lambda v: [v["y"] if v["y"].dtype == torch.float64 else v["y"] + torch.tensor([0.0, 0.001])],
        values={"y": torch.tensor([1.0, 2.0])},
        least=Bound(0.0, 8.0),
        choice="fused",
    )
    with pytest.raises(AssertionError, match=r"forward, tiny: expected an error .* 2 times 4.47e-04, .* got 4.47e-02"):
        wrong.check()


def test_what_is_kept_beside_times(monkeypatch: pytest.MonkeyPatch) -> None:
    least = Bound(2e9, 4.3e6)
    tensors = [torch.ones(1)]
    point = Point(Layer("tiny", 40, 24, 3, 5), 1, 3, 2, torch.bfloat16, "fused", CPU)
    case = Case("merge", point, lambda: tensors, lambda v: tensors, {}, least, "fused")
    here = conftest.facts(case, CPU, 1e-3)
    assert here == {
        "gpu": None,
        "torch": torch.__version__,
        "triton": here["triton"],
        "chosen": "fused",
        "operations": 2e9,
        "bytes": 4.3e6,
        "gb_per_s": pytest.approx(4.3),
        "tflop_per_s": pytest.approx(2.0),
    }
    assert "gb_per_s" not in conftest.facts(case, CPU, None)
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "nvidia-h200")
    known = predictions.rates_of("nvidia-h200")
    bound = conftest.facts(case, torch.device("cuda", 0), 1e-3)["bound_us"]
    assert bound == pytest.approx(1e6 * max(2e9 / known.half, 4.3e6 / known.memory))
    monkeypatch.setattr(dispatch, "gpu_name", lambda index: "nvidia-of-tomorrow")
    assert "nvidia-of-tomorrow" not in costs.GPUS
    assert "bound_us" not in conftest.facts(case, torch.device("cuda", 0), 1e-3)


def test_a_gpu_is_waited_for_inside_the_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    conftest.finished(lambda: done.append("run") or [], torch.device("cuda", 0))()
    conftest.finished(lambda: done.append("run") or [], CPU)()
    assert done == ["run", "cuda:0", "run"]


def test_rounds_fit_into_the_time() -> None:
    options = {"benchmark_max_time": "1.0", "benchmark_min_rounds": 5}
    config = SimpleNamespace(getoption=options.get)
    assert [conftest.rounds_of(seconds, config) for seconds in (1e-5, 0.01, 3.0)] == [1000, 100, 5]


def test_the_choice_is_said_for_each_operation() -> None:
    layer = Layer("ViT-L/14 in-projection", 3072, 1024, 32, 257)
    point = Point(layer, 8224, 8, 16, torch.bfloat16, "streamed", CPU)
    tensors = {"weight": torch.ones(1)}
    assert point.choice(tensors, ["forward", "dx", "weight_grad"]) == "streamed"
    half = Point(layer, 8224, 8, 16, torch.float16, "streamed", CPU)
    assert half.choice(tensors, ["forward", "weight_grad"]) == "forward streamed, weight_grad fused"
    assert (point.images, Point(layer, 100, 8, 16, torch.float16, "auto", CPU).images) == (32, 100)


def test_points_of_a_gpu() -> None:
    nothing = SimpleNamespace(getoption=lambda name, default: default)
    chosen = list(conftest.points(["layer", "rows", "K", "r", "dtype", "strategy"], nothing, {}, True))
    shapes = [(point["layer"], point["rows"]) for point in chosen if point["strategy"] == "auto"]
    assert shapes == [
        ("ViT-B/32-in-projection", 50),
        ("ViT-B/32-in-projection", 1600),
        ("ViT-L/14-in-projection", 257),
        ("ViT-L/14-in-projection", 8224),
    ]
    assert {point["strategy"] for point in chosen} == set(strategies.STRATEGIES)
    assert {point["dtype"] for point in chosen} == {"bfloat16"}
    assert {point["r"] for point in chosen} == {16}
    assert conftest.default_values("r", {"layer": "ViT-L/14-MLP-fc"}, True) == (0,)
    twice = SimpleNamespace(getoption=lambda name, default: [5, 5] if name == "--rows" else default)
    assert len(list(conftest.points(["layer", "rows"], twice, {}, True))) == 2


@pytest.mark.parametrize(
    ("axis", "text", "message"),
    [
        ("rows", "0", "expected whole numbers of at least 1, got '0'"),
        ("rows", "benchmarks/micro", "expected whole numbers of at least 1, got 'benchmarks/micro'"),
        ("r", "-1", "expected whole numbers of at least 0, got '-1'"),
        ("dtype", "float64", "expected any of float32, bfloat16, float16, got 'float64'"),
        ("strategy", "fast", "expected any of auto, fused, streamed, eager, got 'fast'"),
        ("tower", "ViT-H", "expected any of ViT-B/32, ViT-L/14, got 'ViT-H'"),
        ("logits", "256", "expected ROWSxCLASSES, as in 256x1000, got '256'"),
        ("layer", "0x24", "expected OUTxIN, as in 3072x1024, or one of ViT-B/32-in-projection, "),
    ],
)
def test_options_say_what_they_expect(axis: str, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        conftest.AXES[axis].parse(text)


def test_names_go_into_expressions() -> None:
    """``-k`` cannot have spaces or commas."""
    assert all(re.fullmatch(r"[\w/.+-]+", name) for name in (*cases.LAYERS, *conftest.TOWER_NAMES))
    assert cases.find_layer("7B-projection").n == 4096


def pytest_run(*arguments: str, program: tuple[str, ...] = (sys.executable, "-m", "pytest")) -> tuple[int, str]:
    """Return the exit code and output of pytest in a process of its own, as from a shell."""
    ours = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [*program, "benchmarks/micro", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_two_runs_are_compared(tmp_path: Path) -> None:
    storage = f"--benchmark-storage={tmp_path}"
    code, output = pytest_run("--benchmark-only", *TINY, *QUICK, storage, "--benchmark-save=before")
    assert code == 0, output
    assert "expected a CUDA GPU, got none" in output
    (path,) = tmp_path.glob("*/0001_before.json")
    run = json.loads(path.read_text())
    names = [benchmark["name"] for benchmark in run["benchmarks"]]
    assert sorted(names) == sorted(IDS)
    assert "hz_actual" not in run["machine_info"]["cpu"]
    assert run["machine_info"]["torch"] == torch.__version__
    forward = next(each for each in run["benchmarks"] if each["name"] == f"test_forward[{OF_ROWS}eager]")
    assert forward["group"] == "forward, 40x24"
    assert list(forward["params"]) == ["layer", "rows", "K", "r", "dtype", "strategy"]
    assert forward["extra_info"]["chosen"] == "eager"
    assert forward["extra_info"]["operations"] == 2 * 6 * 40 * 24

    # the earlier run takes ten thousand times as long, or as little in one benchmark
    for benchmark in run["benchmarks"]:
        factor = 1e-4 if benchmark is forward else 1e4
        benchmark["stats"] = {
            key: value * factor if isinstance(value, float) else value for key, value in benchmark["stats"].items()
        }
    path.write_text(json.dumps(run))
    arguments = ("--benchmark-compare=0001", "--benchmark-compare-fail=mean:100%")
    code, output = pytest_run("--benchmark-only", *TINY, *QUICK, storage, *arguments)
    assert code == 1, output
    lost = output[output.index("Performance has regressed") :].split("\n\n")[0]
    assert f"test_forward[{OF_ROWS}eager]" in lost
    assert "test_dx" not in lost
    for name in IDS:
        assert re.search(rf"^{re.escape(name)} \(NOW\) ", output, re.MULTILINE), name
        assert re.search(rf"^{re.escape(name)} \(0001_bef", output, re.MULTILINE), name
    assert "machine_info is different" not in output


def test_another_gpu_is_no_comparison() -> None:
    with pytest.raises(pytest.UsageError, match="expected a run on a machine with NVIDIA H200, got one with no GPU"):
        conftest.pytest_benchmark_compare_machine_info({"gpu": "NVIDIA H200"}, {"machine_info": {"gpu": None}})
    conftest.pytest_benchmark_compare_machine_info({"gpu": None}, {"machine_info": {}})


def test_the_command_without_python_finds_everything() -> None:
    """``pytest`` does not put the folder that it is called in on the path of imports."""
    command = (str(Path(sys.executable).with_name("pytest")),)
    code, output = pytest_run("--rows", "1", "x", program=command)
    assert code == 4, output
    assert "--rows: expected whole numbers of at least 1, got 'x'" in output
