"""The archive of compiled kernels: packed, unpacked elsewhere, found by Triton, and nothing hostile let in."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import ArchiveError, Part, listing, pack, unpack

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
ENTRY = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def entry(cache: Path, name: str = ENTRY, kernel: str = "merge_kernel") -> Path:
    """An entry as Triton writes it, the stages that nothing reads included."""
    folder = cache / name
    folder.mkdir(parents=True)
    files = {f"{kernel}.{ext}": f"{ext} of {kernel}".encode() for ext in ("json", "cubin", "ptx", "ttgir", "source")}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    group = {"child_paths": {file: str(folder / file) for file in files}}
    (folder / f"__grp__{kernel}.json").write_text(json.dumps(group))
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """One kernel and one launcher for one Triton."""
    cache = tmp_path / "built" / "cache"
    entry(cache)
    launcher = cache / ENTRY[::-1]
    launcher.mkdir()
    (launcher / "__triton_launcher.cpython-312-x86_64-linux-gnu.so").write_bytes(b"ELF")
    about = {"triton": "3.6.0", "python": "cp312", "kernels": 1, "launchers": 1}
    pack([Part(KEY, about, cache, [ENTRY, ENTRY[::-1]])], tmp_path / "kernels.tar.xz")
    return tmp_path / "kernels.tar.xz"


def test_an_entry_comes_out_where_the_cache_is(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    report = unpack(archive, key=KEY, into=cache)
    assert (report.added, report.present) == (2, 0)
    found = sorted(path.name for path in (cache / ENTRY).iterdir())
    assert found == ["__grp__merge_kernel.json", "merge_kernel.cubin", "merge_kernel.json"]
    group = json.loads((cache / ENTRY / "__grp__merge_kernel.json").read_text())["child_paths"]
    assert group == {name: str(cache / ENTRY / name) for name in ("merge_kernel.json", "merge_kernel.cubin")}
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    assert listing(archive)[KEY]["kernels"] == 1


def test_what_is_there_stays(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    unpack(archive, key=KEY, into=cache)
    (cache / ENTRY / "merge_kernel.cubin").write_bytes(b"their own")
    report = unpack(archive, key=KEY, into=cache)
    assert (report.added, report.present) == (0, 2)
    assert (cache / ENTRY / "merge_kernel.cubin").read_bytes() == b"their own"


def test_an_entry_that_was_left_half_written_is_completed(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    (cache / ENTRY).mkdir(parents=True)
    (cache / ENTRY / "merge_kernel.json").write_bytes(b"their own")
    unpack(archive, key=KEY, into=cache)
    assert (cache / ENTRY / "merge_kernel.json").read_bytes() == b"their own"
    assert (cache / ENTRY / "__grp__merge_kernel.json").exists()


def test_another_triton_gets_nothing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "elsewhere"
    monkeypatch.setattr(gpu_kernels, "triton_key", lambda: OTHER)
    monkeypatch.setattr(gpu_kernels, "cache_folder", lambda: cache)
    assert gpu_kernels.main(["--unpack", str(archive)]) == 3
    said = capsys.readouterr().err
    assert KEY in said and f"got {OTHER}: nothing was unpacked" in said and "Triton 3.6.0, cp312" in said
    assert not cache.exists()
    monkeypatch.setattr(gpu_kernels, "triton_key", lambda: KEY)
    assert gpu_kernels.main(["--unpack", str(archive)]) == 0
    assert (cache / ENTRY / "merge_kernel.cubin").exists()


GOOD = f"{KEY}/{ENTRY}/kernel.cubin"
HOSTILE: dict[str, dict[str, Any]] = {
    "a path upwards": {"name": f"{KEY}/../../kernel.cubin"},
    "an absolute path": {"name": "/tmp/kernel.cubin"},
    "a hidden folder": {"name": f"{KEY}/.ssh/authorized_keys"},
    "a name with a backslash": {"name": f"{KEY}/{ENTRY}/..\\kernel.cubin"},
    "a deeper path": {"name": f"{GOOD}/more"},
    "a double slash": {"name": f"{KEY}//{ENTRY}/kernel.cubin"},
    "no key": {"name": f"../{ENTRY}/kernel.cubin"},
    "a symbolic link": {"name": GOOD, "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "a hard link": {"name": GOOD, "type": tarfile.LNKTYPE, "linkname": gpu_kernels.MANIFEST},
    "a device": {"name": GOOD, "type": tarfile.CHRTYPE},
    "a folder": {"name": f"{KEY}/{ENTRY}", "type": tarfile.DIRTYPE},
    "a name twice": {"name": gpu_kernels.MANIFEST},
    "a group file of paths": {
        "name": f"{KEY}/{ENTRY}/__grp__kernel.json",
        "content": b'{"child_paths": {"../../kernel.cubin": "x"}}',
    },
    "a group file that is none": {"name": f"{KEY}/{ENTRY}/__grp__kernel.json", "content": b"[]"},
}


@pytest.mark.parametrize("member", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused(member: dict[str, Any], tmp_path: Path) -> None:
    path, cache = tmp_path / "hostile.tar", tmp_path / "cache"
    manifest = json.dumps({"keys": {KEY: {}}}).encode()
    with tarfile.open(path, "w") as file:
        for given in ({"name": gpu_kernels.MANIFEST, "content": manifest}, member):
            content = given.get("content", b"")
            info = tarfile.TarInfo(given["name"])
            info.type, info.linkname = given.get("type", tarfile.REGTYPE), given.get("linkname", "")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    with pytest.raises(ArchiveError):
        unpack(path, key=KEY, into=cache)
    assert not cache.exists() or not any(cache.iterdir())


def test_files_that_are_no_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        path = tmp_path / "other.tar.xz"
        path.write_bytes(content)
        assert gpu_kernels.main(["--unpack", str(path)]) == 2
    assert gpu_kernels.main(["--list", str(tmp_path / "missing.tar.xz")]) == 2


RECORD = """
import sys, torch
from pathlib import Path
import pmkernels
from benchmarks.common.recording import recording
with recording() as launches:
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    pmkernels.softmax_entropy(logits, strategy="fused")
launches.write(Path(sys.argv[1]))
"""


def test_triton_finds_what_was_unpacked(tmp_path: Path) -> None:
    """Compiled into one cache, packed, unpacked into an empty one: Triton asks for nothing to be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    launches, part, archive = tmp_path / "launches.json", tmp_path / "part", tmp_path / "kernels.tar.xz"

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    run("-c", RECORD, str(launches))
    compiler = ("-m", "benchmarks.gpu_kernels_compile", "--launches", str(launches))
    run(*compiler, "--folder", str(part), "--jobs", "1")
    keys = pack([Part.read(part / "index.json")], archive)
    assert [about["kernels"] for about in keys.values()] == [1]
    assert "1 of 1 launches found" in run(*compiler, "--verify", str(archive))
    # an archive that lacks it is seen to lack it
    pack([Part(*keys.keys(), {}, part / "cache", [])], archive)
    with pytest.raises(AssertionError, match="entropy_fwd_kernel: not in the cache"):
        run(*compiler, "--verify", str(archive))
