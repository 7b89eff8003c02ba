"""Every hostile checkpoint of support.hostile: one clear line, quickly, in little memory, and nothing of it runs."""

import copyreg
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401 (seconds that are nobody's fault)
import pytest
from support import forbidden, hostile, opcodes, payloads, verdicts

from pareto_merging.checkpoints.pickles import read_pickle
from pareto_merging.checkpoints.records import Record
from pareto_merging.cli import app as cli

ROOT = Path(__file__).parents[3]
# what a case says and expects does not depend on the place of its canary
ALL = {case.name: case for case in hostile.cases(Path("/nowhere") / payloads.CANARY)}
LIGHT = [name for name, case in ALL.items() if not case.heavy]
# each begins with seconds of imports
PARTS = 2
HEAVY = [name for name, case in ALL.items() if case.heavy]
# others build what they were asked for before they fail
COMMAND_LINE = [
    "zip-call-os:system",
    "zip-call-builtins:eval",
    "zip-place-dict-key-memo",
    "zip-place-storage-key-reduce",
    "legacy-call-torch.hub:load",
    "legacy-form-inst-os:system",
    "zip-ext1",
    "zip-persistent-text",
    "file-legacy-keys",
    "file-zip-twice-pickle-evil-first",
    "file-zip-half",
    "safetensors-length-2e63",
    "safetensors-claims-1tb",
    "safetensors-empty",
    "folder-index-outside",
    "folder-config-bert",
    "folder-nan",
    "folder-pickle",
]


def _module(folder: Path) -> None:
    source = f"from pathlib import Path\nPath({str(folder / payloads.CANARY)!r}).touch()\n\ndef run():\n    pass\n"
    (folder / f"{payloads.CANARY_MODULE}.py").write_text(source)


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that nothing may make; os.system is registered as an extension, and a module that makes it is there."""
    folder = tmp_path_factory.mktemp("canary")
    _module(folder)
    sys.path.insert(0, str(folder))
    copyreg.add_extension("os", "system", payloads.EXTENSION_CODE)
    cached: dict[int, Any] = copyreg._extension_cache  # type: ignore[attr-defined]
    cached[payloads.EXTENSION_CODE] = os.system
    yield folder / payloads.CANARY
    cached.pop(payloads.EXTENSION_CODE, None)
    copyreg.remove_extension("os", "system", payloads.EXTENSION_CODE)
    sys.path.remove(str(folder))
    sys.modules.pop(payloads.CANARY_MODULE, None)


def _check(case: payloads.Case, found: dict[str, Any]) -> None:
    assert "killed" not in found and "raised" not in found, found
    assert found["seconds"] < verdicts.SECONDS, found
    if "read" in found:
        assert case.harmless, found
        return
    text = found["error"]
    assert text.isprintable(), "one line of text, without control characters"
    assert len(text) < 500
    if case.expected is not None and not case.harmless:
        assert re.search(case.expected, text), text


@pytest.mark.parametrize("name", LIGHT)
def test_hostile_checkpoints_are_refused(name: str, canary: Path, tmp_path: Path) -> None:
    case = {one.name: one for one in hostile.cases(canary)}[name]
    before = set(sys.modules)
    path = case.write(tmp_path)
    written = sorted(tmp_path.rglob("*"))
    found = verdicts.verdict(path, case.how)
    assert not canary.exists(), "the payload ran"
    assert payloads.CANARY_MODULE not in set(sys.modules) - before
    assert sorted(tmp_path.rglob("*")) == written, "a file was made"
    _check(case, found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_they_take_neither_memory_nor_time(part: int, tmp_path: Path) -> None:
    """Every heavy case in a process of its own, with 300 MB more than it began with."""
    _module(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.verdicts", str(tmp_path), "", str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / payloads.CANARY).exists()
    found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert list(found) == HEAVY[part::PARTS]
    for name, verdict in found.items():
        _check(ALL[name], verdict)


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_the_command_line_says_it_in_one_line(
    name: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {one.name: one for one in hostile.cases(canary)}[name]
    path, out = case.write(tmp_path), tmp_path / "out" / "x.safetensors"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", str(path), str(out)])
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert "Traceback" not in said.err
    if case.expected is not None:
        assert re.search(case.expected, said.err), said.err
    assert not out.parent.exists() or not list(out.parent.iterdir()), "something was left behind"
    assert not canary.exists()


# what the payload started is waited for, however long that takes
UNPICKLED = """
import contextlib, os, pickle, sys
try:
    pickle.load(open(sys.argv[1], "rb"))
finally:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
"""


@pytest.mark.parametrize("dotted", forbidden.RUNS)
def test_the_payloads_are_real(dotted: str, tmp_path: Path) -> None:
    """In Python's own pickle they do what the tests above would see."""
    _module(tmp_path)
    canary = tmp_path / payloads.CANARY
    path = tmp_path / "x.pkl"
    path.write_bytes(opcodes.pickled(opcodes.call(dotted, *forbidden.forbidden_calls(canary)[dotted])))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", UNPICKLED, str(path)], env=environment, capture_output=True, check=False)
    assert canary.exists()


ACCEPTED = [
    "torchvision.transforms.transforms:Compose",
    "torchvision.transforms.functional:InterpolationMode",
    "open_clip.model:QuickGELU",
    "open_clip.transformer:VisionTransformer",
    "src.modeling:ImageEncoder",
    "argparse:Namespace",
    "__main__:Wrapper",
    "torch.nn.modules.linear:Linear",
    "torch.nn.modules.container:Sequential",
    "pathlib:PosixPath",
]


@pytest.mark.parametrize("form", ["reduce", "stack-global", "memo", "inst", "obj", "newobj", "newobj-ex"])
@pytest.mark.parametrize("dotted", ACCEPTED)
def test_strangers_classes_become_records(dotted: str, form: str, tmp_path: Path) -> None:
    made = opcodes.FORMS[form](dotted, ()) + opcodes.value({"kept": 1}) + opcodes.BUILD
    path = tmp_path / "x.pkl"
    path.write_bytes(opcodes.pickled(opcodes.value({"w": opcodes.tensor(), "x": made}), 4))
    with path.open("rb") as stream:
        found = read_pickle(stream, str(path))
    assert type(found["x"]) is Record
    assert str(found["x"].type) == dotted.replace(":", ".")
    assert found["x"].state == {"kept": 1}
    assert found["w"].shape == (2, 2)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_scalars_are_inert(core: str, tmp_path: Path) -> None:
    kind = opcodes.call("numpy:dtype", "f8", False, True)
    scalar = opcodes.call(f"{core}.multiarray:scalar", kind, opcodes.raw_bytes(b"\0" * 8))
    path = tmp_path / "x.pkl"
    path.write_bytes(opcodes.pickled(opcodes.value({"best": scalar, "w": opcodes.tensor()})))
    with path.open("rb") as stream:
        found = read_pickle(stream, str(path))
    assert type(found["best"]) is Record and found["w"].shape == (2, 2)
