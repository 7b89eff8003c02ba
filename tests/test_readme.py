"""What the README shows is run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import clip, hf_files

from pareto_merging.run.config import read_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OWN_MODELS = (ROOT / "docs" / "own_models.md").read_text()


@pytest.mark.slow
def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=100" in code
    exec(code.replace("steps=100", "steps=2"), {})
    assert "VisionTransformer" in capsys.readouterr().out


@pytest.mark.parametrize("text", [README, OWN_MODELS])
def test_ten_lines(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From checkpoints to a chosen model: folders of the names shown stand for the hub's repositories."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_models" in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    hf_files.huggingface_folder(tmp_path / "openai" / "clip-vit-base-patch32", kind="clip")
    for seed, task in enumerate(("mnist", "dtd"), start=1):
        folder = tmp_path / "tanganke" / f"clip-vit-base-patch32_{task}"
        hf_files.huggingface_folder(folder, seed, transformers4=True)
    found: dict[str, Any] = {}
    exec(code.replace("steps=200", "steps=2"), found)
    assert type(found["plain"]).__name__ == "VisionTransformer"
    pretrained, tuned = (clip.tower(seed).state_dict() for seed in (0, 1))
    # a model between the pretrained and the fine-tuned ones, with the projection that only the former has
    assert torch.equal(found["plain"].proj, pretrained["proj"])
    assert not torch.equal(found["plain"].conv1.weight, pretrained["conv1.weight"])
    assert not torch.equal(found["plain"].conv1.weight, tuned["conv1.weight"])


def test_yaml_example(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = read_config(path)
    assert set(config.tasks or ()) == {"MNIST", "DTD"}
    assert yaml.safe_load(text)["method"]["rank"] == config.method.rank


def test_pictures_and_links_exist() -> None:
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).exists(), link
