"""Strategies and crossovers on made-up times."""

import json

import pytest
import torch

from benchmarks.common import session
from benchmarks.tune import compiling, strategies

LIKE = torch.empty(0, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


def test_ties_make_no_crossover() -> None:
    times = {1: (1.0, 2.0), 2: (1.0, 0.99), 4: (1.0, 1.5), 8: (3.0, 3.01), 16: (4.0, 2.0), 32: (4.0, 4.0)}
    best = {1: "fused", 2: "fused", 4: "fused", 8: "fused", 16: "streamed", 32: "streamed"}
    assert strategies.decided(times) == best
    assert strategies.decided({1: (1.0, 1.0), 2: (2.0, 1.0)}) == {1: "streamed", 2: "streamed"}
    assert strategies.decided({1: (1.0, 1.0)}) == {}
    # wrong is slower than anything
    assert strategies.decided({1: (session.FAILED, 5.0)}) == {1: "streamed"}


def test_a_file_has_both_sides_of_each_crossover_where_the_model_is_wrong() -> None:
    rows = [2**power for power in range(15)]
    best = {m: "streamed" if m >= 512 or m == 2 else "fused" for m in rows}
    assert strategies.boundaries(best, best) == {}
    always = dict.fromkeys(rows, "fused")
    found = strategies.boundaries(best, always)
    assert found == {1: "fused", 2: "streamed", 4: "fused", 256: "fused", 512: "streamed"}
    assert list(strategies.boundaries(always, best).values()) == ["fused"]
    # the library then says at every measured number of rows, and between them, what was measured
    point = strategies.Point("forward", 3072, 1024, 8, 16)
    times = {point: {m: (1.0, 2.0) if label == "fused" else (2.0, 1.0) for m, label in best.items()}}
    with compiling.active("sm_90"):
        lines, labels = strategies.choices(times, LIKE)
    assert labels == {point: best}
    text = json.dumps({"architectures": ["sm_90"], "entries": [], "strategies": lines})
    with compiling.active("made-up", text):
        assert {m: point.choose(m, LIKE) for m in rows} == best
        assert [point.choose(m, LIKE) for m in (300, 400, 10**6)] == ["fused", "streamed", "streamed"]
