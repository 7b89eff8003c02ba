"""Evaluating as a user meets it: tables, pictures, and what has changed since."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import one_line, run

from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.run.config import read_config
from pareto_merging.run.folder import open_run
from pareto_merging.run.workspace import Workspace
from pmkernels import launch


def test_evaluate(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", finished, "--preferences", "0.5,0.5;0.9,0.1;rotated=1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["gamma"] for row in report["results"]] == [[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]]
    workspace, model = open_run(finished)
    from pareto_merging.model.fold import merge

    scores = evaluate_model(merge(model, [0.9, 0.1]), workspace.evaluation_tasks())
    assert report["results"][1]["accuracy"] == pytest.approx(scores.accuracy, abs=1e-3)
    assert json.loads((finished / "evaluation.json").read_text()) == report
    assert run("evaluate", finished, "--quiet") == 0
    table = capsys.readouterr().out
    assert "upright" in table
    assert "average" in table


@pytest.mark.parametrize(
    ("preferences", "count"), [("lattice:4", 5), ("energy:6", 6), ("dirichlet:3;priority", 5), ("grid:3;one-hot", 5)]
)
def test_evaluate_on_grids_leaves_tables_and_pictures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], preferences: str, count: int
) -> None:
    other = tmp_path / "a run"
    shutil.copytree(finished, other)
    capsys.readouterr()
    assert run("evaluate", other, "--preferences", preferences, "--quiet") == 0
    out = capsys.readouterr().out
    assert f"{other}: evaluation.json, evaluation.csv, evaluation.md, front.png" in out
    report = json.loads((other / "evaluation.json").read_text())
    assert len(report["results"]) == count
    assert report["indicators"]["points"] == count
    assert report["indicators"]["reference_point"] == [10.0, 10.0]
    with (other / "evaluation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["gamma upright"]) for row in rows] == pytest.approx(
        [r["gamma"][0] for r in report["results"]], rel=1e-4
    )
    assert [float(row["average"]) for row in rows] == pytest.approx([r["average"] for r in report["results"]], rel=1e-4)
    assert (other / "evaluation.md").read_text().count("\n") == count + 2
    assert (other / "front.png").stat().st_size > 10_000


def test_a_changed_checkpoint_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(finished, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    workspace = Workspace(read_config(finished / "config.yaml"))
    entries = {
        name: {"checkpoint": str(t.checkpoint), "head": str(t.head), "merging": t.merging, "evaluation": t.evaluation}
        for name, t in workspace.task_configs.items()
    }
    entries["upright"]["checkpoint"] = entries["rotated"]["checkpoint"]
    encoder = {
        "architecture": workspace.encoder_config.architecture,
        "pretrained": str(workspace.encoder_config.pretrained),
    }
    (other / "config.yaml").write_text(
        yaml.safe_dump({"encoder": encoder, "tasks": entries, "method": config["method"]})
    )
    capsys.readouterr()
    assert run("evaluate", other) == 2
    assert "belongs to other weights; digest of upright" in one_line(capsys)


def test_how_it_was_computed_stands_in_nobodys_way(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run learned on a GPU is evaluated and exported where there is none, with the strategy it cannot have there."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = folder / "config.yaml"
    text = config.read_text()
    assert "strategy: auto" in text
    config.write_text(text.replace("strategy: auto", "strategy: fused"))
    monkeypatch.setattr(launch, "INTERPRETING", False)
    assert run("evaluate", folder, "--preferences", "equal", "--quiet") == 0
    assert run("export", folder, "--preference", "equal", "--out", tmp_path / "merged.safetensors") == 0
    config.write_text(text.replace("strategy: auto", "strategy: auto\nmemory_budget: 1000 PiB"))
    assert run("evaluate", folder, "--preferences", "equal", "--quiet") == 0
