"""Planning as a user meets it: it counts without loading."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run
from support.run_folders import write_config

from pareto_merging.run.config import read_config
from pareto_merging.run.workspace import Workspace


def test_plan_counts_without_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", method={"rank": 4})
    assert run("plan", config, "--json") == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    model = Workspace(read_config(config)).pareto_model()
    from pareto_merging.model.learned import learned_parameters

    learned = learned_parameters(model)
    count = {key: sum(p.numel() for n, p in learned.items() if n.startswith(key)) for key in ("lam.", "A.", "B.", "G.")}
    assert rows["λ"]["parameters"] == count["lam."]
    assert rows["A and B"]["parameters"] == count["A."] + count["B."]
    assert rows["G"]["parameters"] == count["G."]
    frozen = sum(p.numel() for p in model.parameters()) - sum(count.values())
    assert rows["frozen weights W0"]["parameters"] + rows["task vectors τ"]["parameters"] == frozen
    # a model of hundreds of megabytes whose files do not exist
    large = tmp_path / "large.yaml"
    task = {"checkpoint": "x", "head": "x", "merging": "x"}
    large.write_text(
        yaml.safe_dump({"encoder": {"architecture": "ViT-L-14", "pretrained": "x"}, "tasks": {"a": task, "b": task}})
    )
    start = time.process_time()
    assert run("plan", large) == 0
    # of this process, however busy the machine is
    assert time.process_time() - start < 60
    assert "303,966,208" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "cached", "memory_budget": 10}, "memory_budget: expected at least "),
        ({"strategy": "streamed", "memory_budget": 10}, "memory_budget: expected None for strategy 'streamed'"),
        ({"device": "meta"}, "device: expected one that is here, got meta"),
    ],
)
def test_plan_refuses_what_training_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    config = write_config(tmp_path / "run.yaml", **settings)
    assert run("plan", config) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
