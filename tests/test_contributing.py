"""What CONTRIBUTING.md shows is run: its Python, one block after the other by heading, and its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
# heading -> the Python below it
SECTIONS = {
    heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


@pytest.mark.parametrize("heading", [heading for heading, blocks in SECTIONS.items() if blocks])
def test_python_runs(heading: str) -> None:
    namespace: dict[str, object] = {}
    for block in SECTIONS[heading]:
        exec(compile(block, f"CONTRIBUTING.md, {heading}", "exec"), namespace)


def test_paths_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    mentioned = re.findall(r"\b((?:tests|docs|benchmarks|pmkernels|pareto_merging)/[\w/.-]*\w)", PAGE)
    assert links and mentioned
    assert [path for path in [*links, *mentioned] if not (ROOT / path).exists()] == []


def test_modules_that_are_run_exist() -> None:
    modules = re.findall(r"-m ((?:benchmarks|pareto_merging)[\w.]*)", PAGE)
    assert modules
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
