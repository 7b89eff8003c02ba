"""Training as a user meets it: results, mistakes in files, interrupted runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import one_line, run
from safetensors.torch import load_file, save_file
from support.run_folders import own_files, spoil, steps_logged, write_config

from pareto_merging.model.files import read_header
from pareto_merging.run.config import read_config
from pareto_merging.run.workspace import Workspace


def test_train_writes_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "log.jsonl", "checkpoint.safetensors", "pareto_set.safetensors"} <= names
    config = read_config(finished / "config.yaml")
    assert config.method.steps == 3
    header = read_header(finished / "pareto_set.safetensors", "pareto-set")
    assert header["task_names"] == ["upright", "rotated"]
    assert header["training"]["steps"] == 3


def test_files_of_ones_own(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way of a real user: an architecture file, checkpoints, heads, image folders; here made from the suite."""
    from PIL import Image

    workspace = Workspace(read_config(finished / "config.yaml"))
    rng = torch.Generator().manual_seed(0)
    for split in ("merging", "test"):
        for label in ("one", "two"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(0, 255, (12, 12, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    shutil.copy(workspace.encoder_config.architecture, tmp_path / "encoder.json")
    shutil.copy(workspace.encoder_config.pretrained, tmp_path / "pretrained.safetensors")
    tasks = {}
    for name, task in workspace.task_configs.items():
        shutil.copy(task.checkpoint, tmp_path / f"{name}.safetensors")
        save_file({"weight": torch.randn(2, 16, generator=rng)}, tmp_path / f"{name}_head.safetensors")
        tasks[name] = {
            "checkpoint": f"{name}.safetensors",
            "head": f"{name}_head.safetensors",
            "merging": "merging",
            "evaluation": "test",
        }
    config = {
        "encoder": {"architecture": "encoder.json", "pretrained": "pretrained.safetensors"},
        "tasks": tasks,
        "method": {"steps": 2, "batch_size": 3, "rank": 2, "objective": "weight-distance"},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run("train", path, "--out", tmp_path / "free", "--quiet") == 0
    config["method"] = {"steps": 2, "batch_size": 3, "rank": 2}
    path.write_text(yaml.safe_dump(config))
    assert run("train", path, "--out", tmp_path / "run", "--quiet") == 0
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 3


def test_wrong_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    workspace = Workspace(read_config(finished / "config.yaml"))
    good = workspace.encoder_config.pretrained
    task = workspace.task_configs["upright"]
    tensors = load_file(good)
    save_file({k: v for k, v in tensors.items() if k != "ln_post.bias"}, tmp_path / "missing.safetensors")
    save_file({**tensors, "proj": torch.zeros(3, 3)}, tmp_path / "shaped.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 and then nothing")
    for name, expected in (
        ("missing.safetensors", "missing.safetensors: is not of the encoder's architecture: it lacks ln_post.bias"),
        ("shaped.safetensors", "has proj of shape [3, 3], expected [96, 16]"),
        ("garbage.safetensors", "garbage.safetensors: expected a safetensors file"),
        ("weights.pt", "weights.pt: expected a whole zip archive, got one without a directory (truncated)"),
        ("none.safetensors", "none.safetensors: expected a file, a folder, a hub id"),
    ):
        path = tmp_path / "own.yaml"
        entry = {"checkpoint": str(tmp_path / name), "head": str(task.head), "merging": "digits:upright/merging"}
        encoder = {"architecture": workspace.encoder_config.architecture, "pretrained": str(good)}
        path.write_text(yaml.safe_dump({"encoder": encoder, "tasks": {"upright": entry}, "method": {"steps": 1}}))
        capsys.readouterr()
        assert run("train", path, "--out", tmp_path / "out") == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "out").exists()


def test_resume_wants_the_same_configuration(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write_config(tmp_path / "run.yaml")
    assert run("train", same, "--out", finished, "--resume", "--quiet") == 0
    assert "3 of them before" in capsys.readouterr().out
    other = write_config(tmp_path / "run.yaml", method={"mu": 0.2})
    assert run("train", other, "--out", finished, "--resume") == 2
    assert "method.mu" in one_line(capsys)


def test_a_nan_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", method={"learning_rate": 1e38, "steps": 5})
    assert run("train", config, "--out", tmp_path / "run", "--quiet") == 1
    message = one_line(capsys)
    assert "step " in message
    assert "checkpoint.safetensors" in message
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "run" / "pareto_set.safetensors").exists()
    assert run("evaluate", tmp_path / "run") == 2
    assert "expected a finished run" in one_line(capsys)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", method={"steps": 400, "checkpoint_every": 1000})
    command = [sys.executable, "-m", "pareto_merging", "train", str(config), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not steps_logged(tmp_path / "run" / "log.jsonl") > 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"go on with: pareto-merging train {config} --out {tmp_path / 'run'} --resume" in errors
    done = steps_logged(tmp_path / "run" / "log.jsonl")
    assert 3 < done < 400
    finished = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0
    assert f"400 steps, {done} of them before" in finished.stdout
    assert steps_logged(tmp_path / "run" / "log.jsonl") == 400


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("head of another width", "expected a head of [classes, 16] for this encoder, got [2, 15]"),
        ("integer weights", "expected floating-point tensors, got"),
        ("a text model", "expected a CLIP vision transformer"),
        ("negative scale", "logit_scale: expected a positive number, got -5"),
        ("broken image", "expected an image"),
        ("all copies pretrained", "expected fine-tuned checkpoints, got the pretrained one for rotated, upright"),
        ("images of another size", "images [n, 3, 8, 8], got [4, 3, 9, 9]"),
        ("images of bytes", "got [4, 3, 8, 8] torch.uint8"),
        ("no merging images", "tasks.upright.merging: expected unlabelled images for the objective entropy, got none"),
        ("no such architecture", "expected an open_clip model name, got 'hf-hub:foo/bar'"),
        ("odd heads", "expected arguments of open_clip's VisionTransformer"),
        ("bad name", "expected names that preferences can be given by, got 'a=b'"),
        ("infinite mu", "method.mu"),
    ],
)
def test_spoilt_files_leave_nothing_behind(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    config = own_files(tmp_path, finished)
    spoil(kind, tmp_path, config)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert run("train", path, "--out", tmp_path / "run", "--quiet") == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_classes_must_match_the_head(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own_files(tmp_path, finished)))
    assert run("train", path, "--out", tmp_path / "run", "--quiet") == 0
    shutil.rmtree(tmp_path / "test" / "one")
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run") == 2
    assert "expected 2 sub-folders, one for each class of rotated's head in its order, got 1" in one_line(capsys)


def test_a_run_keeps_its_order_of_tasks(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "run"
    shutil.copytree(finished, other)
    text = (other / "config.yaml").read_text().replace("- upright\n- rotated", "- rotated\n- upright")
    (other / "config.yaml").write_text(text)
    capsys.readouterr()
    assert run("export", other, "--preference", "rotated=1", "--out", tmp_path / "a.safetensors") == 2
    assert "expected the tasks upright, rotated in this order" in one_line(capsys)
    again = write_config(tmp_path / "run.yaml", tasks=["rotated", "upright"])
    assert run("train", again, "--out", finished, "--resume") == 2
    assert "order of tasks" in one_line(capsys)


def test_two_trainings_of_one_run_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pareto_merging.run.folder import locked

    config = write_config(tmp_path / "run.yaml")
    with locked(tmp_path / "run"):
        capsys.readouterr()
        assert run("train", config, "--out", tmp_path / "run", "--resume") == 2
        assert "another process is at it" in one_line(capsys)
    assert run("train", config, "--out", tmp_path / "run", "--quiet") == 0


def test_the_same_run_has_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml")
    assert run("train", config, "--out", tmp_path / "run", "--quiet") == 0
    first, second = ((folder / "pareto_set.safetensors").read_bytes() for folder in (finished, tmp_path / "run"))
    assert first == second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suite: digits\nsuite: digits\n", "the key suite twice"),
        ("suite: digits\nmethod: {seed: 2020-13-45}\n", "expected YAML"),
        ("suite: digits\nmethod: {preset: [1]}\n", "method.preset"),
        ("suite: digits\nworkers: 100000\n", "workers"),
        ("[" * 3000, "expected YAML"),
    ],
)
def test_odd_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    capsys.readouterr()
    assert run("plan", path) == 2
    assert message in one_line(capsys)


def test_a_resumed_run_says_how_it_is_computed_now(finished: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "run", tmp_path / "again.yaml"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text()
    again.write_text(text.replace("strategy: auto", "strategy: eager").replace("at_once: one", "at_once: all"))
    assert run("train", again, "--out", folder, "--resume", "--quiet") == 0
    config = read_config(folder / "config.yaml")
    assert (config.strategy, config.tasks_at_once) == ("eager", "all")
