"""Scalarisations by hand."""

import math

import pytest
import torch

from pareto_merging.learn.scalarize import linear, scalarize, smooth_tchebycheff, tchebycheff

S = torch.tensor([1.2, 0.4, 0.9], dtype=torch.float64)
GAMMA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_scalarisations_by_hand() -> None:
    smooth = 0.1 * math.log(sum(math.exp(g * s / 0.1) for g, s in zip(GAMMA.tolist(), S.tolist(), strict=True)))
    assert float(smooth_tchebycheff(S, GAMMA, 0.1)) == pytest.approx(smooth)
    assert float(tchebycheff(S, GAMMA)) == pytest.approx(max(0.24, 0.2, 0.27))
    assert float(linear(S, GAMMA)) == pytest.approx(0.24 + 0.2 + 0.27)
    assert float(smooth_tchebycheff(S, GAMMA, 1e-6)) == pytest.approx(0.27)
    assert math.isfinite(float(smooth_tchebycheff(1e4 * S, GAMMA, 1e-3)))
    for kind in ("smooth-tchebycheff", "tchebycheff", "linear"):
        assert bool(torch.isfinite(scalarize(S, GAMMA, kind, 0.1)))
    with pytest.raises(ValueError, match="scalarization: expected"):
        scalarize(S, GAMMA, "sum", 0.1)  # type: ignore[arg-type]
