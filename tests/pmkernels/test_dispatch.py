"""The choice of strategy and configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import pmkernels
from pmkernels import configs, dispatch, launch, strategies
from pmkernels.configs import Configs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def precision() -> Iterator[None]:
    """TF32 settings as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_auto_is_eager_off_the_gpu_and_where_the_kernels_cannot() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert strategies.resolve("auto", {"x": x}, CPU) == "eager"
    with dispatch.using(Configs(runs=True)):
        assert strategies.resolve("auto", {"x": x}, CUDA) == "auto"
        # what the kernels cannot do is done all the same
        assert strategies.resolve("auto", {"x": x.double()}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "task_vectors": torch.zeros(33, 2, 2)}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "G": torch.zeros(2, 2, 33)}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "A": torch.zeros(2, 65)}, CUDA) == "eager"


LAYER = {"n": 3072, "d": 1024, "rank": 16, "tasks": 8}


def test_auto_is_a_matter_of_rows() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    for operation in ("forward", "dx", "weight_grad"):
        assert strategies.choose(operation, "auto", x, rows=8, **LAYER) == "fused"
        assert strategies.choose(operation, "auto", x, rows=8224, **LAYER) == "streamed"
        assert strategies.choose(operation, "fused", x, rows=8224, **LAYER) == "fused"
        assert strategies.choose(operation, "streamed", x, rows=8, **LAYER) == "streamed"
        choices = [strategies.choose(operation, "auto", x, rows=2**i, **LAYER) for i in range(15)]
        assert choices == sorted(choices), "one crossing"
    # nothing to merge: the library's product and nothing else
    for rank, per_row in ((0, False), (16, True)):
        folded = {**LAYER, "tasks": 0, "rank": rank}
        assert strategies.choose("forward", "auto", x, rows=8, per_row=per_row, **folded) == "streamed"


def test_a_float16_weight_gradient_is_never_in_memory() -> None:
    """Gradients of a mean over a batch lie below what float16 can hold."""
    x = torch.zeros(1, dtype=torch.float16)
    for strategy in ("auto", "streamed", "fused"):
        assert strategies.choose("weight_grad", strategy, x, rows=8224, **LAYER) == "fused"


def test_measured_choices_and_rates_come_before_counted_ones() -> None:
    line = {"op": "forward", "dtype": "16-bit", **LAYER}
    text = json.loads(configs.config_files()["default"]) | {
        "rates": {"memory": 1e12},
        "strategies": [{**line, "rows": 64, "best": "streamed"}, {**line, "rows": 4096, "best": "fused"}],
    }
    files = {"default": configs.config_files()["default"], "tuned": json.dumps(text)}
    x = torch.zeros(1, dtype=torch.bfloat16)
    with dispatch.using(Configs(files, file="tuned")):
        assert strategies.choose("forward", "auto", x, rows=100, **LAYER) == "streamed"
        assert strategies.choose("forward", "auto", x, rows=8224, **LAYER) == "fused"
        # another layer was not measured
        assert strategies.choose("forward", "auto", x, rows=8224, **{**LAYER, "n": 1024}) == "streamed"
        assert dispatch.rates("tuned", CPU).memory == 1e12
        assert dispatch.rates("tuned", CPU).measured
        assert not dispatch.rates("default", CPU).measured


@pytest.mark.parametrize("rows", [1, 3, 50, 257, 8224])
def test_splits_cover_everything_once_and_stay_below_a_weight(rows: int) -> None:
    for n, d in ((3072, 1024), (1021, 517), (16, 8), (64, 4096)):
        config = dispatch.config("linear", torch.zeros(1, dtype=torch.bfloat16), rows=rows, rank=16)
        tiles = -(-rows // config.block_m) * -(-n // config.block_n)
        parts, each = launch.splits_of_d(config, 132, rows, n, d, tiles)
        assert each % config.block_d == 0
        assert (parts - 1) * each < d <= parts * each
        assert parts == 1 or parts * rows * n <= n * d // 2
        config = dispatch.config("weight_grad", torch.zeros(1, dtype=torch.bfloat16), rows=rows, rank=16)
        tiles = -(-n // config.block_n) * -(-d // config.block_d)
        parts, each = launch.splits_of_rows(config, 132, rows, n, d, tiles, 16)
        assert each % config.block_m == 0
        assert (parts - 1) * each < rows <= parts * each
        partial = 16 * (n * -(-d // config.block_d) + d * -(-n // config.block_n))
        assert parts == 1 or parts * partial <= n * d // 2
    assert launch.splits_of_d(configs.Config(block_d=64), 132, 1, 768, 768, 12)[0] > 1
    assert launch.splits_of_rows(configs.Config(64, 128, 128), 132, 8224, 768, 768, 36, 16)[0] > 1


def test_a_wish_that_cannot_be_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"strategy: expected one of auto, fused, streamed, eager, got 'fast'"):
        strategies.resolve("fast", {"x": x}, CPU)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU"):
        pmkernels.pareto_linear(torch.zeros(2, 3), torch.zeros(4, 3), strategy="fused")
    with pytest.raises(ValueError, match=r"strategy: expected 'eager' or 'auto' .*got device cpu"):
        pmkernels.merge_weight(torch.zeros(4, 3), strategy="streamed")
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto'"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")


def test_float32_products_are_exact_unless_torch_was_told_otherwise(precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    assert launch.dot_precision(torch.float32) == launch.rank_precision(torch.float32) == "ieee"
    assert launch.dot_precision(torch.bfloat16) == "tf32"
    matmul.fp32_precision = "tf32"
    assert launch.dot_precision(torch.float32) == "tf32"
    exact = dispatch.config("linear", dtype=torch.bfloat16, device=CPU, rows=8, rank=16)
    assert dispatch.config("linear", dtype=torch.float32, device=CPU, rows=8, rank=16) != exact


@pytest.mark.parametrize(
    "told",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_every_way_of_allowing_tf32_is_heard(told: str) -> None:
    # in a process of its own: the settings of torch are global and not all can be taken back
    program = (
        f"import torch; from pmkernels import launch; d = launch.dot_precision(torch.float32); {told}; "
        "print(d, launch.dot_precision(torch.float32))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32"]


def test_everything_but_the_kernels_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, pmkernels\n"
        "x, w = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)\n"
        "pmkernels.softmax_entropy(pmkernels.pareto_linear(x, w)).sum().backward()\n"
        "pmkernels.merge_weight(w); print('pmkernels.ops' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_rows_are_cut_into_parts_that_cover_them() -> None:
    for rows in (0, 1, 31, 64, 257, 1000, 8224, 100_000):
        for block in (16, 64):
            for programs in (1, 8, 48, 1000):
                parts, per_part = launch.splits(rows, block, programs, most=7)
                assert 1 <= parts <= 7
                assert per_part % block == 0
                assert parts * per_part >= rows


def test_ranks_are_padded_to_a_tile() -> None:
    assert [launch.padded_rank(r) for r in (1, 15, 16, 17, 32, 33, 64)] == [16, 16, 16, 32, 32, 64, 64]


def test_alignment() -> None:
    x = torch.zeros(32, 48)
    assert launch.is_aligned(x, x.t(), None, x.expand(3, 32, 48), x[:, :1].expand(32, 48), x[3:])
    assert not launch.is_aligned(x[:, 1:])
    assert not launch.is_aligned(x[:, :17])
    assert not launch.is_aligned(x[:, ::2])
    assert not launch.is_aligned(torch.zeros(32, 47))
    assert not launch.is_aligned(x, x.half())


def test_every_shipped_configuration_can_be_read_and_every_kernel_has_one() -> None:
    files = configs.config_files()
    assert "default" in files
    for text in files.values():
        assert configs.read_entries(text)
        for arch in configs.architectures(text):
            assert arch.startswith("sm_")
    ops = {"linear", "weight_grad", "merge_grad", "merge", "flat", "shrink", "factor_grad", "core_grad"}
    for op in (*ops, "preference_grad"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, rank, aligned in ((1, 0, True), (8224, 64, False), (100, 16, True)):
                found = dispatch.config(op, dtype=dtype, device=CPU, rows=rows, rank=rank, aligned=aligned)
                sizes = [size for size in (found.block_m, found.block_n, found.block_d) if size]
                assert sizes
                assert all(size & (size - 1) == 0 for size in sizes)


def test_partial_sums_stay_below_the_size_of_a_weight() -> None:
    # P and Q are [D / BLOCK_D, N, R] and [N / BLOCK_N, D, R]
    for dtype in (torch.float32, torch.bfloat16):
        for rank in range(1, launch.MAX_RANK_FROM_TILES + 1):
            for aligned in (True, False):
                found = dispatch.config("weight_grad", dtype=dtype, device=CPU, rows=8, rank=rank, aligned=aligned)
                assert rank < min(found.block_n, found.block_d)


def test_a_gpus_own_file_comes_first() -> None:
    default = configs.config_files()["default"]
    line = {"op": "merge", "dtype": "any", "config": {"block_n": 8, "block_d": 512}}
    files = {"default": default, "some-gpu": json.dumps({"architectures": ["sm_90"], "entries": [line]})}
    with dispatch.using(Configs(files, file="some-gpu")):
        assert dispatch.config("merge", dtype=torch.float32, device=CUDA, rows=0, rank=0).block_d == 512
        assert dispatch.config("flat", dtype=torch.float32, device=CUDA, rows=0, rank=0).block_n == 1
        assert configs.architectures(files["some-gpu"]) == ("sm_90",)
    with pytest.raises(LookupError, match="expected an entry for nothing"):
        dispatch.config("nothing", dtype=torch.float32, device=CPU, rows=0, rank=0)
    with pytest.raises(TypeError, match="blok_n"):
        configs.read_entries(json.dumps({"entries": [{"op": "merge", "dtype": "any", "config": {"blok_n": 8}}]}))
