"""What results files say of where they come from."""

from typing import Any

import pytest

from benchmarks import results
from pareto_merging.system import environment


def test_where_figures_were_measured_is_found_out_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    here: dict[str, Any] = {**environment.environment(), "cpu": "a CPU of its own", "gpu": None}
    monkeypatch.setattr(environment, "environment", lambda: here)
    machine = results.machine()
    assert machine.items() >= {name: value for name, value in here.items() if name != "package"}.items()
    assert "triton" in machine and "package" not in machine
