"""What results files say of where they come from."""

import pytest

from benchmarks import results
from pareto_merging.system import environment


def test_where_figures_were_measured_is_found_out_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpu_name", lambda: "a CPU of its own")
    here = {name: value for name, value in environment.environment().items() if name != "package"}
    assert here["cpu"] == "a CPU of its own"
    assert results.machine().items() >= here.items()
    assert set(results.machine()) - set(here) >= {"triton"}
