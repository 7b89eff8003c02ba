"""What a layer moves besides its product."""

import pytest

from benchmarks.common import towers
from benchmarks.limits import layers as layer_tables
from benchmarks.limits import page as whole_page
from benchmarks.limits import predictions

H200, H100 = "nvidia-h200", "nvidia-h100-80gb-hbm3"
VIT_B, VIT_L = towers.TOWERS


def test_db_of_a_block_and_task_reads_151_megabytes() -> None:
    """dy of the four linear layers of ViT-L/14, 32 images of 257 tokens, in bfloat16."""
    by_hand = 8224 * (3072 + 1024 + 4096 + 1024) * 2
    assert by_hand == 151_584_768
    assert layer_tables.db_bytes(VIT_L) == by_hand
    step = list(predictions.step_kernels(VIT_L, 8, H200, "cached"))
    sums = [(times, kernel) for times, kernel in step if kernel.name == "column sums"]
    assert sum(times for times, _ in sums) == 8 * 24 * 4
    assert sum(times * kernel.memory for times, kernel in sums) == 8 * 24 * by_hand
    seconds = 8 * 24 * (by_hand / (0.8 * 4.3e12) + 4 * 2e-6) + 8 * 24 * 4 * 2e-6
    assert predictions.prediction(step, H200).parts["db"] == pytest.approx(seconds), "sums, and a cast of each"
    assert not any(kernel.name == "column sums" for _, kernel in predictions.limit_kernels(VIT_L, 8, H200))
    assert "| **ViT-L/14, a block and task** |" in whole_page.page()
    assert "**152** |" in whole_page.page().split("| **ViT-L/14, a block and task** |")[1].splitlines()[0]
