"""Any public checkpoint of a CLIP vision transformer, read safely and tensor by tensor, in open_clip's names.

==============================  =======================================================================================
a file                          safetensors; what ``torch.save`` wrote (zip or legacy): a state dict, a training
                                checkpoint or a whole module, as in the task-vectors release; a TorchScript archive
a folder                        Hugging Face's (config.json), sharded or not, or open_clip's (open_clip_config.json)
``owner/name[@revision]``       either of them on the Hugging Face Hub, or in its cache
``open_clip:NAME/TAG``          one of open_clip's pretrained models
==============================  =======================================================================================

Names may be open_clip's or Hugging Face's, with the prefixes that programs put in front; a file is known by its
content, not by its name. No file can run code, and none is believed before its sizes have been compared.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pareto_merging.checkpoints import hub
from pareto_merging.checkpoints.architecture import (
    Architecture,
    check_hugging_face_config,
    check_preprocessing,
    describe,
    from_description,
    from_hugging_face_config,
    from_hugging_face_text_config,
    from_open_clip_config,
    from_shapes,
    preprocessing_from_hugging_face,
    preprocessing_from_open_clip,
)
from pareto_merging.checkpoints.archives import Archive, open_archive
from pareto_merging.checkpoints.modules import (
    attention_heads,
    find_tensors,
    normalisation,
    uses_quick_gelu,
)
from pareto_merging.checkpoints.names import BLOCK_NAMES, Piece, block_and_rest, listed, text_pieces, vision_pieces
from pareto_merging.checkpoints.pickles import Record, StoredTensor
from pareto_merging.checkpoints.safetensors import SafetensorsFile
from pareto_merging.errors import UserError
from pareto_merging.system.files import known_as, parse_json, read_json

_SHARD = re.compile(r"[\w-][\w.-]{0,180}\.(safetensors|bin|pt)", re.ASCII)
# of a converted file's header
ORIGIN = ("source", "source_format")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Tensors(Protocol):
    """Named tensors of one or more files: what is known without reading them, and a way to read one."""

    @property
    def shapes(self) -> Mapping[str, list[int]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    @property
    def files(self) -> Sequence[Path]: ...

    def read(self, name: str) -> Tensor: ...


class _Pickled:
    """The tensors of an archive that ``torch.save`` or TorchScript wrote."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.files = [archive.path]
        self._stored: dict[str, StoredTensor] = find_tensors(archive.root, str(archive.path))
        self.shapes = {name: list(stored.shape) for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        # tied weights share a storage; thousands of tensors in one would fill a disk
        held = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self._stored.values())
        size = archive.path.stat().st_size
        if held > 4 * size + 2**20:
            raise UserError(f"{archive.path}: expected about {size} bytes of tensors as in the file, got {held}")

    def read(self, name: str) -> Tensor:
        return self.archive.tensor(self._stored[name])


class _Shards:
    """The tensors of several files, each name in one of them, as an index says."""

    def __init__(self, index: Path) -> None:
        weight_map = _weight_map(index)
        self._owner: dict[str, _Tensors] = {}
        self.files = [index, *(index.parent / shard for shard in shard_names(index))]
        for shard in shard_names(index):
            part = open_file(index.parent / shard)
            own = {name for name, where in weight_map.items() if where == shard}
            if own != set(part.shapes):
                odd = listed(own.symmetric_difference(part.shapes))
                raise UserError(
                    f"{index.parent / shard}: expected the tensors that {index.name} lists, got others: {odd}"
                )
            self._owner |= dict.fromkeys(own, part)
        self.shapes = {name: part.shapes[name] for name, part in self._owner.items()}
        self.dtypes = {name: part.dtypes[name] for name, part in self._owner.items()}

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)


Names: TypeAlias = Collection[str]


@dataclass(frozen=True)
class _Said:
    """What stands beside the tensors: in a configuration, a header, or the records of a pickle."""

    heads: int | None = None
    quick_gelu: bool | None = None
    preprocessing: Mapping[str, Any] | None = None
    architecture: Architecture | None = None
    text_heads: int | None = None
    no_text: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    root: Any = None


class CheckpointTensors(Mapping[str, Tensor]):
    """Named tensors, each read from its file when it is asked for, into memory of its own, and not kept.

    Attributes:
        source: what they were opened by. shapes, dtypes: by name, known without reading.
    """

    def __init__(self, source: str, tensors: _Tensors, pieces: Mapping[str, Piece]) -> None:
        self.source = source
        self._tensors, self._pieces = tensors, dict(pieces)
        self.shapes: dict[str, list[int]] = {name: self._shape(name) for name in self._pieces}
        self.dtypes = {name: tensors.dtypes[piece.sources[0]] for name, piece in self._pieces.items()}
        odd = [
            f"{name} {tensors.dtypes[part]}"
            for name, piece in self._pieces.items()
            for part in piece.sources
            if tensors.dtypes[part] not in WEIGHT_DTYPES or tensors.dtypes[part] != self.dtypes[name]
        ]
        if odd:
            raise UserError(f"{source}: expected floating-point tensors, got {listed(odd)}")

    def _shape(self, name: str) -> list[int]:
        piece = self._pieces[name]
        shapes = [self._tensors.shapes[part] for part in piece.sources]
        if len(shapes) > 1 and any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise UserError(f"{self.source}: expected tensors that can be joined to {name}, got shapes {shapes}")
        if piece.transpose and len(shapes[0]) != 2:
            raise UserError(f"{self.source}: expected a matrix for {name}, got shape {shapes[0]}")
        if piece.transpose:
            return shapes[0][::-1]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if len(shapes) > 1 else list(shapes[0])

    def __getitem__(self, name: str) -> Tensor:
        """One tensor. Raises UserError: it cannot be read, or holds NaN or inf; KeyError: no such name."""
        piece = self._pieces[name]
        if len(piece.sources) == 1:
            tensor = self._tensors.read(piece.sources[0])
            tensor = tensor.t().contiguous() if piece.transpose else tensor
        else:
            tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
            row = 0
            for part in piece.sources:
                rows = self._tensors.shapes[part][0]
                tensor[row : row + rows] = self._tensors.read(part)
                row += rows
        # no copy of the tensor, and a NaN comes through
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise UserError(f"{self.source}: expected finite numbers, got NaN or inf in {name}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces


class Checkpoint(CheckpointTensors):
    """The vision encoder of a checkpoint, in the names of open_clip's ``visual`` tower.

    Attributes:
        format: what it was: safetensors, zip, legacy, torchscript, huggingface or open_clip.
        encoder: how to build the module (:func:`.encoders.build`); None where only ``names`` told what it
            is. ``quick_gelu`` in it is None where the checkpoint does not say.
        quick_gelu, heads: its activation and its attention heads; None where the checkpoint does not say.
        preprocessing: ``size``, ``mean`` and ``std`` of its images, or None.
        text: the rest of a whole CLIP in open_clip's names, empty where it has no text tower, or one that is not as
            CLIP's: then ``no_text`` says why.
        text_heads: attention heads of that, where a configuration says.
        path: the file or folder it was found in. weights: the files with its tensors. files: these and what else was
            read. origin: what a converted file says it was made from.
    """

    def __init__(self, source: str, kind: str, path: Path, tensors: _Tensors, said: _Said, names: Names = ()) -> None:
        vision, text, prefix = _pieces(tensors, source, names)
        super().__init__(source, tensors, vision)
        self.no_text = ""
        self.text = CheckpointTensors(source, tensors, text)
        self.leave_out_text(said.no_text)
        self.format, self.path, self.text_heads = kind, path, said.text_heads
        self.weights = list(tensors.files)
        beside = (hub.CONFIG, hub.OPEN_CLIP_CONFIG, *hub.PREPROCESSORS) if path.is_dir() else ()
        self.files = [*self.weights, *(path / name for name in beside if (path / name).is_file())]
        self.origin = dict(said.origin)
        self.architecture: Architecture | None = None
        self.encoder: dict[str, Any] | None = None
        self.quick_gelu = uses_quick_gelu(said.root, prefix, source) if said.quick_gelu is None else said.quick_gelu
        self.heads = attention_heads(said.root, prefix, source) if said.heads is None else said.heads
        preprocessing = normalisation(said.root) if said.preprocessing is None else said.preprocessing
        with _named(source):
            self.preprocessing = None if preprocessing is None else check_preprocessing(preprocessing)
            if names and (not _is_plain(vision) or said == _Said(root=said.root, origin=said.origin)):
                # its user describes it, and it may be an encoder of another kind
                return
            found = from_shapes(self.shapes, heads=self.heads, quick_gelu=self.quick_gelu)
            self.architecture = found
            self.encoder = {**describe(found), "quick_gelu": self.quick_gelu}
            if said.architecture is not None:
                _compare(found, said.architecture)
        if self.preprocessing is not None and self.preprocessing["size"] != found.image_size:
            got = self.preprocessing["size"]
            raise UserError(f"{source}: expected images of {found.image_size} pixels as its positions have, got {got}")

    def leave_out_text(self, reason: str) -> None:
        """Without the text tower from now on, if there is a reason: it would be exported as what it is not."""
        if reason and self.text:
            self.text, self.no_text = CheckpointTensors(self.source, self._tensors, {}), reason


def _compare(found: Architecture, claimed: Architecture) -> None:
    """What a configuration claims of an encoder beside what its tensors are; a projection may be left out."""
    for key, value in asdict(found).items():
        other = getattr(claimed, key)
        if value is not None and other is not None and value != other:
            raise UserError(f"expected {key} {value} as the tensors have, got {other} in the description")


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the source in front of a UserError from a function that does not know it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(source):
            raise
        raise UserError(f"{source}: {error}") from error


def open_checkpoint(source: str | Path, names: Names = ()) -> Checkpoint:
    """Open a checkpoint by path, hub id or open_clip tag; only headers, configurations and pickles are read.

    Args:
        names: of the tensors of an encoder that is no plain CLIP: a file with just these is taken as it is.

    Raises:
        UserError: nothing there; broken, hostile or contradictory; not a CLIP vision transformer. One line each.
        ForbiddenGlobal: a pickle that names what could run code.
    """
    with _named(str(source)):
        return _open(source, names)


def _open(source: str | Path, names: Names) -> Checkpoint:
    located = hub.locate(source)
    if located.path.is_dir():
        return _open_folder(located.path, str(source), names)
    settings = located.settings
    found = _open_single(located.path, str(source), names, settings.get("heads"), settings.get("quick_gelu"))
    if settings.get("preprocess_cfg") and found.architecture is not None:
        size = found.architecture.image_size
        found.preprocessing = preprocessing_from_open_clip(settings["preprocess_cfg"], size, str(source))
    found.leave_out_text(_odd_text(settings.get("text_cfg", {})))
    return found


def open_file(path: Path) -> SafetensorsFile | _Pickled:
    """By its first bytes: a safetensors header is a length and then a JSON mapping. Raises UserError for any other."""
    return SafetensorsFile(path) if is_safetensors(path) else _Pickled(open_archive(path))


def is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors, by its first bytes; UserError if it is no file."""
    if path.is_dir():
        raise UserError(f"{path}: expected a checkpoint, got a folder")
    if not path.is_file():
        got = "what is no regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: expected a checkpoint, got {got}")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        what = known_as(path)
    except OSError as error:
        raise UserError(f"{path}: expected a checkpoint, got {error.strerror}") from error
    if what:
        raise UserError(f"{path}: expected a checkpoint, got {what}")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{"):
        return False
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def _open_single(path: Path, source: str, names: Names, heads: int | None, quick_gelu: bool | None) -> Checkpoint:
    if _says_what_it_is(path):
        return _open_folder(path.parent, source, names, path.name)
    tensors = open_file(path)
    if isinstance(tensors, _Pickled):
        archive = tensors.archive
        if archive.kind == "torchscript" and quick_gelu is None:
            # OpenAI's are known by their modules
            quick_gelu = uses_quick_gelu(archive.root, "", source)
            if quick_gelu is None and isinstance(archive.root, Record) and "multimodal" in archive.root.type.module:
                quick_gelu = True
        said = _Said(heads, quick_gelu, root=archive.root)
        return Checkpoint(source, archive.kind, path, tensors, said, names)
    told = {
        key: parse_json(tensors.metadata[key].encode(), f"{path}: {key}")
        for key in ("encoder", "preprocessing")
        if key in tensors.metadata
    }
    claimed = None
    if told.get("encoder"):
        with _named(source):
            claimed = from_description(told["encoder"])
        heads = claimed.heads
        quick_gelu = claimed.quick_gelu if told["encoder"].get("quick_gelu") is not None else quick_gelu
        claimed = replace(claimed, quick_gelu=quick_gelu)
    origin = {
        key: tensors.metadata[key] for key in ORIGIN if "checksums" in tensors.metadata and key in tensors.metadata
    }
    said = _Said(heads, quick_gelu, told.get("preprocessing"), claimed, origin=origin)
    return Checkpoint(source, "safetensors", path, tensors, said, names)


def _says_what_it_is(path: Path) -> bool:
    """Whether a file of weights lies in a folder whose configuration is about it."""
    if path.name in hub.OPEN_CLIP_WEIGHTS:
        return (path.parent / hub.OPEN_CLIP_CONFIG).is_file()
    if path.name not in hub.WEIGHTS or not (path.parent / hub.CONFIG).is_file():
        return False
    with contextlib.suppress(UserError):
        return read_json(path.parent / hub.CONFIG).get("model_type") in ("clip", "clip_vision_model")
    return False


def _open_folder(folder: Path, source: str, names: Names = (), weights: str | None = None) -> Checkpoint:
    kind, order = hub.kind_of(folder)
    if weights in hub.OPEN_CLIP_WEIGHTS:
        kind = "open_clip"
    config = read_json(folder / hub.CONFIG) if kind == "huggingface" else {}
    said = _hugging_face_says(folder, config, source) if kind == "huggingface" else _open_clip_says(folder, source)
    found = [name for name in (order if weights is None else (weights,)) if (folder / name).is_file()]
    if not found:
        raise UserError(f"{source}: expected weights ({', '.join(order)}), got none")
    path = folder / found[0]
    tensors: _Tensors = _Shards(path) if path.name.endswith(".index.json") else open_file(path)
    checkpoint = Checkpoint(source, kind, folder, tensors, said, names)
    if kind == "huggingface" and checkpoint.architecture is not None:
        check_hugging_face_config(config, checkpoint.architecture, f"{source}: {hub.CONFIG}")
    return checkpoint


def _hugging_face_says(folder: Path, config: Mapping[str, Any], source: str) -> _Said:
    settings = from_hugging_face_config(config, f"{source}: {hub.CONFIG}")
    preprocessing: Mapping[str, Any] | None = None
    for name in hub.PREPROCESSORS:
        if preprocessing is None and (folder / name).is_file():
            preprocessing = preprocessing_from_hugging_face(read_json(folder / name), f"{source}: {name}")
    if preprocessing is None and (folder / hub.OPEN_CLIP_CONFIG).is_file():
        # a repository for both libraries
        preprocessing = _open_clip_says(folder, source).preprocessing
    text_heads, no_text = None, ""
    if config.get("model_type") == "clip":
        try:
            text_heads = from_hugging_face_text_config(config, hub.CONFIG).heads
        except UserError as error:
            # what the text tower is does not matter before it is exported
            no_text = str(error)
    return _Said(settings.heads, settings.quick_gelu, preprocessing, text_heads=text_heads, no_text=no_text)


def _open_clip_says(folder: Path, source: str) -> _Said:
    where = f"{source}: {hub.OPEN_CLIP_CONFIG}"
    config = read_json(folder / hub.OPEN_CLIP_CONFIG)
    claimed = from_open_clip_config(config, where)
    preprocess, preprocessing = config.get("preprocess_cfg"), None
    if preprocess is not None:
        preprocessing = preprocessing_from_open_clip(preprocess, claimed.image_size, where)
    text = config["model_cfg"].get("text_cfg")
    text = text if isinstance(text, Mapping) else {}
    heads = text.get("heads") if type(text.get("heads")) is int else None
    return _Said(claimed.heads, claimed.quick_gelu, preprocessing, claimed, heads, _odd_text(text))


_TEXT_SIZES = ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio")


def _odd_text(config: Any) -> str:
    """What an open_clip text_cfg says that the names and shapes of a CLIP's text tower do not; empty for nothing."""
    from open_clip.model import CLIPTextCfg

    plain = asdict(CLIPTextCfg())
    odd = [
        f"{key} {str(value)[:40]}"
        for key, value in (config.items() if isinstance(config, Mapping) else ())
        if key not in _TEXT_SIZES and value not in (None, False, plain.get(key))
    ]
    return f"text_cfg: expected a text tower as CLIP's, got {listed(odd)}" if odd else ""


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index}: expected a weight_map from tensors to files, got {type(found).__name__}")
    for name, shard in found.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise UserError(f"{index}: expected files beside the index, got {str(shard)[:80]!r} for {name[:80]!r}")
    return found


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, in its folder. Raises UserError: broken, or a path out of the folder."""
    return sorted(set(_weight_map(index).values()))


# --- names ---


def _is_plain(vision: Mapping[str, Piece]) -> bool:
    """Whether these are names of a plain CLIP vision transformer, whatever their shapes."""
    top = {"class_embedding", "positional_embedding", "proj", "conv1.weight"}
    top |= {f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    blocks = [block_and_rest(name) for name in vision if name not in top]
    return all(block is not None and block[1] in BLOCK_NAMES for block in blocks) and {"proj"} | set(vision) >= top


_MARKS = ("class_embedding", "conv1.weight")
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_TEXT = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection")


def _pieces(tensors: _Tensors, source: str, known: Names) -> tuple[dict[str, Piece], dict[str, Piece], str]:
    """The vision and the text tensors in open_clip's names, and what stands before the former in the file."""
    present = tensors.shapes
    if known and set(present) == set(known):
        return {name: Piece((name,)) for name in present}, {}, ""
    found = [name.removesuffix(_MARKS[0]) for name in present if name == _MARKS[0] or name.endswith(f".{_MARKS[0]}")]
    prefixes = [prefix for prefix in found if f"{prefix}{_MARKS[1]}" in present]
    if len(prefixes) > 1:
        raise UserError(f"{source}: expected one vision transformer, got {len(prefixes)}: {listed(prefixes)}")
    with _named(source):
        if prefixes:
            prefix = prefixes[0]
            vision = {name.removeprefix(prefix): Piece((name,)) for name in present if name.startswith(prefix)}
            return vision, _open_clip_text(present, prefix), prefix
        for prefix in ("", "module.", "model."):
            inner = [name.removeprefix(prefix) for name in present if name.startswith(prefix)]
            vision = vision_pieces(inner)
            if vision:
                return _behind(vision, prefix), _behind(text_pieces(inner), prefix), prefix
    raise UserError(
        f"{source}: expected a CLIP vision transformer (class_embedding, conv1.weight, transformer.resblocks…; or "
        f"vision_model…), got {listed(present)}"
    )


def _behind(pieces: Mapping[str, Piece], prefix: str) -> dict[str, Piece]:
    return {
        name: Piece(tuple(f"{prefix}{part}" for part in piece.sources), piece.transpose)
        for name, piece in pieces.items()
    }


def _open_clip_text(present: Mapping[str, Any], vision_prefix: str) -> dict[str, Piece]:
    """The text tower beside the vision tower; empty if it is not whole (the task-vectors release drops its blocks)."""
    if not (vision_prefix == "visual." or vision_prefix.endswith(".visual.")):
        return {}
    outer = vision_prefix.removesuffix("visual.")
    text: dict[str, Piece] = {}
    for name in present:
        if not name.startswith(outer) or name.startswith(vision_prefix):
            continue
        # open_clip's CustomTextCLIP has one more level
        inner = name.removeprefix(outer).removeprefix("text.")
        if inner in (*_TEXT, "ln_final.bias", "logit_scale") or inner.startswith("transformer.resblocks."):
            text[inner] = Piece((name,))
        elif inner not in _NO_WEIGHTS:
            # a text tower of another kind
            return {}
    whole = all(name in text for name in _TEXT) and any(name.startswith("transformer.") for name in text)
    return text if whole else {}
