"""``python -m benchmarks.gpu_kernels``: compile, without a GPU, what a GPU machine will launch, into one archive.

    make gpu-kernels                                        here: record, compile for two Tritons, pack, look it all up
    python -m benchmarks.gpu_kernels --unpack FILE          on the GPU machine: into its Triton cache
    python -m benchmarks.gpu_kernels --list FILE

A GPU machine's first minutes go into compiling. What ``python -m benchmarks.goals`` and the smoke tests launch is
recorded on the CPU (:mod:`benchmarks.common.recording`), compiled for sm_90 by each Triton under the Python of the
machine it goes to, and packed with one folder per ``triton_key``: the hash of everything in a Triton that can change
code, its ``libtriton`` included, which differs between Pythons. Nothing is unpacked where that key does not agree.

An entry of Triton's cache is found by the key of its Triton, the kernel's source with everything it calls and the
number of its first line, the types and alignment of its arguments, the options, ptxas' version, and environment
variables such as ``TRITON_DEBUG``. Where the checkout lies does not matter: its path is in the line tables of a cubin
and in no key. An entry has the cubin, its metadata, and the group file that names both; the stages before the cubin are
left out, as nothing reads them at run time (``kernel.asm["ptx"]`` is a KeyError for a kernel that came from here).

Triton 3.6.0 also has gcc compile a launcher per signature, and its driver's module, at a first launch: 0.25 to 0.3 s of
one core each, 61 of them for the 277 kernels of the smoke tests. Their key is their source and the platform, their
file's name says for which Python they are, and they look for the GPU's driver when they are loaded: so they are built
here against a stand-in for ``libcuda`` and packed too; one that does not load is compiled again there. Newer Tritons
launch every kernel through one module, whose key holds the folders of that machine: it is compiled there, once.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.common.arguments import command_parser

MANIFEST = "manifest.json"
# Triton's folders are named by base 32, and an entry has flat files
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
PLACE = re.compile(r"[0-9a-f]{16}/[A-Z2-7]{20,64}/" + FILE.pattern)
GROUP = "__grp__"
# what tarfile raises of an archive that is none or not whole
BROKEN = (tarfile.TarError, EOFError, OSError)
# of one file, and of all that an archive unpacks to
LARGEST, MOST = 64 * 2**20, 4 * 2**30
# the exit code where an archive has nothing for this Triton
OTHER_KEY = 3


class ArchiveError(ValueError):
    """An archive that is not one of ours, or hostile."""


@dataclass
class Report:
    """What unpacking found: the key of the Triton here, the archive's, and new entries."""

    key: str
    keys: dict[str, dict[str, Any]]
    folder: Path
    added: int = 0
    present: int = 0

    @property
    def agrees(self) -> bool:
        """Say whether the archive has kernels for the Triton here."""
        return self.key in self.keys

    def __str__(self) -> str:
        if not self.agrees:
            keys = "; ".join(f"{key} ({_about(about)})" for key, about in self.keys.items()) or "none"
            return f"triton_key: expected one of the archive's, {keys}, got {self.key}: nothing was unpacked"
        return f"{self.added} entries of {self.key} unpacked into {self.folder}, {self.present} were there"


def _about(about: Mapping[str, Any]) -> str:
    return f"Triton {about.get('triton')}, {about.get('python')}, {about.get('kernels')} kernels"


def triton_key() -> str:
    """Return the first 16 digits of the SHA-256 of Triton's own key."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:
        from triton.compiler.compiler import triton_key as key
    return hashlib.sha256(key().encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return where Triton keeps what it has compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)


@contextlib.contextmanager
def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
    """Open an archive and check the name, type and size of every file of it."""
    try:
        archive = tarfile.open(path, "r:*")  # noqa: SIM115
    except FileNotFoundError:
        raise
    except BROKEN as error:
        raise ArchiveError(f"{path}: expected an archive of kernels, got {error}") from error
    with archive:
        try:
            members, total = archive.getmembers(), 0
        except BROKEN as error:
            raise ArchiveError(f"{path}: expected a whole archive, got {error}") from error
        for member in members:
            if not member.isreg() or not (member.name == MANIFEST or PLACE.fullmatch(member.name)):
                raise ArchiveError(f"{path}: expected files KEY/ENTRY/NAME and {MANIFEST}, got {member.name!r}")
            total += member.size
            if member.size > LARGEST or total > MOST:
                raise ArchiveError(f"{path}: expected at most {MOST} bytes in all, got more at {member.name!r}")
        if len({member.name for member in members}) < len(members):
            raise ArchiveError(f"{path}: expected every name once, got one twice")
        yield archive, members


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    try:
        return file.read()
    except BROKEN as error:
        raise ArchiveError(f"{member.name}: expected {member.size} bytes, got {error}") from error


def listing(path: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest: triton_key -> Triton, Python, numbers of kernels and launchers, bytes."""
    with _members(path) as (archive, members):
        manifest = next((_read(archive, member) for member in members if member.name == MANIFEST), None)
    if manifest is None:
        raise ArchiveError(f"{path}: expected {MANIFEST}, got an archive without it")
    try:
        keys: dict[str, dict[str, Any]] = json.loads(manifest)["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{path}: expected a manifest, got {error!r}") from error
    return keys


def unpack(path: Path, *, key: str | None = None, into: Path | None = None) -> Report:
    """Put the entries for this Triton into its cache. Entries that are there are left as they are.

    Args:
        path: what ``make gpu-kernels`` wrote. key, into: the key of the Triton here and its cache folder, asked of it
            where they are None.

    Raises:
        ArchiveError: not an archive of kernels, or one with links, or with paths that lead elsewhere: nothing of it is
            unpacked. OSError: it cannot be read, or the cache not be written.
    """
    key = triton_key() if key is None else key
    report = Report(key, listing(path), (cache_folder() if into is None else into).absolute())
    if not report.agrees:
        return report
    with _members(path) as (archive, members):
        entries: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            owner, *rest = member.name.split("/")
            if owner == key:
                entries.setdefault(rest[0], []).append(member)
        report.folder.mkdir(parents=True, exist_ok=True)
        report.added = sum(_place(archive, files, report.folder / name) for name, files in entries.items())
        report.present = len(entries) - report.added
    return report


def _place(archive: tarfile.TarFile, files: Sequence[tarfile.TarInfo], target: Path) -> bool:
    """Write one entry beside its place and rename it. Nobody sees a part of it; False if one is there."""
    contents = {PurePosixPath(member.name).name: _read(archive, member) for member in files}
    wanted = {name for name in contents if name.startswith(GROUP)} or set(contents)
    if target.exists() and all((target / name).exists() for name in wanted):
        return False
    own = Path(tempfile.mkdtemp(prefix=".kernels-", dir=target.parent))
    try:
        for name, content in contents.items():
            (own / name).write_bytes(_absolute(content, target) if name.startswith(GROUP) else content)
        own.chmod(0o755)
        try:
            own.rename(target)
        except OSError:
            # a folder is there without the entry, as a process leaves it that was ended while it compiled
            for name in sorted(contents, key=lambda name: name.startswith(GROUP)):
                if not (target / name).exists():
                    (own / name).replace(target / name)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return True


def _absolute(group: bytes, target: Path) -> bytes:
    """Return a group file whose members lie in ``target``."""
    try:
        names = json.loads(group)["child_paths"]
        if not all(FILE.fullmatch(name) for name in names):
            raise ValueError(f"names {list(names)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{target.name}: expected a group file, got {error!r}") from error
    return json.dumps({"child_paths": {name: str(target / name) for name in names}}).encode()


@dataclass
class Part:
    """What one Triton compiled: its key, and its cache entries for the archive."""

    key: str
    about: dict[str, Any]
    cache: Path
    entries: list[str]

    @classmethod
    def read(cls, index: Path) -> "Part":
        """Read the index that :mod:`benchmarks.gpu_kernels_compile` wrote beside its cache."""
        fields = json.loads(index.read_text(encoding="utf-8"))
        return cls(fields["key"], fields["about"], index.parent / "cache", fields["entries"])


def _files(entry: Path) -> dict[str, bytes]:
    """Return what of an entry is read at run time. The group file names its members without their folder."""
    files = {path.name: path.read_bytes() for path in sorted(entry.iterdir()) if path.is_file()}
    kept: dict[str, bytes] = {}
    for group in (name for name in files if name.startswith(GROUP)):
        names = [name for name in json.loads(files[group])["child_paths"] if name.endswith((".json", ".cubin"))]
        kept |= {name: files[name] for name in names}
        kept[group] = json.dumps({"child_paths": {name: name for name in names}}).encode()
    return kept or files


def pack(parts: Sequence[Part], path: Path) -> dict[str, dict[str, Any]]:
    """Write one archive for every Triton; returns its manifest. The same entries give the same bytes."""
    keys: dict[str, dict[str, Any]] = {}
    contents: list[tuple[str, bytes]] = []
    for part in parts:
        files = {entry: _files(part.cache / entry) for entry in sorted(set(part.entries))}
        own = [(f"{part.key}/{entry}/{name}", content) for entry in files for name, content in files[entry].items()]
        keys[part.key] = {**part.about, "bytes": sum(len(content) for _, content in own)}
        contents += own
    manifest = json.dumps({"keys": keys}, indent=1, sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with tarfile.open(temporary, "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for name, content in [(MANIFEST, manifest), *contents]:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    os.replace(temporary, path)
    return keys


def table(keys: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    """Return what an archive has: kernels, launchers and bytes by triton_key."""
    size = path.stat().st_size
    kernels = sum(about.get("kernels", 0) for about in keys.values())
    lines = [f"{path}: {size / 2**20:.1f} MiB, {size / 1024 / max(kernels, 1):.1f} KiB a kernel"]
    for key, about in sorted(keys.items()):
        unpacked = f"{about.get('launchers', 0)} launchers, {about.get('bytes', 0) / 2**20:.1f} MiB unpacked"
        lines.append(f"  triton_key {key}  {_about(about)}, {unpacked}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 3 if an archive has nothing for the Triton here."""
    parser = command_parser("benchmarks.gpu_kernels", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--unpack", type=Path, metavar="FILE", help="into the Triton cache of this machine")
    what.add_argument("--list", type=Path, metavar="FILE", help="say what an archive has")
    what.add_argument("--pack", type=Path, nargs="+", metavar="INDEX", help="what benchmarks.gpu_kernels_compile wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/kernels.tar.xz"), help="of --pack")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.pack:
            print(table(pack([Part.read(index) for index in chosen.pack], chosen.out), chosen.out))
            return 0
        if chosen.list:
            print(table(listing(chosen.list), chosen.list))
            return 0
        report = unpack(chosen.unpack)
    except (ArchiveError, OSError) as error:
        print(f"gpu_kernels: {error}", file=sys.stderr)
        return 2
    print(f"gpu_kernels: {report}", file=sys.stdout if report.agrees else sys.stderr)
    return 0 if report.agrees else OTHER_KEY


if __name__ == "__main__":
    sys.exit(main())
