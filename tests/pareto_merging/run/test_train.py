"""Learning into a run folder from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pareto_merging.errors import UserError
from pareto_merging.run.compare import compare_run
from pareto_merging.run.config import RunConfig
from pareto_merging.run.demo import run_demo
from pareto_merging.run.train import train_run

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
