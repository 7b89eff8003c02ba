"""What the README shows is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pareto_merging.config import read_config

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=100" in code
    exec(code.replace("steps=100", "steps=2"), {})
    assert "VisionTransformer" in capsys.readouterr().out


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
