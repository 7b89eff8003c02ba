"""Which GPU tests run first, and which are left out where more than torch, triton and pytest would be needed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import Parts, note_parts
from smoke import mark_smoke, smoke_rank

# what open_clip imports, whatever the model
OPEN_CLIP = ("open_clip", "torchvision", "PIL", "ftfy", "wcwidth", "regex", "tqdm")
# file -> the packages without which it is not collected
NEEDS = {
    "test_engine.py": ("pydantic",),
    "test_methods.py": ("pydantic", *OPEN_CLIP),
    "test_models.py": ("pydantic",),
}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


MISSING = [name for name in ("pydantic", *OPEN_CLIP) if not _installed(name)]
collect_ignore = [file for file, needed in NEEDS.items() if set(needed) & set(MISSING)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once what was left out, and for want of what."""
    for name in MISSING:
        files = [file for file, needed in NEEDS.items() if name in needed]
        if name in OPEN_CLIP:
            files.append("what of test_models.py builds a model of open_clip")
        terminalreporter.write_line(f"tests/gpu: left out for want of {name}: {', '.join(files)}", yellow=True)


def pytest_itemcollected(item: pytest.Item) -> None:
    mark_smoke(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Smoke tests first, by rank: pytest-xdist deals them to its processes in that order, two each."""
    if set(OPEN_CLIP) & set(MISSING):
        here = Path(__file__).parent
        items[:] = [i for i in items if i.path.parent != here or "tiny_vit" not in getattr(i, "fixturenames", ())]
    items.sort(key=smoke_rank)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32 but where a test asks for it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """The parts that products are cut into from here on."""
    return note_parts(monkeypatch)
