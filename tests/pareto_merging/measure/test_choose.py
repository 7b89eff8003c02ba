"""What is chosen, and by what: never by a label. How many tries there are, and what becomes of one that fails."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import SUITE, comparison, nan, own_config, suite_config, without_times
from torch import Tensor
from torch.linalg import LinAlgError

from pareto_merging.data import digits
from pareto_merging.measure.comparison import compare
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.methods import individual, task_arithmetic_preference
from pareto_merging.methods.interface import Merged
from pareto_merging.methods.registry import METHODS
from pareto_merging.preferences import one_hot_preferences
from pareto_merging.run.workspace import Workspace


def test_the_score_is_the_agreement_with_the_finetuned_models() -> None:
    compared = comparison()
    problem = compared.problem
    merged = task_arithmetic_preference.merge(problem.pretrained, problem.finetuned)
    names = compared.models.task_names
    rows = one_hot_preferences(2)

    def classes(model: Any, name: str) -> Tensor:
        images, _ = digits.images(name, "merging")
        with torch.no_grad():
            return compared.tasks[name].head(model.eval()(images)).argmax(dim=1)

    def same(gamma: Tensor, name: str) -> float:
        teacher = compared.models.encoder(SUITE / f"finetuned_{name}.safetensors")
        found = classes(merged.at(gamma), name) == classes(teacher, name)
        return 100 * int(found.sum()) / len(found)

    equal = sum(same(torch.tensor([0.5, 0.5]), name) for name in names) / 2
    own = sum(same(rows[k], name) for k, name in enumerate(names)) / 2
    assert equal < own, "else the two halves cannot be told apart"
    assert compared.judge.score(merged) == pytest.approx((equal + own) / 2)
    assert compared.judge.score(merged, METHODS["adamerging-preference"]) == pytest.approx(equal)
    merged.preference_aware = False
    assert compared.judge.score(merged) == pytest.approx(equal)


def test_only_tasks_with_images_are_scored() -> None:
    compared = comparison(own_config({"rotated": {"merging": None}}))
    assert list(compared.tasks) == ["upright"]
    found = compared.run("individual").to_json()
    assert found["status"] == "done"
    individuals = individual.merge(compared.problem.pretrained, compared.problem.finetuned)
    agreed = compared.judge.agreement(individuals.model(), ["upright"])
    assert compared.judge.score(individuals) == pytest.approx((100 + agreed) / 2)
    nothing = comparison(own_config({name: {"merging": None} for name in ("upright", "rotated")}), effort=4)
    assert nothing.judge.score(individuals) is None
    # no images to choose by: the published setting
    assert [row["choice"] for row in nothing.run("task-arithmetic").to_json()["candidates"]] == [{"coefficient": 0.3}]


def test_choices_cannot_see_labels() -> None:
    keys = ("task-arithmetic", "adamerging", "pareto")
    first, second = comparison(effort=2), comparison(effort=2)
    rng = torch.Generator().manual_seed(0)
    for task in second.tasks.values():
        task.images.labels = torch.randint(10, (len(task.images),), generator=rng)
    for key in keys:
        assert without_times(second.run(key).to_json()) == without_times(first.run(key).to_json())
    first.effort = second.effort = 1
    assert without_times(second.run("fisher").to_json()) == without_times(first.run("fisher").to_json())
    first.effort = 2
    third = comparison(effort=2)
    for task in third.evaluation.values():
        task.images.labels = (task.images.labels + 1) % 10
    for key in keys[:2]:
        before, after = first.run(key).to_json(), third.run(key).to_json()
        assert before["points"] != after["points"]
        for name in ("candidates", "choice"):
            assert without_times(before[name]) == without_times(after[name])


def test_unseen_tasks_are_judged_by_the_model_of_least_entropy() -> None:
    config = suite_config(unseen=["mirrored", "shifted"])
    compared = comparison(config)
    found = compared.run("task-arithmetic-preference").to_json()["unseen"]
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
    again = compared.run("task-arithmetic-preference").to_json()["unseen"]
    assert [e["gamma"] for e in again.values()] == [e["gamma"] for e in found.values()]
    assert again["mirrored"]["accuracy"] != found["mirrored"]["accuracy"]
    assert "gamma" in compared.run("pretrained").to_json()["unseen"]["mirrored"]


def test_nan_images_are_named_with_their_task(spoil: Any) -> None:
    spoil(0, nan)
    found = comparison(effort=2).run("ties").to_json()
    assert found["status"] == "failed"
    assert found["reason"].startswith("task upright, unlabelled images: expected finite logits")


def test_the_better_setting_is_taken_and_the_first_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [{"coefficient": c} for c in (0.0, 0.3, 2.0)]
    compared = comparison(effort=3, choices={"task-arithmetic": tries})
    found = compared.run("task-arithmetic").to_json()
    scores = [row["score"] for row in found["candidates"]]
    assert scores[1] > max(scores[0], scores[2])
    assert found["choice"] == {"coefficient": 0.3}
    told = iter([50.0, 70.0, 70.0])
    monkeypatch.setattr(compared.judge, "score", lambda merged, method: next(told))
    assert compared.run("task-arithmetic").to_json()["choice"] == {"coefficient": 0.3}


def test_every_method_has_the_same_number_of_tries() -> None:
    compared = comparison(effort=2, choices={"dare": [{"coefficient": 0.1 * n} for n in range(1, 6)]})
    for key in ("ties", "dare", "pareto-data-free"):
        assert len(compared.run(key).to_json()["candidates"]) == 2
    assert len(compared.run("weight-averaging").to_json()["candidates"]) == 1
    longest = max(len(m.choices(8, compared.models.config.method)) for m in METHODS.values())
    assert longest == 4, "what --effort may be"
    for method in METHODS.values():
        tries = method.choices(8, compared.models.config.method)
        assert len({json.dumps(choice, sort_keys=True) for choice in tries}) == len(tries), method.title


def test_a_failed_try_does_not_end_the_method_nor_a_failed_method_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ties = METHODS["ties"]

    def run(problem: Any, choice: Any) -> Merged:
        if choice["coefficient"] == 0.3:
            raise LinAlgError("the matrix\nis singular")
        return ties.run(problem, choice)

    monkeypatch.setitem(METHODS, "ties", replace(ties, run=run))
    compared = comparison(effort=2)
    found = compared.run("ties").to_json()
    assert found["status"] == "done"
    assert found["candidates"][0] == {"choice": ties.choices(2, None)[0], "error": "the matrix is singular"}
    assert found["choice"] == ties.choices(2, None)[1]
    compared.effort = 1
    failed = compared.run("ties").to_json()
    assert (failed["status"], failed["reason"]) == ("failed", "the matrix is singular")
    assert "points" not in failed


def test_seconds_count_what_was_learned_before(tmp_path: Path) -> None:
    working = tmp_path / ".adamerging-seed-0"
    working.mkdir()
    (working / "0-seconds.json").write_text("1000.0\n")
    (found,) = compare(Workspace(suite_config()), tmp_path, ["adamerging"], effort=1, grid="equal", progress=False)
    assert 1000 < found.seconds < 1100
