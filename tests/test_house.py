"""What a machine can check of how the code is written; ``python tests/test_house.py [ROOM]`` prints what is left."""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pmkernels", "pareto_merging", "benchmarks")
MAX_FILE, MAX_FUNCTION, MAX_WORDS = 450, 60, 15
# a function's docstring says what it does, so it begins with a verb
NO_VERB = re.compile(
    "a|all|an|another|any|as|at|both|by|each|either|every|for|from|how|if|in|in-place|its|no|none|of|on|one|only|other|"
    "some|such|that|the|their|these|they|this|those|to|two|what|when|where|whether|which|who|why|with"
)
TRAILING = re.compile(r"#\s*(\[.*|noqa\b.*|type: ignore\b.*)")
BANNER = re.compile(r"#\s*[-=#*~_]{3,}|#.*[-=#*~_]{4,}\s*$")
VAGUE = frozenset({"found", "odd", "said", "there"})
# about no single file, beside tests/gpu and tests/fuzz: pages, rules, hostile files, two ways through all kernels
ABOUT_NO_FILE = frozenset(
    {
        *(f"tests/test_{name}.py" for name in ("contributing", "docs", "gpu_sets", "house", "readme")),
        *(f"tests/pareto_merging/checkpoints/test_{name}.py" for name in ("fuzz", "hostile")),
        *(f"tests/pmkernels/test_{name}.py" for name in ("cached", "splits")),
    }
)


Fault = tuple[str, int, str]
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def every_node(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def nodes(path: Path) -> Iterator[Documented]:
    """Yield the module, its classes and its functions."""
    return (node for node in every_node(path) if isinstance(node, Documented))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@functools.cache
def comments(path: Path) -> list[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token for token in tokens if token.type == tokenize.COMMENT]


def first_sentence(docstring: str) -> str:
    """Return a docstring's text up to its first full stop, with each code span as one word."""
    paragraph = re.split(r"\n\s*\n", docstring.strip())[0]
    paragraph = re.sub(r"(:[a-z:]+:)?``?[^`]+``?", "code", paragraph)
    paragraph = re.sub(r"\b(e\.g|i\.e|cf|vs|etc)\.", r"\1", paragraph)
    return re.split(r"[.!?](?=\s|$)", paragraph)[0]


def file_lengths() -> Iterator[Fault]:
    for path in sources():
        text = path.read_text()
        lines = len(text.splitlines())
        reason = f"Longer than {MAX_FILE} lines because"
        if lines > MAX_FILE and reason not in _joined(ast.get_docstring(ast.parse(text))):
            yield relative(path), 1, f"{lines} lines"


def function_lengths() -> Iterator[Fault]:
    for path in sources():
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            reason = f"Longer than {MAX_FUNCTION} lines because"
            if lines > MAX_FUNCTION and reason not in _joined(ast.get_docstring(node)):
                yield relative(path), node.lineno, f"{node.name}: {lines} lines"


def long_first_sentences() -> Iterator[Fault]:
    for path in sources():
        for node in nodes(path):
            sentence = first_sentence(ast.get_docstring(node) or "")
            words = [word for word in sentence.split() if any(letter.isalnum() for letter in word)]
            if len(words) > MAX_WORDS:
                yield relative(path), getattr(node, "lineno", 1), f"{len(words)} words: {' '.join(sentence.split())}"


def functions_without_a_verb() -> Iterator[Fault]:
    for path in sources():
        for node in functions(path):
            first = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
            word = "".join(first).rstrip(",;:.")
            if word and (NO_VERB.fullmatch(word.lower()) or not word[0].isupper()):
                yield relative(path), node.lineno, f"{node.name}: begins with {word!r}"


def banners() -> Iterator[Fault]:
    for path in sources():
        for comment in comments(path):
            if BANNER.match(comment.string):
                yield relative(path), comment.start[0], comment.string


def trailing_comments() -> Iterator[Fault]:
    for path in sources():
        for comment in comments(path):
            if comment.line[: comment.start[1]].strip() and not TRAILING.fullmatch(comment.string):
                yield relative(path), comment.start[0], comment.string


def vague_names() -> Iterator[Fault]:
    for path in sources():
        for node in every_node(path):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
                yield relative(path), node.lineno, node.id


def test_files_without_a_source() -> Iterator[Fault]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        package, *folders = path.relative_to(ROOT / "tests").parts[:-1] or ("",)
        name = path.stem.removeprefix("test_")
        if relative(path) in ABOUT_NO_FILE or package in ("gpu", "fuzz"):
            continue
        folder = ROOT.joinpath(package, *folders)
        homes = [folder, folder / "kernels"] if package == "pmkernels" else [folder]
        if not any((home / f"{name}.py").exists() or (home / name).is_dir() for home in homes):
            yield relative(path), 1, f"expected a source file {relative(folder)}/{name}.py, there is none"


test_files_without_a_source.__test__ = False  # type: ignore[attr-defined]


def unnamed_in_architecture() -> Iterator[Fault]:
    """Yield the source files that docs/architecture.md leaves out, and the paths in it that are none."""
    page = ROOT / "docs" / "architecture.md"
    tree = named_in_tree(page.read_text()) if page.exists() else set()
    for path in sources():
        if not path.name.startswith("__") and relative(path) not in tree:
            yield relative(path), 1, "is not named in docs/architecture.md"
    for name in sorted(tree):
        if not (ROOT / name).exists():
            yield name, 1, "is named in docs/architecture.md and does not exist"


def named_in_tree(text: str) -> set[str]:
    """Return the paths that the page's trees name: a folder ends in ``/``, what is in it is indented by two more."""
    names: set[str] = set()
    for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL):
        folders: list[str] = []
        for line in block.splitlines():
            match = re.match(r"((?:  )*)([\w./-]+)(?:  |$)", line)
            if match is None:
                continue
            depth, name = len(match[1]) // 2, match[2]
            folders[depth:] = [name.rstrip("/")]
            names.add("/".join(folders))
    return names


def _joined(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


RULES = {
    "a file has at most 450 lines": file_lengths,
    "a function has at most 60 lines": function_lengths,
    "a docstring's first sentence has at most 15 words": long_first_sentences,
    "a function's docstring begins with a verb": functions_without_a_verb,
    "no banner comments": banners,
    "no trailing comments but shapes": trailing_comments,
    "a local name is a noun": vague_names,
    "a test file's name is its source file's": test_files_without_a_source,
    "docs/architecture.md names every file": unnamed_in_architecture,
}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule(rule: str) -> None:
    faults = [f"{path}:{line}: {text}" for path, line, text in RULES[rule]()]
    assert not faults, f"{rule}:\n" + "\n".join(faults)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_breaks_a_rule_is_found(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree with one file, which breaks every rule once, in lines that are known."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    body = ["    found = 1  # here", "    # " + "-" * 9, *["    print(found)"] * 59, "    return found"]
    module = ['"""' + "word " * 16 + '."""', "", "", "def long() -> int:", '    """The answer."""', *body]
    (tmp_path / "pmkernels").mkdir()
    (tmp_path / "pmkernels" / "bad.py").write_text("\n".join([*module, *["x = 1"] * 400]))
    (tmp_path / "tests" / "pmkernels").mkdir(parents=True)
    (tmp_path / "tests" / "pmkernels" / "test_other.py").touch()
    assert len(list(RULES[rule]())) == 1
