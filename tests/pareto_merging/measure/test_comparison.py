"""The rules under which methods are compared, and what is kept when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError
from torch.utils.data import Dataset

from pareto_merging.data import digits
from pareto_merging.errors import Interrupted, UserError
from pareto_merging.measure.comparison import (
    Comparison,
    _TimeLeft,
    compare,
    default_grid,
    evaluated_preferences,
    result_name,
    summarize,
)
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.methods import task_arithmetic_preference
from pareto_merging.methods.interface import Merged
from pareto_merging.methods.registry import METHODS
from pareto_merging.preferences import one_hot_preferences
from pareto_merging.run.config import RunConfig
from pareto_merging.run.folder import chosen_methods, compare_run
from pareto_merging.run.workspace import Workspace, digits_files

SUITE = Path(digits.__file__).parent / "digits_suite"
TIMES = {"seconds", "tuning_seconds", "peak_bytes"}


def suite_config(tasks: Sequence[str] = ("upright", "rotated"), **changes: Any) -> RunConfig:
    method = {"steps": 2, "batch_size": 4, "rank": 2, **changes.pop("method", {})}
    return RunConfig.model_validate({"suite": "digits", "tasks": list(tasks), "method": method, **changes})


def own_config(changes: dict[str, dict[str, Any]], **more: Any) -> RunConfig:
    """The suite's two first tasks as files, with some of them changed."""
    encoder, tasks = digits_files(SUITE, ["upright", "rotated"])
    values = {name: {**task.model_dump(), **changes.get(name, {})} for name, task in tasks.items()}
    method = {"steps": 2, "batch_size": 4, "rank": 2, **more.pop("method", {})}
    return RunConfig.model_validate({"encoder": encoder.model_dump(), "tasks": values, "method": method, **more})


def comparison(config: RunConfig | None = None, effort: int = 1, **more: Any) -> Comparison:
    return Comparison(Workspace(config or suite_config()), effort, "equal", progress=False, **more)


def without_times(value: Any) -> Any:
    """Plain JSON without what two runs of the same work may differ in."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


class Changing(Dataset[Any]):
    """Images that call ``then`` from the fetch after ``whole`` ones on, and give what it returns."""

    def __init__(self, images: Dataset[Any], whole: float, then: Any) -> None:
        self.images, self.left, self.then = images, whole, then

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        image, label = self.images[index]
        return (image if self.left >= 0 else self.then(image)), label


def interrupt(image: Tensor) -> Tensor:
    # once: a second one interrupts at once
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)
    return image


def nan(image: Tensor) -> Tensor:
    return image * math.nan


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``spoil(whole, then)``: the unlabelled images of the first task change after so many fetches."""
    original = Workspace.available_merging_tasks

    def spoil(whole: float, then: Any) -> None:
        def spoilt(self: Workspace) -> Any:
            tasks = original(self)
            first = next(iter(tasks.values()))
            first.images = Changing(first.images, whole, then)
            return tasks

        monkeypatch.setattr(Workspace, "available_merging_tasks", spoilt)

    return spoil


# what is chosen, and by what


def test_the_score_is_the_agreement_with_the_finetuned_models() -> None:
    compared = comparison()
    problem = compared.problem
    merged = task_arithmetic_preference.merge(problem.pretrained, problem.finetuned)
    names = compared.workspace.task_names
    rows = one_hot_preferences(2)

    def classes(model: Any, name: str) -> Tensor:
        images, _ = digits.images(name, "merging")
        with torch.no_grad():
            return compared.tasks[name].head(model.eval()(images)).argmax(dim=1)

    def same(gamma: Tensor, name: str) -> float:
        teacher = compared.workspace.encoder(SUITE / f"finetuned_{name}.safetensors")
        found = classes(merged.at(gamma), name) == classes(teacher, name)
        return 100 * int(found.sum()) / len(found)

    equal = sum(same(torch.tensor([0.5, 0.5]), name) for name in names) / 2
    own = sum(same(rows[k], name) for k, name in enumerate(names)) / 2
    assert equal < own, "else the two halves cannot be told apart"
    assert compared.score(merged) == pytest.approx((equal + own) / 2)
    assert compared.score(merged, METHODS["adamerging-preference"]) == pytest.approx(equal)
    merged.preference_aware = False
    assert compared.score(merged) == pytest.approx(equal)


def test_only_tasks_with_images_are_scored() -> None:
    compared = comparison(own_config({"rotated": {"merging": None}}))
    assert list(compared.tasks) == ["upright"]
    found = compared.run("individual")
    assert found["status"] == "done"
    individual = compared._individuals
    assert compared.score(individual) == pytest.approx((100 + compared._agreement(individual.model(), ["upright"])) / 2)
    nothing = comparison(own_config({name: {"merging": None} for name in ("upright", "rotated")}), effort=4)
    assert nothing.score(individual) is None
    # no images to choose by: the published setting
    assert [row["choice"] for row in nothing.run("task-arithmetic")["candidates"]] == [{"coefficient": 0.3}]


def test_the_better_setting_is_taken_and_the_first_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [{"coefficient": c} for c in (0.0, 0.3, 2.0)]
    compared = comparison(effort=3, choices={"task-arithmetic": tries})
    found = compared.run("task-arithmetic")
    scores = [row["score"] for row in found["candidates"]]
    assert scores[1] > max(scores[0], scores[2])
    assert found["choice"] == {"coefficient": 0.3}
    told = iter([50.0, 70.0, 70.0])
    monkeypatch.setattr(compared, "score", lambda merged, method: next(told))
    assert compared.run("task-arithmetic")["choice"] == {"coefficient": 0.3}


def test_every_method_has_the_same_number_of_tries() -> None:
    compared = comparison(effort=2, choices={"dare": [{"coefficient": 0.1 * n} for n in range(1, 6)]})
    for key in ("ties", "dare", "pareto-data-free"):
        assert len(compared.run(key)["candidates"]) == 2
    assert len(compared.run("weight-averaging")["candidates"]) == 1
    longest = max(len(m.choices(8, compared.workspace.config.method)) for m in METHODS.values())
    assert longest == 4, "what --effort may be"
    for method in METHODS.values():
        tries = method.choices(8, compared.workspace.config.method)
        assert len({json.dumps(choice, sort_keys=True) for choice in tries}) == len(tries), method.title


def test_choices_cannot_see_labels() -> None:
    keys = ("task-arithmetic", "adamerging", "pareto")
    first, second = comparison(effort=2), comparison(effort=2)
    rng = torch.Generator().manual_seed(0)
    for task in second.tasks.values():
        task.images.labels = torch.randint(10, (len(task.images),), generator=rng)
    for key in keys:
        assert without_times(second.run(key)) == without_times(first.run(key))
    first.effort = second.effort = 1
    assert without_times(second.run("fisher")) == without_times(first.run("fisher"))
    first.effort = 2
    third = comparison(effort=2)
    for task in third.evaluation.values():
        task.images.labels = (task.images.labels + 1) % 10
    for key in keys[:2]:
        before, after = first.run(key), third.run(key)
        assert before["points"] != after["points"]
        for name in ("candidates", "choice"):
            assert without_times(before[name]) == without_times(after[name])


def test_unseen_tasks_are_judged_by_the_model_of_least_entropy() -> None:
    config = suite_config(unseen=["mirrored", "shifted"])
    compared = comparison(config)
    found = compared.run("task-arithmetic-preference")["unseen"]
    assert list(found) == ["mirrored", "shifted"]
    problem = compared.problem
    merged = task_arithmetic_preference.merge(problem.pretrained, problem.finetuned, coefficient=1.0)
    for name, (unlabelled, labelled) in compared.unseen.items():
        images = digits.images(name, "merging")[0]
        entropies = []
        for _, gamma in compared.preferences:
            with torch.no_grad():
                p = torch.softmax(unlabelled.head(merged.at(gamma).eval()(images)).double(), dim=1)
            entropies.append(float(torch.special.entr(p).sum(dim=1).mean()))
        gamma = compared.preferences[entropies.index(min(entropies))][1]
        assert found[name]["gamma"] == gamma.tolist()
        assert found[name]["entropy"] == pytest.approx(min(entropies), abs=1e-3)
        assert found[name]["accuracy"] == pytest.approx(evaluate_model(merged.at(gamma), {"": labelled}).average)
        # whatever the labels are, the same model
        unlabelled.images.labels = torch.zeros_like(unlabelled.images.labels)
        labelled.images.labels = torch.zeros_like(labelled.images.labels)
    again = compared.run("task-arithmetic-preference")["unseen"]
    assert [e["gamma"] for e in again.values()] == [e["gamma"] for e in found.values()]
    assert again["mirrored"]["accuracy"] != found["mirrored"]["accuracy"]
    assert "gamma" in compared.run("pretrained")["unseen"]["mirrored"]


def test_unseen_tasks_are_not_the_merged_ones() -> None:
    with pytest.raises(UserError, match="unseen: expected tasks that are not merged, got rotated"):
        Workspace(RunConfig.model_validate({"suite": "digits", "unseen": ["rotated"]}))


# preferences


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


# summaries


def result(method: str, seed: int, points: list[tuple[list[str], list[float] | None, list[float]]], **more: Any) -> Any:
    return {
        "method": method,
        "title": method.title(),
        "seed": seed,
        "is_bound": False,
        "tasks": ["a", "b"],
        "reference_point": [10.0, 20.0],
        "status": "done",
        "preference_aware": points[0][1] is not None,
        "seconds": 1.0,
        "tuning_seconds": 2.0,
        "peak_bytes": 3,
        "points": [{"kinds": kinds, "gamma": gamma, "accuracy": accuracy} for kinds, gamma, accuracy in points],
        **more,
    }


def test_summary_by_hand() -> None:
    aware = [
        (["equal", "priority:a", "priority:b"], [0.5, 0.5], [55.0, 60.0]),
        (["one-hot:a"], [1.0, 0.0], [82.0, 36.0]),
        (["one-hot:b"], [0.0, 1.0], [28.0, 84.0]),
    ]
    found = summarize(
        [
            result("aware", 0, aware),
            result("single", 0, [(["equal"], None, [64.0, 68.0])]),
            result("single", 1, [(["equal"], None, [46.0, 52.0])]),
            result("bound", 0, [(["equal"], None, [100.0, 100.0])], is_bound=True),
        ]
    )
    a, s = found["aware"], found["single"]
    assert a["equal"] == {"mean": 57.5, "sd": None, "values": [57.5]}
    assert a["priority"]["mean"] == (55 + 60) / 2
    assert a["one_hot"]["mean"] == (82 + 84) / 2
    assert a["worst_task"]["mean"] == 55
    # shares of the box of 90 by 80: (0.5, 0.5), (0.8, 0.2), (0.2, 0.8)
    assert a["hypervolume"]["mean"] == pytest.approx(0.2 * 0.8 + 0.3 * 0.5 + 0.3 * 0.2)
    # the union of seed 0: (82, 36), (64, 68), (28, 84); the bound is not in it, and dominates nothing
    assert a["igd_plus"]["mean"] == pytest.approx(math.hypot(64 - 55, 68 - 60) / 3, abs=1e-4)
    assert a["points"]["mean"] == a["non_dominated"]["mean"] == 3
    assert a["spearman"]["mean"] == 1
    cosines = [
        115 / (math.sqrt(2) * math.hypot(55, 60)),
        82 / math.hypot(82, 36),
        84 / math.hypot(28, 84),
    ]
    assert a["cosine"]["mean"] == pytest.approx(sum(cosines) / 3, abs=1e-4)
    assert a["per_task"]["b"]["values"] == [60.0]
    assert s["seeds"] == 2
    assert s["equal"] == {"mean": 57.5, "sd": pytest.approx(12.0208, abs=1e-4), "values": [66.0, 49.0]}
    assert s["one_hot"] == s["priority"] == s["equal"], "one model, whatever the preference"
    assert s["hypervolume"]["values"] == [pytest.approx(0.6 * 0.6), pytest.approx(0.4 * 0.4)]
    gaps = [math.hypot(82 - 64, 0), 0, math.hypot(0, 84 - 68)]
    assert s["igd_plus"]["values"] == [pytest.approx(sum(gaps) / 3, abs=1e-4), 0], "each seed has a union of its own"
    assert s["cosine"]["mean"] is None
    assert "hypervolume" not in found["bound"] and found["bound"]["equal"]["mean"] == 100
    json.dumps(found, allow_nan=False)


def test_summary_of_what_is_missing() -> None:
    failed = {"method": "b", "title": "B", "seed": 0, "is_bound": False, "status": "failed", "reason": "NaN"}
    skipped = {**failed, "method": "c", "status": "skipped", "reason": "no images"}
    done = result("b", 1, [(["equal"], None, [50.0, 50.0])])
    found = summarize([failed, done, skipped])
    assert found["b"]["seeds"] == 1 and found["b"]["failed"] and found["b"]["reasons"] == ["NaN"]
    assert found["b"]["equal"]["values"] == [50.0]
    assert found["c"] == {"title": "B", "is_bound": False, "seeds": 0, "reasons": ["no images"], "failed": False}
    assert "failed" not in summarize([done])["b"]


def test_summary_of_fewer_evaluated_than_merged_tasks() -> None:
    points = [(["equal"], [0.5, 0.5], [60.0]), (["one-hot:a"], [1.0, 0.0], [80.0])]
    entry = summarize([result("aware", 0, points, tasks=["a"], reference_point=[10.0])])["aware"]
    assert entry["one_hot"]["mean"] == 80
    assert entry["hypervolume"]["mean"] == pytest.approx(70 / 90, abs=1e-4)
    assert entry["cosine"]["mean"] is None and entry["spearman"]["mean"] is None


# what goes wrong


def test_a_failed_try_does_not_end_the_method_nor_a_failed_method_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ties = METHODS["ties"]

    def run(problem: Any, choice: Any) -> Merged:
        if choice["coefficient"] == 0.3:
            raise LinAlgError("the matrix\nis singular")
        return ties.run(problem, choice)

    monkeypatch.setitem(METHODS, "ties", dataclasses.replace(ties, run=run))
    compared = comparison(effort=2)
    found = compared.run("ties")
    assert found["status"] == "done"
    assert found["candidates"][0] == {"choice": ties.choices(2, None)[0], "error": "the matrix is singular"}
    assert found["choice"] == ties.choices(2, None)[1]
    compared.effort = 1
    failed = compared.run("ties")
    assert (failed["status"], failed["reason"]) == ("failed", "the matrix is singular")
    assert "points" not in failed


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), MemoryError("no room"), LinAlgError("singular")], ids=str
)
def test_what_goes_wrong_while_measuring_is_one_method_s(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: Any, choice: Any) -> Merged:
        def at(gamma: Tensor) -> Any:
            raise error

        return Merged(problem.task_names, at)

    dare = METHODS["dare"]
    monkeypatch.setitem(METHODS, "dare", dataclasses.replace(dare, run=run))
    found = comparison().run("dare")
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
    assert [r["status"] for r in found] == ["failed", "failed", "done"]
    assert all("NaN" in r["reason"] and "\n" not in r["reason"] for r in found[:2])
    assert {p.name for p in tmp_path.glob("*.json")} == {result_name(r["method"], 0) for r in found}


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
        on_done=lambda r, done, total, left: told.append(f"{r['method']} {done}/{total}"),
    )
    assert [r["status"] for r in found] == ["failed", "done", "done"]
    assert told == ["adamerging 1/3", "weight-averaging 2/3", "multitask 3/3"]
    assert "step 3, task upright" in found[0]["reason"]
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
        on_done=lambda r, done, total, left: told.append(f"{r['method']} {done}/{total}"),
    )
    assert told == ["adamerging 3/3"], "only what failed is run again"
    assert removed == [tmp_path / "a" / ".adamerging-seed-0"]
    log = (removed[0] / "0" / "log.jsonl").read_text().splitlines()
    assert any(json.loads(line) == {"event": "resumed", "step": 2, "steps": 3, "remaining": 1} for line in log)
    whole = compare(Workspace(config), tmp_path / "b", ["adamerging"], effort=1, progress=False)
    assert whole[0]["points"] == found[0]["points"]


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
    assert found["status"] == "done"
    assert not (tmp_path / f".{method}-seed-0").exists()
    (whole,) = compare(Workspace(config), tmp_path / "whole", [method], effort=1, grid="equal", progress=False)
    assert whole["points"] == found["points"]


def test_what_a_method_lacks_is_said() -> None:
    compared = comparison(own_config({"rotated": {"merging": None}, "upright": {"training": None}}))
    assert compared.run("pareto")["reason"] == "tasks: expected unlabelled images of every task, got none of rotated"
    found = compared.run("multitask")
    assert (found["status"], "got none of upright" in found["reason"]) == ("skipped", True)
    assert compared.run("ties")["status"] == "done"
    assert compared.run("pareto-data-free")["status"] == "done"


def test_a_task_without_evaluation_images_is_left_out(tmp_path: Path) -> None:
    config = own_config({"upright": {"evaluation": None}})
    report = compare_run(config, tmp_path / "out", methods="task-arithmetic-preference", effort=1, progress=False)
    assert (report["tasks"], report["evaluated_tasks"]) == (["upright", "rotated"], ["rotated"])
    entry = report["methods"]["task-arithmetic-preference"]
    assert list(entry["per_task"]) == ["rotated"]
    assert entry["one_hot"]["mean"] == pytest.approx(93.3, abs=0.5), "the preference of rotated is the second"
    assert entry["cosine"]["mean"] is None
    assert "- upright: no evaluation images" in (tmp_path / "out" / "compare.md").read_text()
    assert not list((tmp_path / "out").glob("*.png"))
    nothing = own_config({name: {"evaluation": None} for name in ("upright", "rotated")})
    with pytest.raises(UserError, match="expected `evaluation` images for at least one task, got none"):
        compare_run(nothing, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_one_task(tmp_path: Path) -> None:
    methods = "individual,ties,adamerging-preference,pareto"
    report = compare_run(suite_config(["upright"]), tmp_path / "out", methods=methods, effort=2, progress=False)
    assert all(entry["seeds"] == 1 for entry in report["methods"].values())
    entry = report["methods"]["pareto"]
    assert entry["equal"] == entry["one_hot"] == entry["priority"]
    assert entry["points"]["mean"] == 1
    assert not any("preference" in line for line in report["answer"])
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_head_of_one_class(tmp_path: Path) -> None:
    """A constant objective: entropy 0 and accuracy 100 whatever the weights, and no box to dominate a share of."""
    from safetensors.torch import load_file, save_file

    save_file(
        {"weight": load_file(SUITE / "heads.safetensors")["upright"][:1].contiguous()}, tmp_path / "head.safetensors"
    )
    images, _ = digits.images("upright", "evaluation")
    labels = torch.zeros(20, dtype=torch.int64)
    save_file({"images": images[:20].contiguous(), "labels": labels}, tmp_path / "images.safetensors")
    change = {"head": tmp_path / "head.safetensors", "evaluation": str(tmp_path / "images.safetensors")}
    config = own_config({"upright": change})
    report = compare_run(config, tmp_path / "out", methods="regmean,adamerging,pareto", effort=1, progress=False)
    assert report["reference_point"] == [100.0, 10.0]
    for entry in report["methods"].values():
        assert entry["seeds"] == 1, entry
        assert entry["per_task"]["upright"]["mean"] == 100
        assert entry["hypervolume"]["mean"] is None
        assert entry["igd_plus"]["mean"] >= 0
    stored = json.loads((tmp_path / "out" / result_name("pareto", 0)).read_text())
    assert all(point["entropy"][0] == 0 for point in stored["points"])


# going on


METHODS_TEXT = "weight-averaging,ties,adamerging,pareto"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    compare_run(suite_config(), folder, methods=METHODS_TEXT, effort=2, seeds=2, grid="equal", progress=False)
    return folder


def resumed(folder: Path, config: RunConfig | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"methods": METHODS_TEXT, "effort": 2, "seeds": 2, "grid": "equal", "progress": False}
    return compare_run(config or suite_config(), folder, **{**arguments, "resume": True, **changes})


def test_a_killed_comparison_keeps_what_it_had(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pareto_merging.measure import comparison as module
    from pareto_merging.run import folder as runs

    def stop(result: Any, done: int, total: int, left: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_tell", stop)
        with pytest.raises(KeyboardInterrupt):
            resumed(folder, resume=False, progress=True)
    done = sorted(path.name for path in folder.glob("*-seed-*.json"))
    assert len(done) == 3
    times = {name: (folder / name).stat().st_mtime_ns for name in done}
    ran: list[str] = []
    run = module.Comparison.run
    monkeypatch.setattr(module.Comparison, "run", lambda self, key: ran.append(key) or run(self, key))
    report = resumed(folder)
    assert ran == ["pareto", *METHODS_TEXT.split(",")], "the rest of the first seed, and the second"
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == times
    expected = json.loads((whole / "compare.json").read_text())
    assert without_times(report) == without_times(expected)
    assert without_times(json.loads((folder / "compare.json").read_text())) == without_times(expected)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    # nothing is missing any more
    ran.clear()
    assert without_times(resumed(folder)) == without_times(expected)
    assert ran == []


def test_seconds_count_what_was_learned_before(tmp_path: Path) -> None:
    working = tmp_path / ".adamerging-seed-0"
    working.mkdir()
    (working / "0-seconds.json").write_text("1000.0\n")
    (found,) = compare(Workspace(suite_config()), tmp_path, ["adamerging"], effort=1, grid="equal", progress=False)
    assert 1000 < found["seconds"] < 1100


def test_a_resumed_report_keeps_what_is_not_asked_for_now(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    before = json.loads((tmp_path / "copy" / "compare.json").read_text())
    after = resumed(tmp_path / "copy", methods=next(iter(before["methods"])))
    assert list(after["methods"]) == list(before["methods"])
    assert without_times(after["methods"]) == without_times(before["methods"])


def test_nan_images_are_named_with_their_task(spoil: Any) -> None:
    spoil(0, nan)
    found = comparison(effort=2).run("ties")
    assert found["status"] == "failed"
    assert found["reason"].startswith("task upright, unlabelled images: expected finite logits")


def test_seeds_differ(whole: Path) -> None:
    first, second = (json.loads((whole / result_name("pareto", seed)).read_text())["points"] for seed in (0, 1))
    assert [point["gamma"] for point in first] == [point["gamma"] for point in second]
    assert [point["entropy"] for point in first] != [point["entropy"] for point in second]
    report = json.loads((whole / "compare.json").read_text())
    assert len(set(report["methods"]["weight-averaging"]["equal"]["values"])) == 1
    assert report["methods"]["weight-averaging"]["equal"]["sd"] == 0
    assert report["choices"]["ties"].keys() == {"0", "1"}


def test_resume_may_add_methods_and_seeds(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    report = resumed(folder, methods="dare,ties", seeds=3)
    assert report["methods"]["dare"]["seeds"] == report["methods"]["ties"]["seeds"] == 3


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        (suite_config(method={"mu": 0.2}), {}, "method.mu"),
        (suite_config(["rotated", "upright"]), {}, "order of tasks"),
        (suite_config(unseen=["mirrored"]), {}, "unseen"),
        (suite_config(), {"effort": 3}, "effort"),
        (suite_config(), {"grid": "grid:5"}, "preferences"),
        (suite_config(), {"resume": False}, "got a comparison that can go on with --resume"),
        (suite_config(), {"methods": "tees"}, "got 'tees'; near: ties"),
        (suite_config(method={"preference": "fixed", "gamma": [1.0]}), {}, r"preference: expected shape \[2\]"),
    ],
)
def test_resume_wants_the_same(whole: Path, config: RunConfig, arguments: dict[str, Any], named: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    with pytest.raises(UserError, match=named):
        resumed(whole, config, **arguments)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("name", ["finetuned_rotated.safetensors", "heads.safetensors", "encoder.json"])
def test_resume_notices_changed_files(name: str, tmp_path: Path) -> None:
    shutil.copytree(SUITE, tmp_path / "suite")
    config, folder = suite_config(), tmp_path / "out"
    arguments = {"methods": "weight-averaging", "effort": 1, "grid": "equal", "progress": False}
    compare_run(config, folder, suite_folder=tmp_path / "suite", **arguments)
    os.utime(tmp_path / "suite" / name, ns=(1, 1))
    with pytest.raises(UserError, match=f"{name} differs"):
        compare_run(config, folder, suite_folder=tmp_path / "suite", resume=True, **arguments)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "pareto-comparison-result"}', '{"status": "done"}'])
def test_a_spoilt_result_is_named(whole: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / "ties-seed-1.json").write_text(text)
    with pytest.raises(UserError, match=r"ties-seed-1\.json: expected a result of a comparison"):
        resumed(folder)


def test_chosen_methods() -> None:
    everything = list(METHODS)
    assert chosen_methods(None, 2) == chosen_methods("all", 8) == everything
    assert chosen_methods(None, 3) == [name for name in everything if name != "adamerging-preference"]
    assert chosen_methods(" pareto , ties,pareto,", 2) == ["pareto", "ties"]
    assert chosen_methods("all,-fisher,-ties", 2) == [n for n in everything if n not in ("fisher", "ties")]
    for text, message in (
        ("paretto", "got 'paretto'; near: pareto"),
        ("qqqq", "got 'qqqq' .all: individual"),
        ("-fisher", "expected at least one"),
        (",", "expected at least one"),
        ("all,-fischer", "near: fisher"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_methods(text, 2)


def test_time_left_is_not_guessed_from_other_work() -> None:
    waiting = [(0, key) for key in ("weight-averaging", "dare", "adamerging", "pareto", "multitask")]
    left = _TimeLeft({"weight-averaging": 1, "dare": 4, "adamerging": 4, "pareto": 4, "multitask": 4}, waiting)
    left.done("weight-averaging", 0.5)
    assert left.seconds() is None, "nothing that learns was seen yet"
    left.done("adamerging", 100.0)
    assert left.seconds() == pytest.approx(4 * 0.5 + 8 * 25)
    left.done("multitask", None)
    assert left.seconds() == pytest.approx(4 * 0.5 + 4 * 25)
    left.done("pareto", 300.0)
    left.done("dare", 3.0)
    assert left.seconds() == 0
