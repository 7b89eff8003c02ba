"""Files of weights are known by a table of formats, whatever their names.

A user's own is added with :func:`register`; nothing else lists the formats. No format may run code of a file's.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from pareto_merging.checkpoints.architecture import check_claims, from_description
from pareto_merging.checkpoints.contents import Contents, Description, Format
from pareto_merging.checkpoints.modules import ArchivedTensors, uses_quick_gelu
from pareto_merging.checkpoints.records import Record
from pareto_merging.checkpoints.safetensors import SafetensorsFile
from pareto_merging.checkpoints.tensors import NamedTensors
from pareto_merging.errors import UserError
from pareto_merging.system.files import parse_json
from pareto_merging.system.register import add_member

_START_BYTES = 512
_KNOWN_STARTS = (
    (b"version https://git-lfs", "a pointer of git-LFS and not the file itself (run git lfs pull)"),
    (b"<!doctype html", "an HTML page (a download that failed?)"),
    (b"<html", "an HTML page (a download that failed?)"),
    (b"<?xml", "an XML page (a download that failed?)"),
    (b"GGUF", "a GGUF file, which is not supported"),
    (b"\x89HDF", "an HDF5 file, which is not supported"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"BZh", "a bzip2 archive (unpack it first)"),
    (b"7z\xbc\xaf", "a 7z archive (unpack it first)"),
)


def known_as(start: bytes) -> str:
    """Say by its first bytes what a file that is no checkpoint is. Empty text stands for what is not known."""
    if start[4:9] == b"\0\0\0\0{":
        # safetensors: the length before its header may be any bytes
        return ""
    for mark, what in _KNOWN_STARTS:
        if start.lstrip().lower().startswith(mark) or start.startswith(mark):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    if start.startswith((b"{", b"[")):
        return "a JSON file (of a folder of weights, give the folder)"
    return "" if start else "an empty file"


def _is_safetensors(path: Path, start: bytes) -> bool:
    # a length, and then a JSON mapping
    return (path.suffix == ".safetensors" or start[8:9] == b"{") and not known_as(start)


def _is_legacy(path: Path, start: bytes) -> bool:
    return start[:1] == b"\x80" and start[8:9] != b"{"


def _describe_archive(tensors: ArchivedTensors, source: str) -> Description:
    archive, quick_gelu = tensors.archive, None
    if archive.kind == "torchscript":
        quick_gelu = uses_quick_gelu(archive.root, "", source)
        if quick_gelu is None and isinstance(archive.root, Record) and "multimodal" in archive.root.type.module:
            # OpenAI's are known by their modules
            quick_gelu = True
    return Description(quick_gelu=quick_gelu, root=archive.root, kind=archive.kind)


def _describe_safetensors(tensors: SafetensorsFile, source: str) -> Description:
    """Read what our own files say in their header."""
    metadata = tensors.metadata
    keys = [key for key in ("encoder", "preprocessing") if key in metadata]
    parsed = {key: parse_json(metadata[key].encode(), f"{tensors.path}: {key}") for key in keys}
    # of a converted file
    origin = {key: metadata[key] for key in ("source", "source_format") if "checksums" in metadata and key in metadata}
    description = Description(preprocessing=parsed.get("preprocessing"), origin=origin)
    if not parsed.get("encoder"):
        return description
    claimed = from_description(parsed["encoder"])
    if parsed["encoder"].get("quick_gelu") is None:
        claimed = replace(claimed, quick_gelu=None)
    check = partial(check_claims, claimed=claimed)
    return replace(description, heads=claimed.heads, quick_gelu=claimed.quick_gelu, check=check)


FORMATS: dict[str, Format] = {}


def register(format: Format, *, replace: bool = False) -> Format:
    """Add a format, asked before those that are there. Raises ValueError as :func:`.register.add_member`."""
    # what a zip archive turns out to be has its own name
    return add_member(FORMATS, "format", format.name, format, replace=replace, reserved=["torchscript"])


register(Format("safetensors", _is_safetensors, SafetensorsFile, _describe_safetensors))
register(Format("legacy", _is_legacy, ArchivedTensors, _describe_archive))
# a TorchScript archive is a zip as well
register(Format("zip", lambda path, start: start[:4] == b"PK\x03\x04", ArchivedTensors, _describe_archive))


def format_of(path: Path) -> Format:
    """Return the format of a file. Raises UserError: it is no file, or of no known format."""
    if path.is_dir():
        raise UserError(f"{path}: expected a checkpoint, got a folder")
    if not path.is_file():
        got = "what is no regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: expected a checkpoint, got {got}")
    try:
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError as error:
        raise UserError(f"{path}: expected a checkpoint, got {error.strerror}") from error
    for format in reversed(FORMATS.values()):
        if format.recognises(path, start):
            return format
    expected = "a checkpoint" if known_as(start) else "a checkpoint that torch or safetensors wrote"
    raise UserError(f"{path}: expected {expected}, got {known_as(start) or 'another file'}")


def open_tensors(path: Path) -> NamedTensors:
    """Open a file of weights in any format. Raises UserError as :func:`format_of`, or if it is broken."""
    return format_of(path).open(path)


def open_file(path: Path, source: str) -> Contents:
    """Open a file of weights that says by itself what it is. ``source`` is what messages call it."""
    format = format_of(path)
    tensors = format.open(path)
    description = format.describe(tensors, source)
    return Contents(description.kind or format.name, path, tensors, description)
