"""The rules under which methods are compared, and what becomes of a method that goes wrong."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import comparison, interrupt, nan, own_config, suite_config
from torch import Tensor
from torch.linalg import LinAlgError

from pareto_merging.errors import Interrupted, UserError
from pareto_merging.measure.comparison import (
    Comparison,
    compare,
    default_grid,
    evaluated_preferences,
    result_name,
    seconds_left,
)
from pareto_merging.methods.interface import Merged
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.workspace import Workspace


def test_evaluated_preferences_of_one_task() -> None:
    ((kinds, gamma),) = evaluated_preferences(["a"], default_grid(1))
    assert kinds == ["equal", "priority:a", "one-hot:a", "grid"]
    assert gamma.tolist() == [1.0]


def test_evaluated_preferences_of_two_tasks() -> None:
    found = evaluated_preferences(["a", "b"], default_grid(2))
    assert len(found) == 11
    by_kind = {kind: gamma.tolist() for kinds, gamma in found for kind in kinds}
    assert by_kind["equal"] == by_kind["priority:a"] == by_kind["priority:b"] == [0.5, 0.5]
    assert by_kind["one-hot:b"] == [0.0, 1.0]
    assert sum("grid" in kinds for kinds, _ in found) == 11


@pytest.mark.parametrize(("tasks", "grid"), [(3, 36), (8, 30)])
def test_evaluated_preferences_of_more(tasks: int, grid: int) -> None:
    names = [f"t{k}" for k in range(tasks)]
    found = evaluated_preferences(names, default_grid(tasks))
    kinds = [kind for kinds, _ in found for kind in kinds]
    assert kinds.count("grid") == grid
    assert {f"{what}:{name}" for what in ("priority", "one-hot") for name in names} | {"equal"} <= set(kinds)
    rows = torch.stack([gamma for _, gamma in found])
    assert len(torch.unique(rows.round(decimals=6), dim=0)) == len(found)
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(len(found)))
    priority = next(gamma for kinds, gamma in found if f"priority:{names[1]}" in kinds)
    assert priority.tolist() == pytest.approx([0.5 if k == 1 else 0.5 / (tasks - 1) for k in range(tasks)])
    # the lattice of sevenths has the corners, random ones have not
    assert len(found) == (36 + 1 + 3 if tasks == 3 else 30 + 1 + 16)


def test_a_method_that_costs_a_run_per_preference_is_not_asked_for_the_grid() -> None:
    three = Comparison(Workspace(suite_config(("upright", "rotated", "mirrored"))), progress=False)
    aware = Merged(("upright", "rotated", "mirrored"), lambda gamma: three.problem.pretrained, preference_aware=True)
    assert len(three._preferences_of(aware, METHODS["pareto"])) == len(three.preferences) == 40
    kinds = [kinds[0] for kinds, _ in three._preferences_of(aware, METHODS["adamerging-preference"])]
    assert kinds == ["equal", "one-hot:upright", "one-hot:rotated", "one-hot:mirrored"]
    kinds = [kinds[0] for kinds, _ in three._preferences_of(aware, METHODS["individual"])]
    assert kinds == ["one-hot:upright", "one-hot:rotated", "one-hot:mirrored"]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), MemoryError("no room"), LinAlgError("singular")], ids=str
)
def test_what_goes_wrong_while_measuring_is_one_method_s(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: Any, choice: Any) -> Merged:
        def at(gamma: Tensor) -> Any:
            raise error

        return Merged(problem.task_names, at)

    dare = METHODS["dare"]
    monkeypatch.setitem(METHODS, "dare", replace(dare, run=run))
    found = comparison().run("dare").to_json()
    assert (found["status"], found["reason"]) == ("failed", str(error))


def test_missing_files_are_no_lack_of_the_method(tmp_path: Path) -> None:
    config = own_config({"upright": {"checkpoint": tmp_path / "none.safetensors"}})
    with pytest.raises(UserError, match=r"none\.safetensors"):
        comparison(config).run("weight-averaging")


def test_nan_weights_fail_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = Workspace.load

    def spoilt(self: Workspace, path: Path) -> Any:
        tensors = dict(load(self, path))
        if "rotated" in path.name:
            tensors["proj"] = tensors["proj"].clone()
            tensors["proj"][0, 0] = math.nan
        return tensors

    monkeypatch.setattr(Workspace, "load", spoilt)
    found = compare(Workspace(suite_config()), tmp_path, ["ties", "adamerging", "pretrained"], effort=1, progress=False)
    assert [r.status for r in found] == ["failed", "failed", "done"]
    assert all("NaN" in r.reason and "\n" not in r.reason for r in found[:2])
    assert {p.name for p in tmp_path.glob("*.json")} == {result_name(r.method, 0) for r in found}


def test_nan_logits_in_the_middle_fail_and_the_next_try_goes_on(
    tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = suite_config(method={"steps": 3})
    methods = ["adamerging", "weight-averaging", "multitask"]
    # AdaMerging takes 32 images a step
    spoil(70, nan)
    told: list[str] = []
    found = compare(
        Workspace(config),
        tmp_path / "a",
        methods,
        effort=1,
        progress=False,
        on_done=lambda r, done, total, left: told.append(f"{r.method} {done}/{total}"),
    )
    assert [r.status for r in found] == ["failed", "done", "done"]
    assert told == ["adamerging 1/3", "weight-averaging 2/3", "multitask 3/3"]
    assert "step 3, task upright" in found[0].reason
    assert (tmp_path / "a" / ".adamerging-seed-0").is_dir(), "what was learned is gone on from"
    spoil(math.inf, nan)
    removed: list[Path] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: removed.append(path))
    told.clear()
    found = compare(
        Workspace(config),
        tmp_path / "a",
        methods,
        effort=1,
        progress=False,
        on_done=lambda r, done, total, left: told.append(f"{r.method} {done}/{total}"),
    )
    assert told == ["adamerging 3/3"], "only what failed is run again"
    assert removed == [tmp_path / "a" / ".adamerging-seed-0"]
    log = (removed[0] / "0" / "log.jsonl").read_text().splitlines()
    assert any(json.loads(line) == {"event": "resumed", "step": 2, "steps": 3, "remaining": 1} for line in log)
    whole = compare(Workspace(config), tmp_path / "b", ["adamerging"], effort=1, progress=False)
    assert whole[0].points == found[0].points


@pytest.mark.parametrize("method", ["adamerging", "adamerging-preference"])
def test_ctrl_c_while_a_method_learns_is_no_failure(method: str, tmp_path: Path, spoil: Any) -> None:
    """adamerging-preference learns while it is measured."""
    config = suite_config(method={"steps": 3})
    spoil(40, interrupt)
    with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
        compare(Workspace(config), tmp_path, [method], effort=1, grid="equal", progress=False)
    assert not list(tmp_path.glob("*.json"))
    spoil(math.inf, interrupt)
    (found,) = compare(Workspace(config), tmp_path, [method], effort=1, grid="equal", progress=False)
    assert found.status == "done"
    assert not (tmp_path / f".{method}-seed-0").exists()
    (whole,) = compare(Workspace(config), tmp_path / "whole", [method], effort=1, grid="equal", progress=False)
    assert whole.points == found.points


def test_what_a_method_lacks_is_said() -> None:
    compared = comparison(own_config({"rotated": {"merging": None}, "upright": {"training": None}}))
    assert compared.run("pareto").reason == "tasks: expected unlabelled images of every task, got none of rotated"
    found = compared.run("multitask").to_json()
    assert (found["status"], "got none of upright" in found["reason"]) == ("skipped", True)
    assert compared.run("ties").to_json()["status"] == "done"
    assert compared.run("pareto-data-free").to_json()["status"] == "done"


def test_time_left_is_not_guessed_from_other_work() -> None:
    runs = {"weight-averaging": 1, "dare": 4, "adamerging": 4, "pareto": 4, "multitask": 4}
    waiting, done = ["dare", "adamerging", "pareto", "multitask"], [("weight-averaging", 0.5)]
    assert seconds_left(runs, waiting, done) is None, "nothing that learns was seen yet"
    waiting.remove("adamerging")
    done.append(("adamerging", 100.0))
    assert seconds_left(runs, waiting, done) == pytest.approx(4 * 0.5 + 8 * 25)
    waiting.remove("multitask")
    assert seconds_left(runs, waiting, done) == pytest.approx(4 * 0.5 + 4 * 25)
    done += [("pareto", 300.0), ("dare", 3.0)]
    assert seconds_left(runs, [], done) == 0
