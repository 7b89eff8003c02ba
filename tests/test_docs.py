"""What the pages and the Makefile name is there: linked files, paths, modules that are run, and what make makes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "NOTES.md", ROOT / "Makefile"]


def text_of(page: Path) -> str:
    # how a committed result was measured stays as it was said then
    return "\n".join(line for line in page.read_text().splitlines() if not line.startswith("From ["))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    text = text_of(page)
    linked = [page.parent / path for path in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", text)]
    named = [
        ROOT / path for path in re.findall(r"(?<![\w/.-])((?:docs|tests|pareto_merging|pmkernels)/[\w/.-]*\w)", text)
    ]
    modules = [
        ROOT / name.replace(".", "/") for name in re.findall(r"-m ((?:benchmarks|tests|pareto_merging)[\w.]*)", text)
    ]
    run = [path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py" for path in modules]
    assert [path.relative_to(ROOT).as_posix() for path in (*linked, *named, *run) if not path.exists()] == []


def test_what_make_is_told_to_make_can_be_made() -> None:
    made = {target for page in PAGES for target in re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), re.MULTILINE)}
    assert made <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
