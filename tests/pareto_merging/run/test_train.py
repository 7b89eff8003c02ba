"""Learning into a run folder from Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_cases import learned, same

from pareto_merging.errors import UserError
from pareto_merging.learn import learner
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.teachers import TEACHERS_NAME
from pareto_merging.methods.start import START_NAME
from pareto_merging.model.files import load_pareto_set
from pareto_merging.model.state import preference
from pareto_merging.run.compare import compare_run
from pareto_merging.run.config import RunConfig
from pareto_merging.run.demo import run_demo
from pareto_merging.run.folder import SET_NAME
from pareto_merging.run.train import train_run
from pareto_merging.run.workspace import Workspace

CONFIG = RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "mirrored"], "method": {"steps": 1}})


@pytest.mark.parametrize(
    "into",
    [
        lambda folder: train_run(CONFIG, folder, progress=False),
        lambda folder: compare_run(CONFIG, folder, progress=False),
        lambda folder: run_demo(folder, progress=False),
    ],
    ids=["train", "compare", "demo"],
)
def test_a_folder_may_be_text(into: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    with pytest.raises(UserError, match="expected a new path, got an existing folder"):
        into(str(tmp_path))


def expert_run(**changes: Any) -> RunConfig:
    """Few images of two tasks of the embedded suite."""
    method = {
        "preset": "expert",
        "steps": 4,
        "start_images": 20,
        "batch_size": 8,
        "rank": 2,
        "constant_rank": 2,
        **changes,
    }
    return RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "mirrored"], "method": method})


def test_the_expert_preset_is_trained_resumed_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model, result = train_run(expert_run(), folder, progress=False)
    names = {path.name for path in folder.iterdir()}
    assert {START_NAME, TEACHERS_NAME, CHECKPOINT_NAME, SET_NAME} <= names and result.steps == 4
    events = [
        row["event"] for line in (folder / LOG_NAME).read_text().splitlines() if "event" in (row := json.loads(line))
    ]
    assert "teachers" in events
    written = (folder / SET_NAME).read_bytes()
    again, resumed = train_run(expert_run(), folder, resume=True, progress=False)
    assert resumed.resumed_from == 4 and same(learned(again), learned(model))
    assert (folder / SET_NAME).read_bytes() == written
    workspace = Workspace(expert_run())
    loaded = load_pareto_set(folder / SET_NAME, workspace.pretrained(), workspace.finetuned())
    images = workspace.merging_tasks()["upright"].images.images[:4]
    for gamma in ([0.5, 0.5], [1.0, 0.0]):
        with torch.no_grad(), preference(model, gamma), preference(loaded, gamma):
            assert torch.equal(model(images), loaded(images))


def test_a_mistake_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that comes after the start and the teachers were written."""
    folder = tmp_path / "run"
    monkeypatch.setattr(learner, "why_not_per_item", lambda model, images: "a reason")
    config = expert_run(start="regmean").model_copy(update={"tasks_at_once": "all"})
    with pytest.raises(UserError, match="tasks_at_once"):
        train_run(config, folder, progress=False)
    assert not folder.exists()
