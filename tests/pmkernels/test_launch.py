"""The arithmetic of a launch: parts of a product, precisions, alignment."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pmkernels import configs, dispatch, launch

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def precision() -> Iterator[None]:
    """TF32 settings as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


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


def test_float32_products_are_exact_unless_torch_was_told_otherwise(precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    assert launch.dot_precision(torch.float32) == launch.rank_precision(torch.float32) == "ieee"
    assert launch.dot_precision(torch.bfloat16) == "tf32"
    matmul.fp32_precision = "tf32"
    assert launch.dot_precision(torch.float32) == "tf32"
    exact = dispatch.config("linear", torch.zeros(1, dtype=torch.bfloat16), rows=8, rank=16)
    assert dispatch.config("linear", torch.zeros(1, dtype=torch.float32), rows=8, rank=16) != exact


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


def test_partial_sums_stay_below_the_size_of_a_weight() -> None:
    # P and Q are [D / BLOCK_D, N, R] and [N / BLOCK_N, D, R]
    for dtype in (torch.float32, torch.bfloat16):
        for rank in range(1, launch.MAX_RANK_FROM_TILES + 1):
            for aligned in (True, False):
                found = dispatch.config("weight_grad", torch.zeros(1, dtype=dtype), rows=8, rank=rank, aligned=aligned)
                assert rank < min(found.block_n, found.block_d)
