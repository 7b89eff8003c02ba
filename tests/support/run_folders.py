"""Configurations of small runs, of the suite's files or of one's own, and files that are spoilt."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from pareto_merging.run.config import read_config
from pareto_merging.run.workspace import Workspace


def write_config(path: Path, **changes: Any) -> Path:
    method = {"steps": 3, "batch_size": 4, "rank": 2, **changes.pop("method", {})}
    path.write_text(yaml.safe_dump({"suite": "digits", "tasks": ["upright", "rotated"], "method": method, **changes}))
    return path


def steps_logged(log: Path) -> int:
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
