"""Exporting as a user meets it: plain models, folded files, and what must not be replaced."""

import json
from pathlib import Path

import pytest
import torch
from command_line import one_line, run
from safetensors.torch import load_file

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_metadata
from pareto_merging.model.files import load_folded, load_heads, read_header
from pareto_merging.model.state import set_preference
from pareto_merging.run.config import read_config
from pareto_merging.run.folder import open_run
from pareto_merging.run.workspace import Workspace


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
