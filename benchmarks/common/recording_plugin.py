"""A pytest plugin that records what GPU tests would launch, on a machine without one.

    python -m pytest tests/gpu -m "gpu and smoke" --assert=plain -p benchmarks.common.recording_plugin \\
        --record-launches launches.json --record-gpu nvidia-h200

Nothing is computed (:mod:`benchmarks.common.recording`), so nothing can be compared: what a test asserts is evaluated
and let pass. A test that stops all the same, because it reads what only a GPU has, is recorded up to there and listed.
"""

import ast
import contextlib
import importlib.machinery
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.recording import Launches, recording
from benchmarks.common.recording_cuda import GPUS


class _Passing(ast.NodeTransformer):
    """``assert f(x), message`` becomes ``f(x)``: what it launches is launched."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.copy_location(ast.Expr(node.test), node)


@contextlib.contextmanager
def _raises(*expected: Any, **_: Any) -> Iterator[types.SimpleNamespace]:
    """Act as ``pytest.raises``, content with no error as well."""
    seen = types.SimpleNamespace(value=Exception(), match=lambda pattern: True)
    try:
        yield seen
    except BaseException as error:
        if not (expected and isinstance(error, expected[0])):
            raise
        seen.value = error


class Recorder:
    """From before the first import of a test to the end of the session."""

    def __init__(self, folder: Path, gpu: str, path: Path) -> None:
        self.path, self.passed = path, 0
        self.stopped: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self.launches: Launches = self._stack.enter_context(recording(gpu))
        loader, tests = importlib.machinery.SourceFileLoader, folder / "tests"
        get_code = loader.get_code

        def passing(self: importlib.machinery.SourceFileLoader, fullname: str) -> Any:
            file = self.get_filename(fullname)
            if tests not in Path(file).resolve().parents:
                return get_code(self, fullname)
            tree = _Passing().visit(ast.parse(self.get_data(file), file))
            return compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)

        patch = pytest.MonkeyPatch()
        patch.setattr(loader, "get_code", passing)
        patch.setattr(pytest, "raises", _raises)
        patch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
        self._stack.callback(patch.undo)

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Count the tests that came to their end, and what stopped the others."""
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            error = str(call.excinfo.value).strip() or call.excinfo.typename
            self.stopped[item.nodeid] = f"{call.excinfo.typename}: {error.splitlines()[0][:200]}"
        elif call.when == "call" and call.excinfo is None:
            self.passed += 1

    def pytest_unconfigure(self) -> None:
        """Write everything down."""
        self._stack.close()
        self.launches.write(self.path, tests={"whole": self.passed, "stopped": self.stopped})


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recording")
    group.addoption("--record-launches", type=Path, help="write the launches to this JSON file")
    group.addoption("--record-gpu", choices=sorted(GPUS), default="nvidia-h100-80gb-hbm3", help="as on that GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before the first conftest.py asks whether there is a GPU."""
    options = early_config.known_args_namespace
    if options.record_launches is None:
        raise pytest.UsageError("recording: expected --record-launches FILE")
    recorder = Recorder(Path(early_config.rootpath).resolve(), options.record_gpu, options.record_launches)
    early_config.pluginmanager.register(recorder, "launch recorder")


def stopped(path: Path) -> tuple[int, dict[str, str]]:
    """Return how many tests were recorded to their end, and what stopped the others."""
    tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
    return tests["whole"], tests["stopped"]
