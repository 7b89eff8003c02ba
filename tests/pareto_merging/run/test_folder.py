"""A finished run is opened where what it was learned with is not registered; learning goes on only where it is."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from command_line import one_line, run
from support.run_folders import write_config

from pareto_merging.learn.objectives import OBJECTIVES, ObjectiveKind
from pareto_merging.learn.scalarize import SCALARIZATIONS
from pareto_merging.model.state import pareto_state
from pareto_merging.run.folder import open_run
from pareto_merging.serving import Engine
from pmkernels import strategies

OWN = {"objective": "own-objective", "scalarization": "own-scalarization"}


def register_own() -> None:
    weight_distance = OBJECTIVES["weight-distance"]
    OBJECTIVES["own-objective"] = ObjectiveKind("own-objective", weight_distance.make, needs="weights")
    SCALARIZATIONS["own-scalarization"] = SCALARIZATIONS["linear"]
    strategies.register(dataclasses.replace(strategies.TABLE["eager"], name="own-strategy"))


def unregister_own() -> None:
    del OBJECTIVES["own-objective"], SCALARIZATIONS["own-scalarization"]
    strategies.unregister("own-strategy")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an objective, a scalarisation and a strategy that are registered no more."""
    folder = tmp_path_factory.mktemp("own")
    config = write_config(folder / "run.yaml", method=OWN, strategy="own-strategy")
    register_own()
    try:
        assert run("train", config, "--out", folder / "run", "--quiet") == 0
        assert pareto_state(open_run(folder / "run")[1]).now.strategy == "own-strategy"
    finally:
        unregister_own()
    return folder / "run"


def test_what_a_run_was_learned_with_need_not_be_here_to_use_it(own: Path) -> None:
    workspace, model = open_run(own)
    assert (workspace.method.objective, workspace.method.scalarization) == tuple(OWN.values())
    assert (workspace.config.strategy, pareto_state(model).now.strategy) == ("own-strategy", "auto")
    assert run("evaluate", own, "--quiet") == 0
    assert run("export", own, "--preference", "equal", "--quiet") == 0
    assert run("export", own, "--folded", "--quiet") == 0
    assert run("plan", own / "config.yaml") == 0
    engine = Engine(own / "folded.safetensors", "cpu")
    assert torch.isfinite(engine(torch.zeros(2, 3, 8, 8), "equal")).all()


@pytest.mark.parametrize("resume", [False, True])
def test_learning_wants_it_here(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: bool) -> None:
    arguments = ("--out", own, "--resume") if resume else ("--out", tmp_path / "run")
    capsys.readouterr()
    assert run("train", own / "config.yaml", *arguments) == 2
    message = one_line(capsys)
    for expected in (
        "method.objective: expected one of entropy, distillation, features, weight-distance, got 'own-objective'",
        "method.scalarization: expected one of smooth-tchebycheff, tchebycheff, linear, got 'own-scalarization'",
        "strategy: expected one of auto, fused, streamed, eager, cached, got 'own-strategy'",
    ):
        assert expected in message
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_may_be_computed_otherwise_than_by_what_is_gone(own: Path, tmp_path: Path) -> None:
    """The configuration that is given must be of names that are here; the one that is stored need not."""
    folder, again = shutil.copytree(own, tmp_path / "run"), tmp_path / "again.yaml"
    again.write_text((own / "config.yaml").read_text().replace("own-strategy", "eager"))
    register_own()
    strategies.unregister("own-strategy")
    try:
        assert run("train", again, "--out", folder, "--resume", "--quiet") == 0
    finally:
        del OBJECTIVES["own-objective"], SCALARIZATIONS["own-scalarization"]


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
def test_a_run_of_the_kernels_is_opened_off_the_gpu(own: Path, strategy: str, tmp_path: Path) -> None:
    folder = shutil.copytree(own, tmp_path / "run")
    text = (folder / "config.yaml").read_text().replace("own-strategy", strategy)
    (folder / "config.yaml").write_text(text.replace("device: auto", "device: cpu"))
    assert pareto_state(open_run(folder)[1]).now.strategy == "auto"
