"""A merged model as a folder that transformers or open_clip loads by itself, without this library.

A folder is written beside its place under a name that starts with a dot and ends in ``.tmp``, and renamed once it is
whole and on the disk. Its configuration, without which nothing loads it, is written last. transformers is not needed
to write what it reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from pareto_merging.checkpoints import architecture as shapes
from pareto_merging.checkpoints import encoders, hugging_face, open_clip
from pareto_merging.checkpoints.names import hugging_face_text, hugging_face_vision, listed
from pareto_merging.checkpoints.safetensors import write_tensors
from pareto_merging.errors import UserError
from pareto_merging.system.files import new_folder, write_bytes

HUGGING_FACE_WEIGHTS, HUGGING_FACE_CONFIG = "model.safetensors", "config.json"
OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
# not a name that open_clip prefers: it is half a model
OPEN_CLIP_VISUAL = "visual.safetensors"
PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"

Library = Literal["transformers", "open_clip", "safetensors"]


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
        encoder, preprocessing: as :mod:`pareto_merging.checkpoints.encoders` describes them.
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
        stored.update(hugging_face_vision(name, tensor))
    for name, tensor in text.items():
        stored.update(hugging_face_text(name, tensor))
    dtype = _common_dtype(stored)
    config = (
        hugging_face.hugging_face_vision_config(vision, dtype)
        if text_tower is None
        else hugging_face.hugging_face_clip_config(vision, text_tower, dtype)
    )
    files = {
        PREPROCESSOR: _json(preprocessor),
        CARD: (card or model_card("transformers", encoder=encoder, has_text=bool(text))).encode(),
        HUGGING_FACE_CONFIG: _json(config),
    }
    _write_folder(target, {HUGGING_FACE_WEIGHTS: stored}, files, extra_files or {})
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
    files = {
        CARD: (card or model_card("open_clip", encoder=encoder, has_text=bool(text))).encode(),
        OPEN_CLIP_CONFIG: _json(config),
    }
    weights = OPEN_CLIP_WEIGHTS if text else OPEN_CLIP_VISUAL
    _write_folder(target, {weights: stored}, files, extra_files or {})
    return Path(folder)


# --- the tensors


def _text_side(
    text: Mapping[str, Tensor] | None, heads: int | None
) -> tuple[dict[str, Tensor], shapes.TextArchitecture | None]:
    """The text tensors, each read once, and their architecture; nothing and None where there is no text tower."""
    tensors = {name: _plain(name, tensor) for name, tensor in (text or {}).items()}
    if not tensors:
        return {}, None
    return tensors, shapes.text_from_shapes({name: tuple(t.shape) for name, t in tensors.items()}, heads=heads)


def _checked(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, each read once, checked against the encoder's."""
    missing, extra = expected.keys() - set(tensors), set(tensors) - expected.keys()
    if missing:
        raise UserError(f"tensors: expected those of the encoder, got none named {listed(missing)}")
    if extra:
        raise UserError(f"tensors: expected those of the encoder, got also {listed(extra)}")
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
    """The smallest dtype that holds every matrix and vector: transformers makes all of a model one dtype."""
    # a logit_scale in float32 must not make a float16 model twice as large
    dtypes = sorted({tensor.dtype for tensor in tensors.values() if tensor.dim()}, key=str)
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


# --- the folder


def _target(folder: Path, overwrite: bool) -> Path:
    """Where to write, links followed. Raises UserError if something is there that must not be replaced."""
    target = Path(os.path.realpath(folder))
    if not target.exists():
        return target
    if not target.is_dir():
        raise UserError(f"{folder}: expected a folder to write, got a file")
    if not overwrite:
        raise UserError(f"{folder}: expected a new folder, got an existing one (overwrite replaces it)")
    # replacing deletes: a home folder, or one with somebody's other files in it, is not a model
    entries = {entry.name: entry for entry in os.scandir(target)}
    is_model = not entries.keys().isdisjoint((HUGGING_FACE_CONFIG, OPEN_CLIP_CONFIG))
    is_model = is_model and any(name.endswith(".safetensors") for name in entries)
    has_folders = any(not entry.is_file(follow_symlinks=False) for entry in entries.values())
    if entries and (not is_model or has_folders):
        raise UserError(f"{folder}: expected a model folder to replace, got one with other things in it")
    return target


def _write_folder(
    target: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
    extra_files: Mapping[str, bytes],
) -> None:
    """Weights, extra files, then ``files`` in their order: the last is the one without which nothing loads."""
    for name in extra_files:
        if name in {*weights, *files} or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            raise UserError(f"extra_files: expected plain names of other files, got {listed([name])}")
        if name.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise UserError(f"extra_files: expected no weights, got {name}")
    with new_folder(target) as temporary:
        for name, tensors in weights.items():
            write_tensors(temporary / name, tensors, {"format": "pt"})
        for name, content in {**extra_files, **files}.items():
            write_bytes(temporary / name, content)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


# --- the model card


@dataclass(frozen=True)
class Source:
    """One checkpoint that was merged: what it is (``pretrained``, a task), where it came from, and what it held.

    Attributes:
        name: for people. origin: a path or a Hub id. digest: of its weights, hexadecimal. hub_id: ``owner/name`` where
            it is on the Hub.
    """

    name: str
    origin: str = ""
    digest: str = ""
    hub_id: str = ""


def model_card(
    library: Library,
    *,
    encoder: Mapping[str, Any],
    has_text: bool,
    title: str = "Merged CLIP",
    preference: Mapping[str, float] | None = None,
    method: str = "",
    rank: int | None = None,
    lambda_grouping: str = "",
    sources: Sequence[Source] = (),
    version: str = "",
    preprocessing: Mapping[str, Any] | None = None,
    file_name: str = "",
) -> str:
    """A README.md for the Hugging Face Hub: front matter it accepts, and what the model is, made of and loaded by.

    Args:
        encoder: as :mod:`pareto_merging.checkpoints.encoders` describes it. has_text: it is a whole CLIP.
        preference: task -> weight. method: how it was merged, in words. rank: of the low-rank part.
        lambda_grouping: for what there is a learned λ each (tensor, block, …). version: of this package.
        library: what loads it; ``safetensors``: one file of the vision tower, called ``file_name``, whose images are
            made as ``preprocessing`` says.

    Names may hold anything: they are escaped.
    """
    base_models = [source.hub_id for source in sources if _is_hub_id(source.hub_id)]
    front = {
        "library_name": "open_clip" if library == "safetensors" else library,
        "pipeline_tag": "zero-shot-image-classification" if has_text else "image-feature-extraction",
        "tags": ["merge", "pareto-merging", "clip"],
        **({"base_model": list(dict.fromkeys(base_models)), "base_model_relation": "merge"} if base_models else {}),
    }
    what = "A CLIP whose vision encoder was" if has_text else "The vision encoder of a CLIP,"
    made_by = "[Pareto Merging](https://arxiv.org/abs/2408.12105)"
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=False) + "---\n",
        f"# {_escaped(title)}\n",
        f"{what} merged from fine-tuned copies for one preference over their tasks, with {made_by}.\n",
    ]
    if preference:
        rows = [f"| {_escaped(task)} | {weight:.6g} |" for task, weight in preference.items()]
        parts.append("\n".join(["## Preference\n", "| task | weight |", "|---|---:|", *rows]) + "\n")
    facts = [f"Method: {_escaped(method)}."] if method else []
    facts += [f"λ learned for each {_escaped(lambda_grouping)}."] if lambda_grouping else []
    facts += [f"Low-rank part of rank {rank}."] if rank is not None else []
    facts += [f"Written by pareto-merging {_escaped(version)}."] if version else []
    if facts:
        parts.append("## How it was merged\n\n" + " ".join(facts) + "\n")
    if sources:
        rows = [f"| {_escaped(s.name)} | {_escaped(s.origin or s.hub_id)} | {_escaped(s.digest)} |" for s in sources]
        header = ["## Source checkpoints\n", "| | from | digest of the weights |", "|---|---|---|"]
        parts.append("\n".join([*header, *rows]) + "\n")
    if library == "safetensors":
        code = _loading_one_file(encoder, preprocessing or encoders.default_preprocessing(encoder), file_name)
    else:
        code = _loading(library, encoder, has_text)
    parts.append(f"## Loading it\n\n```python\n{code}```\n")
    parts.append("## Licence\n\nThat of the checkpoints it was merged from: see theirs.\n")
    return "\n".join(parts)


def _loading_one_file(encoder: Mapping[str, Any], preprocessing: Mapping[str, Any], file_name: str) -> str:
    quick_gelu = shapes.from_description(encoder).quick_gelu
    if "architecture" in encoder:
        name = str(encoder["architecture"])
        start = ["import open_clip"]
        build = [f"encoder = open_clip.create_model({name!r}, force_quick_gelu={quick_gelu}).visual"]
    else:
        start = ["import open_clip", "from pareto_merging import encoders"]
        build = [f"encoder = encoders.build({dict(encoder)!r})"]
    size, mean, std = (preprocessing[key] for key in ("size", "mean", "std"))
    return "\n".join(
        [
            *start,
            "from PIL import Image",
            "from safetensors.torch import load_file",
            "",
            *build,
            f"encoder.load_state_dict(load_file({file_name!r}))",
            "preprocess = open_clip.image_transform(",
            f"    {size}, is_train=False, mean={tuple(mean)}, std={tuple(std)}",
            ")",
            'features = encoder.eval()(preprocess(Image.open("photo.jpg"))[None])',
            "",
        ]
    )


def _loading(library: Library, encoder: Mapping[str, Any], has_text: bool) -> str:
    if library == "transformers":
        if has_text:
            # get_image_features returns one thing in transformers 4 and another in 5
            kind, features = "CLIPModel", "model.visual_projection(model.vision_model(**inputs).pooler_output)"
        elif shapes.from_description(encoder).output_dim is None:
            kind, features = "CLIPVisionModel", "model(**inputs).pooler_output"
        else:
            kind, features = "CLIPVisionModelWithProjection", "model(**inputs).image_embeds"
        return (
            "from PIL import Image\n"
            f"from transformers import CLIPImageProcessor, {kind}\n\n"
            'folder = "."  # where this file is, or its name on the Hub\n'
            f"model = {kind}.from_pretrained(folder)\n"
            "processor = CLIPImageProcessor.from_pretrained(folder)\n"
            'inputs = processor(images=Image.open("photo.jpg"), return_tensors="pt")\n'
            f"features = {features}\n"
        )
    lines = [
        "import open_clip",
        "from PIL import Image",
        "",
        'folder = "."  # where this file is',
    ]
    if has_text:
        lines.append('model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")')
    else:
        lines += [
            "# every model of open_clip has a text tower: this one is small and random, and no part of what was merged",
            "model, _, preprocess = open_clip.create_model_and_transforms(",
            '    f"local-dir:{folder}", load_weights=False, pretrained_image_path=f"{folder}/visual.safetensors"',
            ")",
        ]
    lines.append('features = model.eval().encode_image(preprocess(Image.open("photo.jpg"))[None])')
    if not has_text and "architecture" in encoder:
        quick_gelu = shapes.from_description(encoder).quick_gelu
        lines += [
            "",
            "# or inside a whole CLIP of the same kind, whose text tower it then has: give its tag or file",
            "model = open_clip.create_model(",
            f"    {str(encoder['architecture'])!r},",
            '    pretrained="openai",',
            f"    force_quick_gelu={quick_gelu},",
            '    pretrained_image_path=f"{folder}/visual.safetensors",',
            ")",
        ]
    return "\n".join(lines) + "\n"


def _is_hub_id(value: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", value) is not None


def _escaped(value: str) -> str:
    """Text that Markdown shows as it is, on one line and inside a table."""
    visible = "".join(letter if letter.isprintable() else " " for letter in value[:500])
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&:])", r"\\\1", " ".join(visible.split()))
