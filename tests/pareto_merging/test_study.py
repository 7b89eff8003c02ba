"""The rules under which methods are compared."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pareto_merging.config import RunConfig
from pareto_merging.study import Study, front_metrics
from pareto_merging.workspace import Workspace


@pytest.fixture(scope="module")
def study() -> Study:
    method = {"steps": 2, "batch_size": 4, "rank": 2}
    config = RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "rotated"], "method": method})
    return Study(Workspace(config), coefficients=(0.0, 0.3), learning_rates=(1e-3,), progress=False)


def test_choices_cannot_see_labels(study: Study) -> None:
    for name, task in study._unlabelled.items():
        labels = {int(task.images[index][1]) for index in range(50)}
        assert labels == {0}, name
    score = study.label_free_score(study.pretrained)
    for task in study.merging.values():
        task.images.labels = torch.zeros_like(task.images.labels)
    assert study.label_free_score(study.pretrained) == score


def test_the_score_is_minus_the_mutual_information(study: Study) -> None:
    expected = 0.0
    with torch.no_grad():
        for task in study.merging.values():
            p = torch.softmax(task.head(study.pretrained(task.images.images)).double(), dim=-1)
            mean = p.mean(dim=0)
            expected += float(-(p * p.log()).sum(dim=-1).mean() + (mean * mean.log()).sum()) / 2
    assert study.label_free_score(study.pretrained) == pytest.approx(expected, rel=1e-4)


def test_task_arithmetic_takes_the_better_coefficient(study: Study) -> None:
    entry = study.task_arithmetic()
    assert entry.chosen == {"coefficient": 0.3}
    assert entry.scores.average > study.generalist().scores.average
    assert entry.to_json()["chosen"] == {"coefficient": 0.3}


def test_individuals(study: Study) -> None:
    own = study.individual().scores.accuracy
    everywhere = study.individual_models()
    assert own == {name: everywhere[name].accuracy[name] for name in own}
    assert min(own.values()) > 85


def test_front_metrics() -> None:
    front = [
        {"gamma": [0.0, 1.0], "accuracy": [20.0, 60.0], "entropy": [0.9, 0.1]},
        {"gamma": [0.5, 0.5], "accuracy": [40.0, 40.0], "entropy": [0.5, 0.5]},
        {"gamma": [1.0, 0.0], "accuracy": [60.0, 20.0], "entropy": [0.1, 0.9]},
    ]
    found = front_metrics(front, {"a": [30.0, 30.0], "b": [10.0, 90.0]})
    assert found["reference_point"] == [10.0, 10.0]
    # columns of width 10, 20 and 20 above the reference, of height 50, 30 and 10
    assert found["pareto_merging"] == pytest.approx(10 * 50 + 20 * 30 + 20 * 10)
    assert found["baselines"] == {"a": pytest.approx(400), "b": 0}
    assert found["all_baselines_together"] == pytest.approx(400)
    assert found["non_dominated_points"] == 3
    assert found["spearman_gamma1_entropy1"] == pytest.approx(-1)
    assert found["spearman_gamma1_accuracy1"] == pytest.approx(1)
    assert found["spearman_gamma2_entropy2"] == pytest.approx(-1)
    assert found["spearman_gamma2_accuracy2"] == pytest.approx(1)


def test_measured_sees_memory() -> None:
    """In a process of its own: this one's allocator may serve 256 MiB from what earlier tests have left."""
    code = (
        "from pareto_merging.study import measured\n"
        "small, large = (measured(lambda: len(b'x' * size)) for size in (1, 256 * 2**20))\n"
        "assert large[0] == 256 * 2**20 and large[1] > 0\n"
        "print(large[2] - small[2])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(finished.stdout) >= 200 * 2**20
