"""What a predicted goal may be off."""

from benchmarks.common import towers
from benchmarks.limits import models as predicted_goals
from benchmarks.limits import predictions

H200, H100 = "nvidia-h200", "nvidia-h100-80gb-hbm3"
VIT_B, VIT_L = towers.TOWERS


def test_a_goal_says_what_it_may_be_off() -> None:
    (line,) = (line for line in predicted_goals.goal_lines(H200) if line[0] == "training step ViT-L/14 ÷ limit")
    step = predictions.step(VIT_L, 8, H200)
    besides = step.ratio("cached") - 1
    expected = (step.ratio("cached"), 1 + 0.75 * besides, 1 + 1.25 * besides)
    assert line[2] == "*{:.2f}× ({:.2f}–{:.2f})*".format(*expected)
