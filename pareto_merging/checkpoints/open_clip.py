"""open_clip's open_clip_config.json, and the folders that hold it."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pareto_merging.checkpoints.architecture import (
    OPEN_CLIP_VISION_DEFAULTS,
    Architecture,
    TextArchitecture,
    check_claims,
    check_towers,
    from_description,
    mlp_ratio_of,
)
from pareto_merging.checkpoints.contents import WEIGHTS as OTHER_WEIGHTS
from pareto_merging.checkpoints.contents import Description, Layout
from pareto_merging.checkpoints.names import listed
from pareto_merging.checkpoints.preprocessing import CLIP_MEAN, CLIP_STD, check_preprocessing
from pareto_merging.errors import UserError
from pareto_merging.system.files import read_json

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
    # a vision tower alone, as our own export writes it
    "visual.safetensors",
)
_TEXT_SIZES = ("context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio")


def open_clip_model_config(architecture: Architecture, text: TextArchitecture | None = None) -> dict[str, Any]:
    """Return the ``model_cfg`` of an open_clip_config.json.

    Args:
        text: None where there is no text tower: open_clip then builds the smallest one, with random weights.

    Raises:
        UserError: no projection (open_clip's CLIP has one), or towers that do not end in the same dimension.
    """
    if architecture.output_dim is None:
        raise UserError("encoder: expected a projection for open_clip, got none")
    if text is None:
        text = TextArchitecture(77, 49408, 64, 1, 1, 64, architecture.output_dim)
    check_towers(architecture, text)
    return {
        "embed_dim": architecture.output_dim,
        "quick_gelu": bool(architecture.quick_gelu),
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": architecture.width,
            "layers": architecture.layers,
            "head_width": architecture.width // architecture.heads,
            "mlp_ratio": mlp_ratio_of(architecture.width, architecture.mlp_width),
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "layers": text.layers,
            "heads": text.heads,
            "mlp_ratio": mlp_ratio_of(text.width, text.mlp_width),
        },
    }


def from_open_clip_config(config: Mapping[str, Any], source: str = "open_clip_config.json") -> Architecture:
    """Return the vision transformer that an open_clip_config.json describes.

    Raises:
        UserError: no ``model_cfg`` with a ``vision_cfg``, or one that a plain CLIP cannot express.
    """
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vision, Mapping):
        raise UserError(f"{source}: expected a model_cfg with a vision_cfg, got none")
    quick_gelu = model.get("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise UserError(f"{source}: quick_gelu: expected true or false, got {str(quick_gelu)[:80]}")
    settings = {**OPEN_CLIP_VISION_DEFAULTS, **vision, "output_dim": model.get("embed_dim")}
    return from_description({"arguments": settings, "quick_gelu": quick_gelu})


def open_clip_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``preprocess_cfg`` of an open_clip_config.json. Raises UserError if ``preprocessing`` is not ours."""
    size, mean, std = check_preprocessing(preprocessing).values()
    return {
        "size": size,
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


def preprocessing_from_open_clip(
    config: Mapping[str, Any], image_size: int, source: str = "open_clip_config.json"
) -> dict[str, Any]:
    """Return ``size``, ``mean`` and ``std`` of a ``preprocess_cfg``.

    Args:
        image_size: the model's, which open_clip takes whatever ``size`` says; a missing key is as open_clip has it.

    Raises:
        UserError: anything but bicubic resizing of the shorter side, or values of the wrong type.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: preprocess_cfg: expected a mapping, got {type(config).__name__}")
    for key, expected in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("mode", "RGB")):
        # open_clip passes over null
        if config.get(key) not in (None, expected):
            raise UserError(f"{source}: {key}: expected {expected}, got {str(config[key])[:80]}")
    mean, std = config.get("mean"), config.get("std")
    preprocessing = {
        "size": image_size,
        "mean": CLIP_MEAN if mean is None else mean,
        "std": CLIP_STD if std is None else std,
    }
    return check_preprocessing(preprocessing, source)


def text_is_not_clips(config: Any) -> str:
    """Say what in an open_clip text_cfg a CLIP's text tower does not have. Empty text stands for nothing."""
    from open_clip.model import CLIPTextCfg

    plain = asdict(CLIPTextCfg())
    others = [
        f"{key} {str(value)[:40]}"
        for key, value in (config.items() if isinstance(config, Mapping) else ())
        if key not in _TEXT_SIZES and value not in (None, False, plain.get(key))
    ]
    return f"text_cfg: expected a text tower as CLIP's, got {listed(others)}" if others else ""


def is_folder(folder: Path) -> bool:
    """Return whether a folder has open_clip's configuration."""
    return (folder / CONFIG).is_file()


def holds(path: Path) -> bool:
    """Return whether a file of weights has open_clip's name and lies beside its configuration."""
    return path.name in WEIGHTS and is_folder(path.parent)


def describe_folder(folder: Path, source: str) -> Description:
    """Return what a folder's configuration says. Raises UserError: it is broken, or no plain CLIP's."""
    where = f"{source}: {CONFIG}"
    config = read_json(folder / CONFIG)
    claimed = from_open_clip_config(config, where)
    preprocess, preprocessing = config.get("preprocess_cfg"), None
    if preprocess is not None:
        preprocessing = preprocessing_from_open_clip(preprocess, claimed.image_size, where)
    text = config["model_cfg"].get("text_cfg")
    text = text if isinstance(text, Mapping) else {}
    heads = text.get("heads") if type(text.get("heads")) is int else None
    check = partial(check_claims, claimed=claimed)
    return Description(claimed.heads, claimed.quick_gelu, preprocessing, check, heads, text_is_not_clips(text))


LAYOUT = Layout("open_clip", (CONFIG,), (*WEIGHTS, *OTHER_WEIGHTS), is_folder, holds, describe_folder)
