"""What a step of the expert-guided method costs: a run of two rounds, its table, and the counter it uses."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run, tables
from benchmarks.suites import speed
from benchmarks.training.operators import Count
from pareto_merging.data import digits


def test_operators_and_bytes_by_hand() -> None:
    x, y = torch.ones(4, 3), torch.ones(3, 5, dtype=torch.float64)
    with Count() as counted:
        z = x.t() @ x.double().float()
        z.add_(1.0)
        torch.empty(7)
        y[1:]
    assert dict(counted.counts) == {"_to_copy": 2, "mm": 1, "add_": 1}
    copies = (12 * 4 + 12 * 8) + (12 * 8 + 12 * 4)
    # a tensor changed in place is read and written
    assert counted.bytes == copies + (12 + 12 + 9) * 4 + 2 * 9 * 4


@pytest.mark.slow
def test_quick_run_and_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "PRETRAINING", {**digits.PRETRAINING, "steps": 2})
    monkeypatch.setattr(digits, "FINETUNING", {**digits.FINETUNING, "steps": 2})
    out = tmp_path / "result.json"
    arguments = ["--suite", "speed", "--seeds", "7", "--quick", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert run.main(arguments) == 0
    report = json.loads(out.read_text())
    kinds = [(row["preset"], row["tasks_at_once"]) for row in report["rows"]]
    assert kinds == [("icml2025", "one"), ("icml2025", "all"), ("expert", "one"), ("expert", "all")]
    for row in report["rows"]:
        assert row["ms"] > 0 and row["calls"] == 2 and row["operators"] > 100 and row["bytes"] > 1e6
    # the published preset has no start and asks nobody
    assert report["before"]["expert"]["start"] > report["before"]["icml2025"]["start"]
    lines = speed.markdown(report).splitlines()
    assert lines[2].startswith("| icml2025 | one |") and "| 1.00 |" in lines[2]


def test_committed_results_are_of_one_run() -> None:
    path = tables.newest("speed")
    assert path is not None
    report = json.loads(path.read_text())
    assert not report["quick"] and report["tasks"] == 8
    assert all(row["calls"] >= 20 for row in report["rows"])
