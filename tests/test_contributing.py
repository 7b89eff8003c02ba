"""What CONTRIBUTING.md shows is run: its Python, one heading after the other."""

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
