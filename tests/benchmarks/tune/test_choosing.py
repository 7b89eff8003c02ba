"""Configurations chosen on made-up times."""

import pytest
import torch

from benchmarks.tune import cases as launch_cases
from benchmarks.tune import choosing
from pmkernels.configs import Config

PRESENT, OTHER, THIRD = Config(block_m=32), Config(block_m=64), Config(block_m=16)
ONE, TWO = launch_cases.Case("merge", 48, 32), launch_cases.Case("merge", 32, 48)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


def test_the_best_is_the_best_on_average_over_shapes() -> None:
    times = {
        PRESENT: {ONE: 10.0, TWO: 1000.0},
        # twice as fast on the small one, a tenth slower on the large one
        OTHER: {ONE: 5.0, TWO: 1100.0},
        THIRD: {ONE: 9.9, TWO: 990.0},
    }
    found = choosing.scores(times)
    assert [config for config, _ in found] == [OTHER, THIRD, PRESENT]
    assert found[0][1] == pytest.approx((1100 / 990) ** 0.5)
    assert found[2][1] == pytest.approx((10 / 5 * 1000 / 990) ** 0.5)
    # a gain of one percent is none
    assert choosing.better(times, PRESENT) == [OTHER]
    assert choosing.better({PRESENT: {ONE: 1.0}, OTHER: {ONE: 0.99}}, PRESENT) == []
    # the present one was rejected: anything that is right will do
    assert choosing.better({OTHER: {ONE: 2.0}, THIRD: {ONE: 1.0}}, PRESENT) == [THIRD, OTHER]
    # only what all have a time for counts
    assert choosing.better({PRESENT: {ONE: 1.0, TWO: 9.0}, OTHER: {ONE: 2.0}}, PRESENT) == []
