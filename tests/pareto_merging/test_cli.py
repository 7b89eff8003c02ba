"""The command line as a user meets it: results, one-line errors, exit codes, interrupted runs."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import one_line, run
from safetensors.torch import load_file, save_file

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_metadata
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.methods.registry import METHODS
from pareto_merging.model.files import load_folded, load_heads, read_header
from pareto_merging.model.state import set_preference
from pareto_merging.run.config import read_config
from pareto_merging.run.folder import open_run
from pareto_merging.run.workspace import Workspace
from pmkernels import launch


def write_config(path: Path, **changes: Any) -> Path:
    method = {"steps": 3, "batch_size": 4, "rank": 2, **changes.pop("method", {})}
    path.write_text(yaml.safe_dump({"suite": "digits", "tasks": ["upright", "rotated"], "method": method, **changes}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder / "run.yaml")
    assert run("train", config, "--out", folder / "run", "--quiet") == 0
    return folder / "run"


def test_train_writes_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "log.jsonl", "checkpoint.safetensors", "pareto_set.safetensors"} <= names
    config = read_config(finished / "config.yaml")
    assert config.method.steps == 3
    header = read_header(finished / "pareto_set.safetensors", "pareto-set")
    assert header["task_names"] == ["upright", "rotated"]
    assert header["training"]["steps"] == 3


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


def test_mistakes_are_one_line_and_exit_code_2(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml")
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("train", tmp_path / "none.yaml", "--out", out), "none.yaml"),
        (("train", config, "--out", finished), str(finished)),
        (("train", config, "--out", out, "--resume"), "no such folder"),
        (("train", config), "--out"),
        (("train", write_config(tmp_path / "bad1.yaml", methods={}), "--out", out), "unknown key methods"),
        (("train", write_config(tmp_path / "bad2.yaml", tasks=["sideways"]), "--out", out), "sideways"),
        (("train", write_config(tmp_path / "bad3.yaml", device="tpu"), "--out", out), "device"),
        (("evaluate", tmp_path / "none"), "none"),
        (("evaluate", tmp_path), "config.yaml"),
        (("evaluate", finished, "--preferences", "0.5,0.6"), "expected a sum of 1, got 1.1"),
        (("evaluate", finished, "--preferences", "0.5"), "expected shape [2]"),
        (("evaluate", finished, "--preferences", "a,b"), "a,b"),
        (("evaluate", finished, "--preferences", "SVHN=1"), "SVHN"),
        (("evaluate", finished, "--preferences", "grid:1"), "grid:1"),
        (("evaluate", finished, "--preferences", ";"), "at least one"),
        (("evaluate", finished, "--preference", "1,0"), "No such option"),
        (("export", finished), "either --preference or --folded"),
        (("export", finished, "--folded", "--preference", "1,0"), "either --preference or --folded"),
        (("export", finished, "--preference", "1,1", "--out", out / "a.safetensors"), "expected a sum of 1"),
        (("export", finished, "--folded", "--out", tmp_path / "a.pt"), "ends in .safetensors"),
        (("export", finished, "--folded", "--out", finished / "pareto_set.safetensors"), "existing file"),
        (("plan", tmp_path / "none.yaml"), "none.yaml"),
        (("demo", "--out", finished), "existing folder"),
        (("demo", "--out", finished, "--overwrite"), "expected an earlier demo to replace"),
        (("nonsense",), "nonsense"),
    ]
    before = sorted(str(path) for path in finished.parent.rglob("*"))
    capsys.readouterr()
    for arguments, expected in cases:
        assert run(*arguments) == 2, arguments
        assert expected in one_line(capsys), arguments
        assert not out.exists(), arguments
    assert sorted(str(path) for path in finished.parent.rglob("*")) == before


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


@pytest.mark.parametrize("command", ["", "demo", "train", "evaluate", "compare", "export", "plan"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*filter(None, [command, "--help"])) == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    if command == "train":
        assert all(name in text for name in MethodSettings.model_fields)
        assert "smooth-tchebycheff, tchebycheff, linear" in " ".join(text.split())
    if command == "compare":
        lines = [line.strip() for line in text.splitlines()]
        for name, method in METHODS.items():
            assert any(line.startswith(f"{name}: {method.title}") for line in lines), name
    if command:
        assert "--" in text
    else:
        assert all(name in text for name in ("demo", "train", "evaluate", "compare", "export", "plan"))


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", method={"steps": 400, "checkpoint_every": 1000})
    command = [sys.executable, "-m", "pareto_merging", "train", str(config), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _steps(tmp_path / "run" / "log.jsonl") > 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"go on with: pareto-merging train {config} --out {tmp_path / 'run'} --resume" in errors
    done = _steps(tmp_path / "run" / "log.jsonl")
    assert 3 < done < 400
    finished = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0
    assert f"400 steps, {done} of them before" in finished.stdout
    assert _steps(tmp_path / "run" / "log.jsonl") == 400


def _steps(log: Path) -> int:
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def own_files(folder: Path, finished: Path, classes: int = 2) -> dict[str, Any]:
    """A configuration of files in ``folder``: encoder, two checkpoints, heads of two classes, image folders."""
    from PIL import Image

    workspace = Workspace(read_config(finished / "config.yaml"))
    rng = torch.Generator().manual_seed(0)
    for split in ("merging", "test"):
        for label in ("one", "two"):
            (folder / split / label).mkdir(parents=True)
            for index in range(3):
                pixels = torch.randint(0, 255, (12, 12, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{index}.png")
    shutil.copy(workspace.encoder_config.architecture, folder / "encoder.json")
    shutil.copy(workspace.encoder_config.pretrained, folder / "pretrained.safetensors")
    tasks: dict[str, Any] = {}
    for name, task in workspace.task_configs.items():
        shutil.copy(task.checkpoint, folder / f"{name}.safetensors")
        save_file({"weight": torch.randn(classes, 16, generator=rng)}, folder / f"{name}_head.safetensors")
        tasks[name] = {
            "checkpoint": f"{name}.safetensors",
            "head": f"{name}_head.safetensors",
            "merging": "merging",
            "evaluation": "test",
        }
    return {
        "encoder": {"architecture": "encoder.json", "pretrained": "pretrained.safetensors"},
        "tasks": tasks,
        "method": {"steps": 2, "batch_size": 3, "rank": 2},
    }


def spoil(kind: str, folder: Path, config: dict[str, Any]) -> None:
    task = config["tasks"]["upright"]
    if kind == "head of another width":
        save_file({"weight": torch.zeros(2, 15)}, folder / "upright_head.safetensors")
    elif kind == "integer weights":
        save_file(
            {k: v.to(torch.int8) for k, v in load_file(folder / "upright.safetensors").items()},
            folder / "upright.safetensors",
        )
    elif kind == "a text model":
        save_file({"token_embedding.weight": torch.zeros(8, 4)}, folder / "upright.safetensors")
    elif kind == "negative scale":
        save_file({"weight": torch.ones(2, 16)}, folder / "upright_head.safetensors", metadata={"logit_scale": "-5"})
    elif kind == "broken image":
        for path in (folder / "merging").rglob("*.png"):
            path.write_bytes(b"")
    elif kind == "all copies pretrained":
        for name in config["tasks"]:
            shutil.copy(folder / "pretrained.safetensors", folder / f"{name}.safetensors")
    elif kind in ("images of another size", "images of bytes"):
        images = torch.zeros(4, 3, 9, 9) if "size" in kind else torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        save_file({"images": images}, folder / "images.safetensors")
        task["merging"] = "images.safetensors"
    elif kind == "no merging images":
        del task["merging"]
    elif kind == "no such architecture":
        config["encoder"]["architecture"] = "hf-hub:foo/bar"
    elif kind == "odd heads":
        arguments = json.loads((folder / "encoder.json").read_text())
        (folder / "encoder.json").write_text(json.dumps({**arguments, "heads": 5}))
    elif kind == "bad name":
        config["tasks"]["a=b"] = config["tasks"].pop("upright")
    elif kind == "infinite mu":
        config["method"]["mu"] = float("inf")


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
        ("no merging images", "tasks.upright.merging: expected unlabelled images"),
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
    from pareto_merging.run.folder import _locked

    config = write_config(tmp_path / "run.yaml")
    with _locked(tmp_path / "run"):
        capsys.readouterr()
        assert run("train", config, "--out", tmp_path / "run", "--resume") == 2
        assert "another process is at it" in one_line(capsys)
    assert run("train", config, "--out", tmp_path / "run", "--quiet") == 0


def test_exports_do_not_overwrite_what_the_run_is_made_of(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "pareto_set.safetensors").read_bytes()
    capsys.readouterr()
    assert run("export", finished, "--folded", "--overwrite", "--out", finished / "pareto_set.safetensors") == 2
    assert "got one that the run is made of" in one_line(capsys)
    assert (finished / "pareto_set.safetensors").read_bytes() == before


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


def test_a_terminal_without_greek(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pareto_merging", "plan", str(config)]
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert finished.returncode == 0
    assert b"task vectors" in finished.stdout


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


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method, two tries each, with an unseen task."""
    folder = tmp_path_factory.mktemp("compare")
    config = write_config(folder / "run.yaml", unseen=["mirrored"])
    arguments = ("--methods", "all", "--effort", 2, "--preferences", "equal", "--quiet")
    assert run("compare", config, "--out", folder / "out", *arguments) == 0
    return folder / "out"


@pytest.mark.slow
def test_compare_all_methods(compared: Path) -> None:
    report = json.loads((compared / "compare.json").read_text())
    assert list(report["methods"]) == list(METHODS)
    for name, method in METHODS.items():
        entry = report["methods"][name]
        assert (entry["seeds"], entry["title"], entry["is_bound"]) == (1, method.title, method.is_bound)
        assert entry["unseen"]["mirrored"]["mean"] > 20
        stored = json.loads((compared / f"{name}-seed-0.json").read_text())
        tries = method.choices(2, MethodSettings.model_validate({}))
        assert len(stored["candidates"]) == min(2, len(tries)), name
    individual = report["methods"]["individual"]["one_hot"]["mean"]
    assert individual > report["methods"]["weight-averaging"]["one_hot"]["mean"]
    names = {path.name for path in compared.iterdir()}
    files = {"compare.json", "compare.md", "methods.csv", "points.csv", "config.yaml", "settings.json", "front.png"}
    assert names == files | {f"{name}-seed-0.json" for name in METHODS}
    assert read_config(compared / "config.yaml").unseen == ["mirrored"]


def test_compare_prints_one_json_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    arguments = ("--methods", "pretrained,adamerging", "--effort", 1, "--preferences", "equal", "--json")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert captured.err.splitlines()[0].startswith("[1/2] Pretrained: average ")
    assert "Traceback" not in captured.err
    assert run("compare", config, "--out", tmp_path / "out", *arguments, "--quiet", "--resume") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["methods"].keys() == {"pretrained", "adamerging"}


def test_compare_prints_a_table_and_an_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    arguments = ("--methods", "pretrained,weight-averaging", "--preferences", "equal", "--quiet")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "One model for everybody: Weight averaging (90.6 %)" in captured.out
    assert captured.out.splitlines()[-1] == str(tmp_path / "out" / "compare.md")


def test_compare_mistakes(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    fixed = {"method": {"preference": "fixed", "gamma": [0.5, 0.2, 0.3]}}
    cases: list[tuple[tuple[object, ...], str]] = [
        ((config,), "--out"),
        ((tmp_path / "none.yaml", "--out", out), "none.yaml"),
        ((config, "--out", out, "--methods", "regmeans"), "got 'regmeans'; near: regmean"),
        ((config, "--out", out, "--methods", "all,-tees"), "near: ties"),
        ((config, "--out", out, "--methods", ""), "expected at least one"),
        ((config, "--out", out, "--effort", 5), "--effort"),
        ((config, "--out", out, "--seeds", 0), "--seeds"),
        ((config, "--out", out, "--preferences", "0.5,0.6"), "expected a sum of 1"),
        ((config, "--out", out, "--preferences", "lattice:0"), "lattice:0"),
        ((config, "--out", finished), "got an existing folder"),
        ((config, "--out", tmp_path / "theirs"), "got an existing folder"),
        ((config, "--out", tmp_path / "theirs", "--resume"), "got an existing folder"),
        ((config, "--out", tmp_path / "file"), "got an existing file"),
        ((config, "--out", tmp_path / "file" / "out"), "got a file"),
        ((write_config(tmp_path / "a.yaml", **fixed), "--out", out), "preference: expected shape [2]"),
        ((write_config(tmp_path / "b.yaml", unseen=["sideways"]), "--out", out), "sideways"),
        ((write_config(tmp_path / "c.yaml", unseen=["upright"]), "--out", out), "not merged, got upright"),
    ]
    capsys.readouterr()
    for arguments, expected in cases:
        assert run("compare", *arguments) == 2, arguments
        assert expected in one_line(capsys), arguments
        assert not out.exists(), arguments


def test_compare_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml")
    capsys.readouterr()
    # nobody, not even root, makes a folder there
    assert run("compare", config, "--out", "/proc/compare", "--methods", "pretrained") == 2
    assert "/proc/compare" in one_line(capsys)


def test_compare_wants_the_files_of_unseen_tasks(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own_files(tmp_path, finished)
    unseen = {"head": "rotated_head.safetensors", "merging": "merging", "evaluation": "test"}
    path = tmp_path / "own.yaml"
    save_file({"weight": torch.zeros(2, 15)}, tmp_path / "wide.safetensors")
    save_file({"weight": torch.ones(3, 16)}, tmp_path / "three.safetensors")
    for change, expected in (
        ({"head": "none.safetensors"}, "none.safetensors: expected a checkpoint, got no such file"),
        ({"head": "wide.safetensors"}, "expected a head of [classes, 16] for this encoder, got [2, 15]"),
        ({"head": "three.safetensors"}, "expected 3 sub-folders, one for each class of new's head"),
        ({"merging": "nowhere"}, "nowhere"),
    ):
        path.write_text(yaml.safe_dump({**config, "unseen": {"new": {**unseen, **change}}}))
        capsys.readouterr()
        assert run("compare", path, "--out", tmp_path / "out") == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "out").exists()
    path.write_text(yaml.safe_dump({**config, "unseen": {"new": unseen}}))
    arguments = ("--methods", "pretrained", "--quiet", "--json")
    assert run("compare", path, "--out", tmp_path / "out", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["pretrained"]["unseen"].keys() == {"new"}
    # written anew since
    os.utime(tmp_path / "rotated_head.safetensors", ns=(1, 1))
    assert run("compare", path, "--out", tmp_path / "out", "--resume") == 2
    assert "rotated_head.safetensors" in one_line(capsys)


def test_a_failed_method_is_exit_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", method={"learning_rate": 1e38, "steps": 5})
    arguments = ("--methods", "pareto,pretrained", "--effort", 1, "--preferences", "equal", "--quiet")
    capfd.readouterr()
    assert run("compare", config, "--out", tmp_path / "out", *arguments) == 1
    captured = capfd.readouterr()
    assert captured.err.startswith("pareto-merging: Pareto Merging failed: step ")
    assert captured.err.count("\n") == 1
    assert "failed" in captured.out and "One model for everybody: Pretrained" in captured.out
    assert "- Pareto Merging: step " in (tmp_path / "out" / "compare.md").read_text()


def test_a_skipped_method_is_no_failure(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = own_files(tmp_path, finished)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert run("compare", path, "--out", tmp_path / "out", "--methods", "multitask,pretrained") == 0
    captured = capsys.readouterr()
    assert "Multi-task training: skipped: training: expected labelled images of every task" in captured.err
    assert "skipped" in captured.out


@pytest.mark.slow
def test_ctrl_c_leaves_a_comparison_that_resumes(tmp_path: Path) -> None:
    """The command that is printed works, whatever is in the names."""
    folder = tmp_path / "with spaces"
    folder.mkdir()
    config = write_config(folder / "run.yaml", method={"steps": 120, "checkpoint_every": 1000})
    methods = "weight-averaging,adamerging,pretrained"
    command = [sys.executable, "-m", "pareto_merging", "compare", str(config), "--out", str(folder / "out")]
    command += ["--methods", methods, "--effort", "1", "--preferences", "equal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = folder / "out" / ".adamerging-seed-0" / "0" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _steps(log) > 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in errors
    done = _steps(log)
    assert 3 < done < 120
    again = errors.splitlines()[-1].partition("; go on with: ")[2]
    assert errors.splitlines()[-1].startswith(f"pareto-merging: stopped after step {done} of 120; go on with: ")
    arguments = shlex.split(again)
    assert arguments[0] == "pareto-merging"
    assert run(*arguments[1:], "--quiet") == 0
    report = json.loads((folder / "out" / "compare.json").read_text())
    assert list(report["methods"]) == methods.split(",")


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_figures(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", method={"steps": 12, "checkpoint_every": 4})
    command = [sys.executable, "-m", "pareto_merging", "compare", str(config), "--quiet"]
    command += ["--methods", "weight-averaging,adamerging,pareto,dare", "--effort", "2", "--preferences", "equal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "out" / ".pareto-seed-0" / "1" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _steps(log) > 1:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (tmp_path / "out" / "adamerging-seed-0.json").exists()
    assert not (tmp_path / "out" / "dare-seed-0.json").exists()
    assert run(*command[3:], "--out", tmp_path / "out", "--resume") == 0
    assert run(*command[3:], "--out", tmp_path / "whole") == 0
    first, second = ((tmp_path / name / "points.csv").read_text() for name in ("out", "whole"))
    assert first == second
    reports = [json.loads((tmp_path / name / "compare.json").read_text()) for name in ("out", "whole")]
    assert reports[0]["choices"] == reports[1]["choices"] and reports[0]["answer"] == reports[1]["answer"]
    assert not list((tmp_path / "out").glob(".*-seed-0"))


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


def test_a_resumed_run_says_how_it_is_computed_now(finished: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "run", tmp_path / "again.yaml"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text()
    again.write_text(text.replace("strategy: auto", "strategy: eager").replace("at_once: one", "at_once: all"))
    assert run("train", again, "--out", folder, "--resume", "--quiet") == 0
    config = read_config(folder / "config.yaml")
    assert (config.strategy, config.tasks_at_once) == ("eager", "all")


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
