"""What a run begins with: settings for its images, teachers, and what is held back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from learn_cases import learned, same, task_set
from torch import Tensor, nn

from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.prepared import learned_from, prepare
from pareto_merging.learn.settings import FEW_IMAGES, MethodSettings
from pareto_merging.learn.teachers import TEACHERS_NAME
from pareto_merging.model.parametrize import parametrize


def parts() -> tuple[nn.Module, dict[str, nn.Module]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    copies = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(2)}
    return parametrize(net, copies, rank=2, low_rank="all", constant_rank=2), copies


def settings(**changes: Any) -> MethodSettings:
    given = {"preset": "expert", "start": "pretrained", "rank": 2, "low_rank": "all", "constant_rank": 2, "steps": 2}
    return MethodSettings.model_validate({**given, "batch_size": 4, **changes})


def prepared(tasks: Any, method: MethodSettings, **how: Any) -> Any:
    model, copies = parts()
    given = {"folder": None, "resume": False, "progress": False, "warn": lambda text: None}
    return prepare(model, tasks, method, copies, **{**given, **how})


def test_few_images_are_learned_from_carefully(tmp_path: Path) -> None:
    model, copies = parts()
    tasks = {**task_set(2, images=150), "t1": task_set(2, images=20)["t1"]}
    result = learn_pareto_set(model, tasks, settings(), folder=tmp_path, finetuned=copies, progress=False)
    log = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    events = {row["event"]: row for row in log if "event" in row}
    assert list(events) == ["started", "weights", "teachers", "few images", "chosen"]
    few = events["few images"]
    assert few["images"] == {"t0": 150, "t1": 20}
    assert few["chosen"]["learning_rate"] == pytest.approx(1e-4)
    assert few["chosen"]["lambda_learning_rate"] == pytest.approx(1e-3)
    assert few["chosen"]["held_back"] == 0.2
    assert result.chosen["step"] == events["chosen"]["step"]


def test_enough_images_change_nothing() -> None:
    method = settings()
    found = prepared(task_set(2, images=FEW_IMAGES), method)
    assert found.settings is method and not found.held
    assert [event["event"] for event in found.events] == ["teachers"]
    assert all(isinstance(task.teacher, Tensor) for task in found.tasks.values())


@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_fewest_images(images: int) -> None:
    found = prepared(task_set(2, images=images), settings())
    assert {name: len(task.images) for name, task in found.tasks.items()} == dict.fromkeys(
        ("t0", "t1"), max(1, images - 1)
    )
    assert len(found.held) == (2 if images > 1 else 0)
    model, copies = parts()
    how: dict[str, Any] = {"finetuned": copies, "progress": False, "on_warning": lambda text: None}
    assert learn_pareto_set(model, task_set(2, images=images), settings(), **how).steps == 2


def test_few_images_without_teachers_are_not_held_back() -> None:
    """But the rates are those of few images, whatever the objective."""
    method = MethodSettings(few_images="regularise", rank=2, low_rank="all")
    found = prepared(task_set(2), method)
    assert found.settings.learning_rate == pytest.approx(1e-4) and found.settings.held_back == 0 and not found.held
    assert all(task.teacher is None for task in found.tasks.values())
    assert [event["event"] for event in found.events] == ["few images"]


def test_published_settings_and_tasks_are_as_they_were_given() -> None:
    for method in (MethodSettings(rank=2, low_rank="all"), MethodSettings(objective="weight-distance")):
        tasks = task_set(2)
        found = prepared(tasks, method)
        assert found.settings is method and not found.held and not found.events
        assert all(found.tasks[name] is task for name, task in tasks.items())
    assert learned_from(tasks, method)[1] == tasks


def test_what_is_left_of_another_run_is_not_used(tmp_path: Path) -> None:
    (tmp_path / TEACHERS_NAME).write_bytes(b"of another run")
    found = prepared(task_set(2), settings(), folder=tmp_path)
    assert isinstance(found.tasks["t0"].teacher, Tensor)
    assert (tmp_path / TEACHERS_NAME).read_bytes()[:3] != b"of "
    before = (tmp_path / TEACHERS_NAME).stat().st_mtime_ns
    prepared(task_set(2), settings(), folder=tmp_path, resume=True)
    assert (tmp_path / TEACHERS_NAME).stat().st_mtime_ns == before


def test_no_step_is_a_run_too(tmp_path: Path) -> None:
    model, copies = parts()
    before = learned(model)
    result = learn_pareto_set(model, task_set(2), settings(steps=0), finetuned=copies, folder=tmp_path, progress=False)
    assert result.steps == 0 and result.chosen == {} and same(learned(model), before)
    assert not (tmp_path / TEACHERS_NAME).exists(), "nobody asks the fine-tuned models"
    again = learn_pareto_set(
        model, task_set(2), settings(steps=0), finetuned=copies, folder=tmp_path, progress=False, resume=True
    )
    assert again.steps == 0 and same(learned(model), before)
