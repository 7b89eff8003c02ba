"""Evaluating, exporting and planning as a user meets it; a plan counts without loading."""

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import one_line, run
from safetensors.torch import load_file
from support.run_folders import write_config

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_metadata
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.model.files import load_folded, load_heads, read_header
from pareto_merging.model.state import set_preference
from pareto_merging.run.config import read_config
from pareto_merging.run.folder import open_run
from pareto_merging.run.workspace import Workspace
from pmkernels import launch


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


def test_export_merged_loads_in_plain_open_clip(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    assert run("export", finished, "--preference", "0.3,0.7", "--out", out) == 0
    workspace, model = open_run(finished)
    encoder = encoders.build(workspace.encoder_description)
    encoder.load_state_dict(load_file(out))
    set_preference(model, [0.3, 0.7])
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(encoder(x), model(x), rtol=1e-5, atol=1e-5)
    assert json.loads(read_metadata(out)["preference"]) == pytest.approx({"upright": 0.3, "rotated": 0.7})


def test_export_folded_is_self_sufficient(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded.safetensors"
    assert run("export", finished, "--folded", "--out", out) == 0
    header = read_header(out, "pareto-folded")
    folded = load_folded(out)
    _, model = open_run(finished)
    x = torch.randn(2, 3, 8, 8)
    gammas = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    set_preference(model, gammas)
    set_preference(folded, gammas)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    heads, expected = load_heads(out), Workspace(read_config(finished / "config.yaml")).head("rotated")
    assert list(heads) == ["upright", "rotated"]
    torch.testing.assert_close(heads["rotated"](x.flatten(1)[:, :16]), expected(x.flatten(1)[:, :16]))
    assert header["logit_scales"]["upright"] > 0


def test_exports_do_not_overwrite_what_the_run_is_made_of(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "pareto_set.safetensors").read_bytes()
    capsys.readouterr()
    assert run("export", finished, "--folded", "--overwrite", "--out", finished / "pareto_set.safetensors") == 2
    assert "got one that the run is made of" in one_line(capsys)
    assert (finished / "pareto_set.safetensors").read_bytes() == before
