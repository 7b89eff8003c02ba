"""A profile of a step."""

import torch

from benchmarks.training import runners

CPU = torch.device("cpu")


def test_a_profile_names_what_takes_the_time() -> None:
    x = torch.randn(300, 300)
    found = runners.profile(lambda: (x @ x).relu_(), CPU, top=2)
    assert "aten::mm" in [entry["kernel"] for entry in found]
    assert len(found) == 2 and found[0]["ms"] >= found[1]["ms"] > 0
    assert 0 < sum(entry["share"] for entry in found) <= 1.0 + 1e-9
