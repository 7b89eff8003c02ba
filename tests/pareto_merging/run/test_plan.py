"""What `plan` counts is what a model then has."""

from typing import Any

import pytest

from pareto_merging.model.learned import learned_parameters
from pareto_merging.run.config import RunConfig
from pareto_merging.run.plan import plan_run
from pareto_merging.run.workspace import Workspace


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"rank": 3, "low_rank": "in-projection", "granularity": "block"},
        {"core": "outer-product"},
        {"core": "outer-vector", "rank": 7},
        {"low_rank": "none", "granularity": "model"},
    ],
    ids=str,
)
def test_learned_parameters(method: dict[str, Any]) -> None:
    config = RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "blocks", "shifted"], "method": method})
    workspace = Workspace(config)
    counted = {row.kind: row.parameters for row in plan_run(workspace)}
    found = {"lam": 0, "A": 0, "B": 0, "G": 0}
    for name, parameter in learned_parameters(workspace.pareto_model()).items():
        found[name.partition(".")[0]] += parameter.numel()
    assert counted["λ"] == found["lam"]
    assert counted["A and B"] == found["A"] + found["B"]
    assert counted["G"] == found["G"]
    assert counted["Pareto set file"] == sum(found.values())
