"""open_clip's open_clip_config.json, and the folders that hold it."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pareto_merging.checkpoints import architecture as shapes
from pareto_merging.checkpoints.architecture import Architecture, TextArchitecture
from pareto_merging.checkpoints.contents import CLIP_MEAN, CLIP_STD, Description, Layout, check_preprocessing
from pareto_merging.checkpoints.contents import WEIGHTS as OTHER_WEIGHTS
from pareto_merging.checkpoints.names import listed
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
_TEXT_SIZES = ("context_length", "vocab_size", "width", "layers", "heads")


def open_clip_model_config(architecture: Architecture, text: TextArchitecture | None = None) -> dict[str, Any]:
    """Return the ``model_cfg`` of an open_clip_config.json. Without ``text`` it has the smallest text tower there is.

    Raises UserError: no projection (open_clip's CLIP has one), or towers that do not end in the same dimension.
    """
    if architecture.output_dim is None:
        raise UserError("encoder: expected a projection for open_clip, got none")
    if text is None:
        text = TextArchitecture(77, 49408, 64, 1, 1, 64, architecture.output_dim)
    shapes.check_towers(architecture, text)
    return {
        "embed_dim": architecture.output_dim,
        "quick_gelu": bool(architecture.quick_gelu),
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": architecture.width,
            "layers": architecture.layers,
            "head_width": architecture.width // architecture.heads,
            "mlp_ratio": shapes.mlp_ratio_of(architecture.width, architecture.mlp_width),
        },
        "text_cfg": {
            **{key: getattr(text, key) for key in _TEXT_SIZES},
            "mlp_ratio": shapes.mlp_ratio_of(text.width, text.mlp_width),
        },
    }


def open_clip_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``preprocess_cfg`` of an open_clip_config.json. Raises UserError if ``preprocessing`` is not ours."""
    size, mean, std = check_preprocessing(preprocessing).values()
    resizing = {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    return {"size": size, "mode": "RGB", "mean": mean, "std": std, **resizing}


def preprocessing_from_open_clip(
    config: Mapping[str, Any], image_size: int, source: str = "open_clip_config.json"
) -> dict[str, Any]:
    """Return ``size``, ``mean`` and ``std`` of a ``preprocess_cfg``. A missing key is as open_clip has it.

    Args:
        image_size: the model's, which open_clip takes whatever ``size`` says.

    Raises:
        UserError: anything but bicubic resizing of the shorter side, or values of the wrong type.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: preprocess_cfg: expected a mapping, got {type(config).__name__}")
    for key, expected in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("mode", "RGB")):
        # open_clip passes over null
        if config.get(key) not in (None, expected):
            raise UserError(f"{source}: {key}: expected {expected}, got {str(config[key])[:80]}")
    given = {key: config[key] for key in ("mean", "std") if config.get(key) is not None}
    return check_preprocessing({"size": image_size, "mean": CLIP_MEAN, "std": CLIP_STD, **given}, source)


def text_is_not_clips(config: Any) -> str:
    """Say what in an open_clip text_cfg a CLIP's text tower does not have. Empty text stands for nothing."""
    from open_clip.model import CLIPTextCfg

    plain = asdict(CLIPTextCfg())
    settings = config.items() if isinstance(config, Mapping) else ()
    others = [
        f"{key} {str(value)[:40]}"
        for key, value in settings
        if key not in (*_TEXT_SIZES, "mlp_ratio") and value not in (None, False, plain.get(key))
    ]
    return f"text_cfg: expected a text tower as CLIP's, got {listed(others)}" if others else ""


def describe_folder(folder: Path, source: str) -> Description:
    """Return what a folder's configuration says. Raises UserError: it is broken, or no plain CLIP's."""
    where = f"{source}: {CONFIG}"
    config = read_json(folder / CONFIG)
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vision, Mapping):
        raise UserError(f"{where}: expected a model_cfg with a vision_cfg, got none")
    quick_gelu = model.get("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise UserError(f"{where}: quick_gelu: expected true or false, got {str(quick_gelu)[:80]}")
    arguments = {**shapes.VISION_DEFAULTS, **vision, "output_dim": model.get("embed_dim")}
    claimed = shapes.from_description({"arguments": arguments, "quick_gelu": quick_gelu})
    given = config.get("preprocess_cfg")
    preprocessing = None if given is None else preprocessing_from_open_clip(given, claimed.image_size, where)
    text = model.get("text_cfg")
    text = text if isinstance(text, Mapping) else {}
    heads = text.get("heads") if type(text.get("heads")) is int else None
    check = partial(shapes.check_claims, claimed=claimed)
    return Description(claimed.heads, claimed.quick_gelu, preprocessing, check, heads, text_is_not_clips(text))


LAYOUT = Layout(
    "open_clip",
    (CONFIG,),
    (*WEIGHTS, *OTHER_WEIGHTS),
    recognises=lambda folder: (folder / CONFIG).is_file(),
    holds=lambda path: path.name in WEIGHTS and (path.parent / CONFIG).is_file(),
    describe=describe_folder,
)
