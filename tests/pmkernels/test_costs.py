"""What the kernels of a weight gradient move and take, worked out by hand for the in-projection of ViT-L/14."""

from dataclasses import replace

import pytest
import torch

from pmkernels import costs, dispatch, strategies
from pmkernels.costs import FORMS, GPUS, Pass, Problem

H200, H100 = GPUS["nvidia-h200"], GPUS["nvidia-h100-80gb-hbm3"]
ROWS, N, D, TASKS, RANK = 8224, 3072, 1024, 8, 16
LAYER = Problem(ROWS, N, D, TASKS, RANK, bias=True)
WEIGHT = N * D * 2
# [16 blocks of d, N, R] and [48 blocks of n, D, R] and [768 tiles, K] in float32
PARTIALS = 4 * (16 * 3072 * 16 + 48 * 1024 * 16 + 768 * 8)


def weight_gradient(strategy: str, problem: Problem = LAYER, cache_bytes: float = 50e6) -> dict[str, Pass]:
    count, block = (costs.streamed, 64) if strategy == "streamed" else (costs.fused, 128)
    kernels = count("weight_grad", problem, costs.Tiles(block_n=block, block_d=block, cache_bytes=cache_bytes))
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    return {kernel.name: kernel for kernel in kernels}


def test_a_streamed_weight_gradient_is_five_kernels() -> None:
    kernels = weight_gradient("streamed")
    assert list(kernels) == ["product", "reduction", "partial sums", "column sums", "cast of db"]
    assert sum(kernel.launches for kernel in kernels.values()) == 5
    assert kernels["product"].memory == WEIGHT + ROWS * (N + D) * 2
    without_bias = weight_gradient("streamed", replace(LAYER, bias=False))
    assert list(without_bias) == ["product", "reduction", "partial sums"]
    in_float32 = weight_gradient("streamed", replace(LAYER, kind="float32"))
    assert "cast of db" not in in_float32, "db is summed in float32"


def test_the_reduction_reads_every_task_vector_and_writes_partial_sums_that_are_read_again() -> None:
    assert PARTIALS == 6_316_032
    kernels = weight_gradient("streamed")
    assert kernels["reduction"].memory == TASKS * WEIGHT + PARTIALS, "dW comes from L2"
    assert kernels["reduction"].cache == (TASKS + 1) * WEIGHT
    assert (kernels["partial sums"].memory, kernels["partial sums"].cache) == (0.0, PARTIALS)
    small = weight_gradient("streamed", cache_bytes=6e6)
    assert small["reduction"].memory == (TASKS + 1) * WEIGHT + PARTIALS, "dW does not stay in a small L2"
    assert small["partial sums"].memory == PARTIALS


def test_partial_sums_follow_rank_and_tiles() -> None:
    assert LAYER.partials(64, 64) == PARTIALS
    assert replace(LAYER, rank=4).partials(64, 64) == PARTIALS, "the rank is rounded up to 16"
    assert LAYER.partials(128, 128, splits=3) == 3 * 4 * (8 * 3072 * 16 + 24 * 1024 * 16 + 192 * 8)
    only_lambda = 4 * 768 * 8
    assert replace(LAYER, rank=0).partials(64, 64) == only_lambda
    assert replace(LAYER, per_row=True).partials(64, 64) == only_lambda, "P and Q come row by row"
    assert "partial sums" not in weight_gradient("streamed", Problem(ROWS, N, D, 0, 0))


def test_db_reads_dy_once_more() -> None:
    dy = ROWS * N * 2
    assert weight_gradient("streamed")["column sums"].memory == dy
    fused, without = weight_gradient("fused"), weight_gradient("fused", replace(LAYER, bias=False))
    assert fused["dW from rows"].memory - without["dW from rows"].memory == dy
    # 50 rows of it, x and all weights fit into half of L2
    few = weight_gradient("streamed", replace(LAYER, rows=50, tasks=1))
    assert (few["column sums"].memory, few["column sums"].cache) == (0.0, 50 * N * 2)


def test_the_fused_form_reduces_after_its_product_and_not_beside_it() -> None:
    kernels = weight_gradient("fused")
    assert list(kernels) == ["dW from rows", "reduction", "partial sums", "cast of db"]
    assert [kernel.launches for kernel in kernels.values()] == [1, 0, 1, 1]
    assert kernels["reduction"].memory == TASKS * WEIGHT + LAYER.partials(128, 128)


def test_seconds_are_the_longest_of_four_times_at_the_rates_of_the_form() -> None:
    reduction = weight_gradient("streamed")["reduction"]
    by_hand = (8 * 6_291_456 + 6_316_032) / (0.55 * 4.3e12) + 2e-6
    assert reduction.seconds(H200, "16-bit") == pytest.approx(by_hand)
    in_cache = Pass("x", memory=1.0, cache=7e6, form="reduction", launches=0)
    assert in_cache.seconds(H200, "16-bit") == pytest.approx(1e-6 / 0.55)
    # 192 tiles of 128 × 128 on 132 multiprocessors are two waves
    product = Pass("x", products=LAYER.product, form="dW from rows", programs=192, launches=0)
    once = 2 * 8224 * 3072 * 1024 / (0.7 * 790e12)
    assert product.seconds(H200, "16-bit") == pytest.approx(once * 2 * 132 / 192)
    # programs that share a multiprocessor have no waves, but too few of them leave some idle
    assert replace(product, form="library product").seconds(H200, "16-bit") == pytest.approx(0.7 * once)
    assert replace(product, form="library product", programs=33).seconds(H200, "16-bit") == pytest.approx(2.8 * once)


def test_what_is_bound_by_memory_takes_longer_on_an_h100_by_the_ratio_of_the_memory_rates() -> None:
    for name in ("reduction", "column sums"):
        kernel = replace(weight_gradient("streamed")[name], launches=0)
        ratio = kernel.seconds(H100, "16-bit") / kernel.seconds(H200, "16-bit")
        assert ratio == pytest.approx(4.3 / 3.0)
    product = weight_gradient("streamed")["product"]
    assert product.seconds(H100, "16-bit") == pytest.approx(product.seconds(H200, "16-bit"), rel=0.01)


def test_every_share_is_one_at_most_and_says_where_it_comes_from() -> None:
    for form in FORMS.values():
        assert 0 < form.product_efficiency <= 1
        assert 0 < form.memory_efficiency <= 1
        assert form.source.startswith(("by definition: ", "assumed until measured"))
    operations = {"weight_grad": LAYER, "forward": LAYER, "preference": replace(LAYER, tasks=0, per_row=True)}
    operations |= {"merge": LAYER, "dx": LAYER}
    used = {
        kernel.form
        for operation, problem in operations.items()
        for count in (costs.fused, costs.streamed)
        for kernel in count(operation, problem)
    }
    assert used == set(FORMS) - {"attention", "tensor by tensor"}, "the others are those of whole models"


def test_counted_tiles_are_those_that_are_launched() -> None:
    summed = dispatch.config("sum", torch.zeros(1, dtype=torch.float32), rows=0, rank=0)
    assert summed.block_d == costs.SUM_BLOCK
    widened = dispatch.config("widen", torch.zeros(1, dtype=torch.bfloat16), rows=8224, rank=16)
    assert widened.block_m == costs.WIDEN_ROWS
    reduced = dispatch.lookup("sm_90", "merge_grad", "16-bit", 1, 16, True)
    kernels = strategies.predicted_passes("sm_90", H200, "weight_grad", "streamed", LAYER)
    reduction = next(kernel for kernel in kernels if kernel.name == "reduction")
    assert reduction.memory == TASKS * WEIGHT + LAYER.partials(reduced.block_n, reduced.block_d)


def test_a_weight_gradient_from_rows_is_predicted_as_the_compiled_kernel_was_counted() -> None:
    """Section 9 of the design: about 155 µs from rows, and about 28 µs for the reduction with its sums, on an H200."""
    counted = replace(LAYER, bias=False)
    from_rows = strategies.predicted_passes("sm_90", H200, "weight_grad", "fused", counted)
    assert costs.seconds(from_rows, H200, "16-bit") * 1e6 == pytest.approx(155, rel=0.05)
    kernels = strategies.predicted_passes("sm_90", H200, "weight_grad", "streamed", counted)
    assert costs.seconds(kernels[1:], H200, "16-bit") * 1e6 == pytest.approx(28, rel=0.1)
