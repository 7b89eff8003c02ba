"""Merged models written as folders that transformers or open_clip load without this library.

A folder is written beside its place under a name that starts with a dot and ends in ``.tmp``, and renamed once it is
whole and on the disk. Its configuration, without which nothing loads it, is written last. transformers is not needed
to write what it reads.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints import architecture as shapes
from pareto_merging.checkpoints import hugging_face, open_clip
from pareto_merging.checkpoints.cards import model_card
from pareto_merging.checkpoints.names import TEXT, VISION, hugging_face_tensors, listed
from pareto_merging.checkpoints.safetensors import write_tensors
from pareto_merging.errors import UserError
from pareto_merging.system.files import new_folder, write_bytes

_JSON: dict[str, Any] = {"indent": 2, "allow_nan": False, "ensure_ascii": False}


def export_hugging_face(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    text: Mapping[str, Tensor] | None = None,
    text_heads: int | None = None,
    card: str = "",
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder for transformers' ``from_pretrained``, 4 and 5.

    With ``text`` it holds a CLIPModel, else a CLIPVisionModelWithProjection (a CLIPVisionModel where the encoder has no
    projection), with config.json, model.safetensors, preprocessor_config.json and README.md. Tensors keep their dtype.

    Args:
        tensors: the vision tower in open_clip's names (without ``visual.``); each is read once, and kept: one model
            of memory.
        folder: the new folder; what is above it is created.
        encoder, preprocessing: as :mod:`.checkpoints.encoders` describes them.
        text: everything else of a whole CLIP in open_clip's names; nothing where there is no text tower.
        text_heads: its attention heads; default: one for every 64 features.
        card: the README.md; default: a short :func:`model_card`.
        extra_files: more files by name, such as a tokenizer's.
        overwrite: replace an existing model folder. A kill in between leaves the old one, none, or the new one.

    Returns:
        ``folder``.

    Raises:
        UserError: the folder exists, or is no model folder that could be replaced; tensors that are not those of the
            encoder; an encoder that Hugging Face's CLIP cannot express.
        OSError: the disk is full, …; the old folder or none is left.
    """
    target = _target(folder, overwrite)
    vision = shapes.from_description(encoder)
    text, text_tower = _text_side(text, text_heads)
    preprocessor = hugging_face.hugging_face_preprocessing(preprocessing)
    stored: dict[str, Tensor] = {}
    for name, tensor in _checked(tensors, shapes.expected_shapes(vision)):
        stored.update(hugging_face_tensors(VISION, name, tensor))
    for name, tensor in text.items():
        stored.update(hugging_face_tensors(TEXT, name, tensor))
    dtype = _common_dtype(stored)
    config = hugging_face.hugging_face_vision_config(vision, dtype)
    if text_tower is not None:
        config = hugging_face.hugging_face_clip_config(vision, text_tower, dtype)
    card = card or model_card("transformers", encoder=encoder, has_text=bool(text))
    files = {"preprocessor_config.json": preprocessor, "README.md": card, hugging_face.CONFIG: config}
    _write_folder(target, "model.safetensors", stored, files, extra_files or {})
    return Path(folder)


def export_open_clip(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    encoder: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    text: Mapping[str, Tensor] | None = None,
    text_heads: int | None = None,
    card: str = "",
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder for open_clip; arguments, result and errors as :func:`export_hugging_face`.

    With ``text`` it is a whole CLIP: ``create_model_and_transforms("local-dir:FOLDER")``, or its
    open_clip_model.safetensors as ``pretrained=`` of ``create_model``.

    Without, open_clip has no model to load, as all of its models have a text tower. Its visual.safetensors is what
    ``pretrained_image_path=`` takes: over a whole CLIP, ``create_model("ViT-B-32", pretrained="openai",
    pretrained_image_path="FOLDER/visual.safetensors")``, or alone, with the transforms, ``create_model_and_transforms(
    "local-dir:FOLDER", load_weights=False, pretrained_image_path="FOLDER/visual.safetensors")``: then the text tower is
    the smallest possible, and random. Without ``load_weights=False`` open_clip refuses the folder.

    An encoder without a projection gets the identity as one: open_clip's features are the same.
    """
    target = _target(folder, overwrite)
    vision = shapes.from_description(encoder)
    text, text_tower = _text_side(text, text_heads)
    preprocess_cfg = open_clip.open_clip_preprocessing(preprocessing)
    prefix = "visual." if text else ""
    stored = {f"{prefix}{name}": tensor for name, tensor in _checked(tensors, shapes.expected_shapes(vision))}
    if vision.output_dim is None:
        stored[f"{prefix}proj"] = torch.eye(vision.width, dtype=_common_dtype(stored))
        vision = replace(vision, output_dim=vision.width)
    stored.update(text)
    config = {"model_cfg": open_clip.open_clip_model_config(vision, text_tower), "preprocess_cfg": preprocess_cfg}
    card = card or model_card("open_clip", encoder=encoder, has_text=bool(text))
    # half a model does not get a name that open_clip prefers
    weights = "open_clip_model.safetensors" if text else "visual.safetensors"
    _write_folder(target, weights, stored, {"README.md": card, open_clip.CONFIG: config}, extra_files or {})
    return Path(folder)


def _text_side(
    text: Mapping[str, Tensor] | None, heads: int | None
) -> tuple[dict[str, Tensor], shapes.TextArchitecture | None]:
    """Read each text tensor once, and return them with their architecture. Nothing and None stand for no text tower."""
    tensors = {name: _plain(name, tensor) for name, tensor in (text or {}).items()}
    if not tensors:
        return {}, None
    return tensors, shapes.text_from_shapes({name: tuple(t.shape) for name, t in tensors.items()}, heads=heads)


def _checked(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors one by one, each read once and checked against the encoder's."""
    shapes.compare_names(tensors, expected, "tensors: expected those of the encoder")
    for name, shape in expected.items():
        tensor = _plain(name, tensors[name])
        if tuple(tensor.shape) != shape:
            raise UserError(f"tensors: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        yield name, tensor


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise UserError(f"tensors: {listed([name])}: expected floating point, got {tensor.dtype}")
    return tensor.detach().cpu()


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds every matrix and vector. transformers makes all of a model one dtype."""
    # a logit_scale in float32 must not make a float16 model twice as large
    dtypes = sorted({tensor.dtype for tensor in tensors.values() if tensor.dim()}, key=str)
    return functools.reduce(torch.promote_types, dtypes)


def _target(folder: Path, overwrite: bool) -> Path:
    """Return where to write, links followed. Raises UserError if something is there that must not be replaced."""
    target = Path(os.path.realpath(folder))
    if not target.exists():
        return target
    if not target.is_dir():
        raise UserError(f"{folder}: expected a folder to write, got a file")
    if not overwrite:
        raise UserError(f"{folder}: expected a new folder, got an existing one (overwrite replaces it)")
    # replacing deletes: a home folder, or one with somebody's other files in it, is not a model
    entries = {entry.name: entry for entry in os.scandir(target)}
    is_described = not entries.keys().isdisjoint((hugging_face.CONFIG, open_clip.CONFIG))
    is_model = is_described and any(name.endswith(".safetensors") for name in entries)
    if entries and not (is_model and all(entry.is_file(follow_symlinks=False) for entry in entries.values())):
        raise UserError(f"{folder}: expected a model folder to replace, got one with other things in it")
    return target


def _write_folder(
    target: Path, weights: str, tensors: Mapping[str, Tensor], files: Mapping[str, Any], extra: Mapping[str, bytes]
) -> None:
    """Write weights, extra files, then ``files``: text, or JSON. The last is the one without which nothing loads."""
    for name in extra:
        if name in {weights, *files} or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise UserError(f"extra_files: expected plain names of other files, got {listed([name])}")
        if name.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise UserError(f"extra_files: expected no weights, got {name}")
    with new_folder(target) as temporary:
        write_tensors(temporary / weights, tensors, {"format": "pt"})
        for name, extra_content in extra.items():
            write_bytes(temporary / name, extra_content)
        for name, value in files.items():
            content = value if isinstance(value, str) else json.dumps(value, **_JSON) + "\n"
            write_bytes(temporary / name, content.encode())
