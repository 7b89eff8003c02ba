"""What the tests of comparisons share."""

from typing import Any

import pytest
from support.comparisons import Changing

from pareto_merging.run.workspace import Workspace


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
