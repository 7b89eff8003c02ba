"""What `plan` counts is what a model then has."""

from typing import Any

import pytest

from pareto_merging.learn.teachers import with_teachers
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
        {"constant_rank": 5},
        {"constant_rank": 5, "low_rank": "none", "learn_lambda": False},
        {"preset": "expert", "rank": 2},
    ],
    ids=str,
)
def test_learned_parameters(method: dict[str, Any]) -> None:
    config = RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "blocks", "shifted"], "method": method})
    workspace = Workspace(config)
    counted = {row.kind: row.parameters for row in plan_run(workspace)}
    found = {"lam": 0, "A_c": 0, "B_c": 0, "A": 0, "B": 0, "G": 0}
    for name, parameter in learned_parameters(workspace.pareto_model()).items():
        found[name.partition(".")[0]] += parameter.numel()
    assert counted["λ"] == found["lam"]
    assert counted["A and B"] == found["A"] + found["B"]
    assert counted["G"] == found["G"]
    assert counted.get("A_c and B_c", 0) == found["A_c"] + found["B_c"]
    assert counted["Pareto set file"] == sum(found.values())


@pytest.mark.parametrize("teacher_outputs", ["auto", "in-step"])
@pytest.mark.parametrize("method", [{}, {"features_weight": 0.5}, {"objective": "features"}], ids=str)
def test_teachers_outputs(method: dict[str, Any], teacher_outputs: str) -> None:
    given = {"preset": "expert", "rank": 2, "constant_rank": 2, "teacher_outputs": teacher_outputs, **method}
    config = RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "blocks"], "method": given})
    workspace = Workspace(config)
    (row,) = [row for row in plan_run(workspace) if row.kind == "teachers' outputs"]
    if teacher_outputs == "in-step":
        assert (row.parameters, row.bytes, row.note) == (0, 0, "none is kept")
        return
    model, tasks, finetuned = workspace.pareto_model(), workspace.merging_tasks(), workspace.finetuned()
    kept = with_teachers(model, tasks, config.method, finetuned, progress=False)
    assert row.bytes == sum(task.teacher.nbytes for task in kept.values())
    assert row.parameters == sum(task.teacher.numel() for task in kept.values())
