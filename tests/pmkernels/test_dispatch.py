"""The choice of strategy and configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import pmkernels
from pmkernels import dispatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def precision() -> Iterator[None]:
    """TF32 settings as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_auto_is_eager_off_the_gpu_and_a_matter_of_rows_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert dispatch.resolve("auto", {"x": x}, CPU) == "eager"
    monkeypatch.setattr(dispatch, "runs_kernels", lambda device: True)
    assert dispatch.resolve("auto", {"x": x}, CUDA) == "auto"
    assert dispatch.choose("auto", x, rows=8, rank=16, tasks=8) == "fused"
    assert dispatch.choose("auto", x, rows=256, rank=16, tasks=8) == "fused"
    assert dispatch.choose("auto", x, rows=257, rank=16, tasks=8) == "streamed"
    assert dispatch.choose("auto", x, rows=8224, rank=16, tasks=8) == "streamed"
    assert dispatch.choose("auto", x.float(), rows=128, rank=16, tasks=8) == "streamed"
    assert dispatch.choose("fused", x, rows=8224, rank=16, tasks=8) == "fused"
    assert dispatch.choose("auto", x, rows=8, rank=16, tasks=0) == "fused"
    assert dispatch.choose("auto", x, rows=8, rank=0, tasks=0) == "streamed"
    # what the kernels cannot do is done all the same
    assert dispatch.resolve("auto", {"x": x.double()}, CUDA) == "eager"
    assert dispatch.resolve("auto", {"x": x, "task_vectors": torch.zeros(33, 2, 2)}, CUDA) == "eager"
    assert dispatch.resolve("auto", {"x": x, "G": torch.zeros(2, 2, 33)}, CUDA) == "eager"
    assert dispatch.resolve("auto", {"x": x, "A": torch.zeros(2, 65)}, CUDA) == "eager"


def test_a_wish_that_cannot_be_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"strategy: expected one of auto, fused, streamed, eager, got 'fast'"):
        dispatch.resolve("fast", {"x": x}, CPU)
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU"):
        pmkernels.pareto_linear(torch.zeros(2, 3), torch.zeros(4, 3), strategy="fused")
    with pytest.raises(ValueError, match=r"strategy: expected 'eager' or 'auto' .*got device cpu"):
        pmkernels.merge_weight(torch.zeros(4, 3), strategy="streamed")
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto'"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")


def test_float32_products_are_exact_unless_torch_was_told_otherwise(precision: None) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "ieee"
    assert dispatch.dot_precision(torch.float32) == dispatch.rank_precision(torch.float32) == "ieee"
    assert dispatch.dot_precision(torch.bfloat16) == "tf32"
    matmul.fp32_precision = "tf32"
    assert dispatch.dot_precision(torch.float32) == "tf32"
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
        f"import torch; from pmkernels import dispatch; d = dispatch.dot_precision(torch.float32); {told}; "
        "print(d, dispatch.dot_precision(torch.float32))"
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
                parts, per_part = dispatch.splits(rows, block, programs, most=7)
                assert 1 <= parts <= 7
                assert per_part % block == 0
                assert parts * per_part >= rows


def test_ranks_are_padded_to_a_tile() -> None:
    assert [dispatch.padded_rank(r) for r in (1, 15, 16, 17, 32, 33, 64)] == [16, 16, 16, 32, 32, 64, 64]


def test_alignment() -> None:
    x = torch.zeros(32, 48)
    assert dispatch.is_aligned(x, x.t(), None, x.expand(3, 32, 48), x[:, :1].expand(32, 48), x[3:])
    assert not dispatch.is_aligned(x[:, 1:])
    assert not dispatch.is_aligned(x[:, :17])
    assert not dispatch.is_aligned(x[:, ::2])
    assert not dispatch.is_aligned(torch.zeros(32, 47))
    assert not dispatch.is_aligned(x, x.half())


def test_every_shipped_configuration_can_be_read_and_every_kernel_has_one() -> None:
    files = dispatch.config_files()
    assert "default" in files
    for text in files.values():
        assert dispatch.read_entries(text)
        for arch in dispatch.architectures(text):
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
        for rank in range(1, dispatch.MAX_RANK_FROM_TILES + 1):
            for aligned in (True, False):
                found = dispatch.config("weight_grad", dtype=dtype, device=CPU, rows=8, rank=rank, aligned=aligned)
                assert rank < min(found.block_n, found.block_d)


def test_a_gpus_own_file_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    default = dispatch.config_files()["default"]
    line = {"op": "merge", "dtype": "any", "config": {"block_n": 8, "block_d": 512}}
    files = {"default": default, "some-gpu": json.dumps({"architectures": ["sm_90"], "entries": [line]})}
    monkeypatch.setattr(dispatch, "config_files", lambda: files)
    monkeypatch.setattr(dispatch, "gpu_file", lambda device: "some-gpu")
    dispatch.entries.cache_clear()
    dispatch.lookup.cache_clear()
    try:
        assert dispatch.config("merge", dtype=torch.float32, device=CUDA, rows=0, rank=0).block_d == 512
        assert dispatch.config("flat", dtype=torch.float32, device=CUDA, rows=0, rank=0).block_n == 1
        assert dispatch.architectures(files["some-gpu"]) == ("sm_90",)
    finally:
        dispatch.entries.cache_clear()
        dispatch.lookup.cache_clear()
    with pytest.raises(LookupError, match="expected an entry for nothing"):
        dispatch.config("nothing", dtype=torch.float32, device=CPU, rows=0, rank=0)
    with pytest.raises(TypeError, match="blok_n"):
        dispatch.read_entries(json.dumps({"entries": [{"op": "merge", "dtype": "any", "config": {"blok_n": 8}}]}))
