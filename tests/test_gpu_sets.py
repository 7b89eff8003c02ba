"""Which GPU tests there are, what each target runs and in which order, and what is left out: all without a GPU."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from smoke import mark_smoke, smoke, smoke_rank

from pmkernels import configs, dispatch

ROOT = Path(__file__).parents[1]
GPU = ROOT / "tests" / "gpu"
COLLECT = """
import sys
import pytest

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
sys.exit(pytest.main(["tests/gpu", *options, *sys.argv[2:]]))
"""
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")


def collect(*options: str, absent: str = "") -> tuple[list[str], str]:
    """The ids that pytest collects of tests/gpu, in order and without their folder, and all that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, absent, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    prefix = "tests/gpu/"
    return [line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(f"{prefix}test_")], (
        done.stdout
    )


@pytest.fixture(scope="module")
def smoke_ids() -> list[str]:
    return collect("-m", "gpu and smoke")[0]


@pytest.fixture(scope="module")
def all_ids() -> list[str]:
    return collect()[0]


def test_there_are_about_sixty_smoke_tests(smoke_ids: list[str]) -> None:
    assert 55 <= len(smoke_ids) <= 70


LISTED = {
    "full sizes in bfloat16": ("test_kernels.py::test_full_size_projections[", "bfloat16", 10),
    "captured steps": ("test_strategies.py::test_a_captured_step_gives_the_same_bits[", "", 4),
    "a captured step with cached weights": ("test_strategies.py::test_a_captured_step", "-cached", 2),
    "captured vectors": ("test_strategies.py::test_merge_vectors_captured[auto]", "", 1),
    "a captured served layer": ("test_preference.py::test_a_graph_reads_the_preference_that_is", "", 1),
    "cached weights": ("test_strategies.py::test_cached[", "bfloat16", 4),
    "streamed layers": ("test_strategies.py::test_real_layers[", "streamed", 2),
    "served layers of 257 rows": ("test_preference.py::test_real_layers[", "(1, 257)", 4),
    "served layers of 8224 rows": ("test_preference.py::test_real_layers[", "(32, 257)", 4),
    "merge": ("test_kernels.py::test_merge_weight[", "bfloat16", 3),
    "vectors": ("test_strategies.py::test_merge_vectors[", "bfloat16", 2),
    "entropy": ("test_kernels.py::test_softmax_entropy[", "bfloat16", 3),
    "four warps: preference": ("test_products.py::test_served_few_rows[", "", 6),
    "four warps: widen": ("test_products.py::test_widen[", "", 3),
    "four warps: shrink": ("test_products.py::test_shrink[", "", 3),
    "the reduction of dW": ("test_products.py::test_reduction_of_dw[", "", 8),
}


@pytest.mark.parametrize("what", LISTED)
def test_the_smoke_tests_have(what: str, smoke_ids: list[str]) -> None:
    start, part, count = LISTED[what]
    assert sum(name.startswith(start) and part in name for name in smoke_ids) == count


def test_every_configuration_for_sm_90_is_a_smoke_test(smoke_ids: list[str]) -> None:
    entries = configs.read_entries(configs.config_files()["sm_90"])
    start = "test_kernels.py::test_every_shipped_configuration[sm_90: "
    found = [name.removeprefix(start).split(" ")[0] for name in smoke_ids if name.startswith(start)]
    assert found == [entry.op for entry in entries]


@pytest.mark.parametrize("rank", [0, 4, 16, 32])
@pytest.mark.parametrize("tasks", [1, 8])
def test_the_reduction_of_dw_is_a_smoke_test_for(tasks: int, rank: int, smoke_ids: list[str]) -> None:
    assert f"test_products.py::test_reduction_of_dw[K={tasks}-R={rank}]" in smoke_ids


def test_four_warps_come_first_and_then_the_reductions(smoke_ids: list[str], all_ids: list[str]) -> None:
    names = [name.split("[")[0].split("::")[1] for name in smoke_ids[:21]]
    assert set(names[:12]) == {"test_served_few_rows", "test_widen", "test_shrink"}
    assert set(names[12:20]) == {"test_reduction_of_dw"}
    assert names[20] == "test_every_shipped_configuration"
    assert all_ids[: len(smoke_ids)] == smoke_ids


def test_kernels_of_four_warps_with_several_products_come_first() -> None:
    """Where a configuration gives another one four warps, test_products.py wants a test of it."""
    several = {"linear", "weight_grad", "merge_grad", "preference", "widen", "shrink", "preference_grad"}
    four = {entry.op for entry in dispatch.in_force().entries("sm_90") if entry.config.num_warps == 4}
    assert four & several == {"preference", "widen", "shrink"}


def test_repeats_and_the_sanitizer_are_apart(all_ids: list[str]) -> None:
    left, _ = collect("-m", "gpu and not repeat and not sanitize")
    apart = [name for name in all_ids if name not in left]
    files = {"test_repeats.py", "test_sanitizer.py"}
    assert {name.split("::")[0] for name in apart} == files
    assert {name.split("::")[0] for name in left} == {p.name for p in GPU.glob("test_*.py")} - files
    lines = sum(len(configs.read_entries(text)) for text in configs.config_files().values())
    assert sum(name.startswith("test_repeats.py::test_launches_give_the_same_bits[") for name in apart) == lines
    assert sorted(apart)[-2:] == [
        f"test_sanitizer.py::test_compute_sanitizer_finds_nothing[{tool}]" for tool in ("memcheck", "racecheck")
    ]


WHOLE_MODELS = ["test_engine.py", "test_methods.py", "test_models.py"]
NO_VIT = "test_methods.py, what of test_models.py builds a model of open_clip"


@pytest.mark.parametrize(
    ("absent", "kept", "line"),
    [
        ("pymoo", WHOLE_MODELS, None),
        ("pydantic", [], ", ".join(WHOLE_MODELS)),
        ("open_clip", ["test_engine.py", "test_models.py"], NO_VIT),
        ("ftfy", ["test_engine.py", "test_models.py"], NO_VIT),
    ],
)
def test_what_needs_a_package_is_left_out_and_said_once(
    absent: str, kept: Sequence[str], line: str | None, all_ids: list[str]
) -> None:
    ids, printed = collect(absent=absent)
    said = [text for text in printed.splitlines() if "left out" in text]
    assert said == ([] if line is None else [f"tests/gpu: left out for want of {absent}: {line}"])
    assert sorted({name.split("::")[0] for name in ids} & set(WHOLE_MODELS)) == kept
    kernels = [name for name in all_ids if not name.startswith(tuple(WHOLE_MODELS))]
    assert [name for name in ids if not name.startswith(tuple(WHOLE_MODELS))] == kernels
    if "test_models.py" in kept and line is not None:
        assert {n.split("[")[0] for n in ids if n.startswith("test_models.py")} == {
            "test_models.py::test_pareto_linear"
        }


@NEEDS_NO_GPU
@pytest.mark.parametrize("target", ["gpu-smoke", "gpu-repeat", "gpu-sanitize", "gpu"])
def test_a_target_says_that_there_is_no_gpu(target: str) -> None:
    done = subprocess.run(
        ["make", "--silent", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "expected a CUDA GPU that torch sees, got none"


@pytest.mark.parametrize("target", ["gpu-smoke", "gpu-repeat", "gpu-sanitize", "gpu"])
def test_every_target_has_cublas_repeat_its_bits(target: str) -> None:
    command = ["make", "--dry-run", target, "PYTHON=python3", "JUNIT=elsewhere.xml"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8 python3 -m pytest tests/gpu" in printed
    assert ("--junit-xml=elsewhere.xml" in printed) == (target == "gpu-smoke")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_use_all_cores_and_a_time_limit() -> None:
    options = _module("options").options
    limit = ["--timeout=60", "--timeout-method=thread"]
    assert options(16, 80 * 2**30, 60) == ["-n", "16", *limit]
    # a process takes its share of the GPU's memory
    assert options(64, 24 * 2**30, 60) == ["-n", "6", *limit]
    assert options(64, 2**30, 60) == ["-n", "1", *limit]


@pytest.mark.parametrize("absent", ["xdist", "pytest_timeout"])
def test_options_leave_out_what_is_not_installed(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("options")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    words = " ".join(module.options(4, 2**40, 60))
    assert words == ("-n 4" if absent == "pytest_timeout" else "--timeout=60 --timeout-method=thread")


def test_every_op_of_a_configuration_file_is_repeated() -> None:
    files = configs.config_files().values()
    assert set(_module("test_repeats").LAUNCHES) == {e.op for text in files for e in configs.read_entries(text)}


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> Iterator[pytest.Item]:
    """This test itself, with the markers that a test adds taken off again."""
    item = request.node
    before = list(item.own_markers)
    yield item
    item.own_markers[:] = before
    vars(item.function).pop("smoke", None)


@pytest.mark.parametrize("a", [1])
@pytest.mark.parametrize("b", [2])
def test_a_smoke_test_is_one_whose_values_are_all_named(a: int, b: int, collected: pytest.Item) -> None:
    assert smoke_rank(collected) == float("inf")
    for only, rank in (({"a": (2,)}, float("inf")), ({"a": (1,), "b": (3,)}, float("inf")), ({"a": (1, 2)}, 5)):
        smoke(5, **only)(collected.function)
        mark_smoke(collected)
        assert smoke_rank(collected) == rank
    smoke(5, c=(1,))(collected.function)
    with pytest.raises(KeyError, match="c"):
        mark_smoke(collected)
