"""What CONTRIBUTING.md shows is run: its Python, one heading after the other."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pareto_merging.checkpoints.formats import FORMATS
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.methods.registry import METHODS
from pmkernels import strategies

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
# heading -> the Python below it
SECTIONS = {
    heading: blocks
    for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if (blocks := re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
TABLES: list[Any] = [METHODS, FORMATS, OBJECTIVES]


@pytest.fixture(autouse=True)
def tables_as_they_were() -> Iterator[None]:
    """What a walk registers is there for that walk only."""
    before, names = [copy.copy(table) for table in TABLES], set(strategies.TABLE)
    yield
    for table, members in zip(TABLES, before, strict=True):
        table.clear()
        table.update(members) if isinstance(table, dict) else table.extend(members)
    for name in [name for name in strategies.TABLE if name not in names]:
        strategies.unregister(name)


@pytest.mark.parametrize("heading", SECTIONS)
def test_python_runs(heading: str) -> None:
    namespace: dict[str, object] = {}
    for block in SECTIONS[heading]:
        exec(compile(block, f"CONTRIBUTING.md, {heading}", "exec"), namespace)


def test_every_walk_is_there() -> None:
    assert {"One kernel", "Add a strategy", "Add a method", "Add a format", "Add an objective"} <= set(SECTIONS)
