"""Tries: how many, which is taken, and what becomes of one that fails."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.comparisons import comparison, suite_config
from torch.linalg import LinAlgError

from pareto_merging.measure.comparison import compare
from pareto_merging.methods.interface import Merged
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.workspace import Workspace


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
