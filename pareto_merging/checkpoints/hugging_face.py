"""Hugging Face's configurations of a CLIP, and the folders that hold them."""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pareto_merging.checkpoints import architecture as shapes
from pareto_merging.checkpoints import open_clip
from pareto_merging.checkpoints.architecture import Architecture, TextArchitecture
from pareto_merging.checkpoints.contents import CLIP_MEAN, CLIP_STD, WEIGHTS, Description, Layout, check_preprocessing
from pareto_merging.errors import UserError
from pareto_merging.system.files import read_json

CONFIG = "config.json"
# the second is all that transformers 5 writes for a whole CLIP
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# of every layer norm, in open_clip and in transformers
_EPS = 1e-5
# PIL's number
_BICUBIC = 3
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": _EPS}
_VISION_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_attention_heads": 12}
_IMAGE_SIZES = {"num_channels": 3, "image_size": 224, "patch_size": 32}
_VISION_DEFAULTS = _DEFAULTS | _VISION_SIZES | _IMAGE_SIZES
_TEXT_SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT_DEFAULTS = _DEFAULTS | _TEXT_SIZES | {"vocab_size": 49408, "eos_token_id": 49407}


class HuggingFaceSettings(NamedTuple):
    """What a config.json says that no shape does."""

    heads: int
    quick_gelu: bool


def from_hugging_face_config(config: Mapping[str, Any], source: str = "config.json") -> HuggingFaceSettings:
    """Return the vision tower's heads and activation from a config.json. Keys may be missing, as in transformers.

    Raises UserError: another ``model_type`` than clip_vision_model or clip (with ``vision_config`` inside), another
    activation or layer norm, or values of the wrong type.
    """
    return _settings(_vision_config(config, source), source)


def from_hugging_face_text_config(config: Mapping[str, Any], source: str = "config.json") -> HuggingFaceSettings:
    """Return the text tower's heads and activation from a config.json of ``model_type`` clip.

    Raises UserError: as :func:`from_hugging_face_config`, or an activation other than the vision tower's (open_clip's
    CLIP has one for both), or an end of text that is not the last of the vocabulary.
    """
    vision = from_hugging_face_config(config, source)
    if config["model_type"] != "clip":
        raise UserError(f"{source}: expected model_type clip for a text tower, got {config['model_type']}")
    inner = _inner(config, "text_config", _TEXT_DEFAULTS, source)
    text = _settings(inner, f"{source}: text_config")
    # where transformers takes the features: at the largest token (2, by its own convention) or at this one
    last = shapes.checked_size(inner["vocab_size"], f"{source}: text_config: vocab_size") - 1
    if inner["eos_token_id"] not in (2, last):
        expected, got = f"{last}, the last token, whose features open_clip takes", str(inner["eos_token_id"])[:80]
        raise UserError(f"{source}: text_config: eos_token_id: expected {expected}, got {got}")
    if text.quick_gelu != vision.quick_gelu:
        raise UserError(f"{source}: expected one hidden_act for both towers, got two")
    return text


def check_hugging_face_config(config: Mapping[str, Any], architecture: Architecture, source: str) -> None:
    """Raise UserError for the first claim of a config.json that the vision tower's tensors contradict."""
    vision = _vision_config(config, source)
    settings = _settings(vision, source)
    claims = {
        "hidden_size": architecture.width,
        "intermediate_size": architecture.mlp_width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "patch_size": architecture.patch_size,
        "image_size": architecture.image_size,
        # a CLIPVisionModel has the key, but no projection
        **({} if architecture.output_dim is None else {"projection_dim": architecture.output_dim}),
    }
    for key, actual in claims.items():
        if shapes.checked_size(vision[key], f"{source}: {key}") != actual:
            raise UserError(f"{source}: {key}: expected {actual} as the tensors have, got {vision[key]}")
    if architecture.quick_gelu not in (None, settings.quick_gelu):
        expected = "quick_gelu" if architecture.quick_gelu else "gelu"
        raise UserError(f"{source}: hidden_act: expected {expected}, got {vision['hidden_act']}")


def _vision_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: expected a mapping, got {type(config).__name__}")
    kind = config.get("model_type")
    if kind == "clip_vision_model":
        return {**_VISION_DEFAULTS, **config}
    if kind != "clip":
        raise UserError(f"{source}: expected model_type clip or clip_vision_model, got {str(kind)[:80]!r}")
    # a CLIPModel's projection has the outer size, whatever the inner one says
    vision = _inner(config, "vision_config", _VISION_DEFAULTS, source)
    return {**vision, "projection_dim": config.get("projection_dim", 512)}


def _inner(config: Mapping[str, Any], key: str, defaults: Mapping[str, Any], source: str) -> dict[str, Any]:
    # configurations of 2021 and 2022 have a second mapping, which transformers lets win as a whole
    inner = config.get(f"{key}_dict")
    inner = config.get(key) if inner is None else inner
    if inner is not None and not isinstance(inner, Mapping):
        raise UserError(f"{source}: {key}: expected a mapping, got {type(inner).__name__}")
    return {**defaults, **(inner or {})}


def _settings(config: Mapping[str, Any], source: str) -> HuggingFaceSettings:
    heads = shapes.checked_size(config["num_attention_heads"], f"{source}: num_attention_heads")
    shapes.check_heads(heads, shapes.checked_size(config["hidden_size"], f"{source}: hidden_size"))
    activation, eps, channels = config["hidden_act"], config["layer_norm_eps"], config.get("num_channels", 3)
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{source}: hidden_act: expected quick_gelu or gelu, got {str(activation)[:80]!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not math.isclose(eps, _EPS, rel_tol=1e-3):
        raise UserError(f"{source}: layer_norm_eps: expected {_EPS} as open_clip has, got {str(eps)[:80]}")
    if channels != 3:
        raise UserError(f"{source}: num_channels: expected 3, got {str(channels)[:80]}")
    return HuggingFaceSettings(heads, activation == "quick_gelu")


def hugging_face_vision_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a CLIPVisionModelWithProjection. Without a projection it is a CLIPVisionModel's."""
    dim = architecture.output_dim
    return {
        "architectures": ["CLIPVisionModel" if dim is None else "CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": architecture.width,
        "intermediate_size": architecture.mlp_width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_channels": 3,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "projection_dim": architecture.width if dim is None else dim,
        "hidden_act": "quick_gelu" if architecture.quick_gelu else "gelu",
        "layer_norm_eps": _EPS,
        "attention_dropout": 0.0,
        **_dtype_keys(dtype),
    }


def hugging_face_text_config(text: TextArchitecture, quick_gelu: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``text_config`` of a CLIPModel."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "projection_dim": text.output_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "layer_norm_eps": _EPS,
        "attention_dropout": 0.0,
        # 2, as in OpenAI's own: transformers then takes the token of the largest number, as open_clip does
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **_dtype_keys(dtype),
    }


def hugging_face_clip_config(architecture: Architecture, text: TextArchitecture, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a whole CLIPModel. Raises UserError if the towers do not end alike."""
    shapes.check_towers(architecture, text)
    vision = hugging_face_vision_config(architecture, dtype)
    del vision["architectures"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": text.output_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": hugging_face_text_config(text, bool(architecture.quick_gelu), dtype),
        "vision_config": vision,
        **_dtype_keys(dtype),
    }


def _dtype_keys(dtype: torch.dtype) -> dict[str, str]:
    # transformers before 4.56 reads torch_dtype, later ones dtype
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def hugging_face_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessor_config.json of a CLIPImageProcessor. Raises UserError for what is not ours."""
    size, mean, std = check_preprocessing(preprocessing).values()
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def preprocessing_from_hugging_face(
    config: Mapping[str, Any], source: str = "preprocessor_config.json"
) -> dict[str, Any] | None:
    """Return ``size``, ``mean`` and ``std`` of a preprocessor_config.json, or of a processor_config.json around one.

    Sizes may be numbers (before transformers 4.23) or mappings; what is missing is as CLIPImageProcessor has it.
    ``do_convert_rgb`` does not matter: our images are always RGB. None where nothing in it is about images.

    Raises UserError: anything but bicubic resizing of the shorter side, a central crop of the same size, 1/255 and
    normalisation.
    """
    if isinstance(config, Mapping) and isinstance(config.get("image_processor"), Mapping):
        config = config["image_processor"]
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: expected a mapping, got {type(config).__name__}")
    if "processor_class" in config and not {"image_mean", "crop_size", "size"} & set(config):
        # a processor_config.json of before transformers 5: nothing about images
        return None
    kind = config.get("image_processor_type", config.get("feature_extractor_type", _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        raise UserError(f"{source}: expected CLIP's image processor, got {str(kind)[:80]}")
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if config.get(key, True) is not True:
            raise UserError(f"{source}: {key}: expected true as for CLIP, got {str(config[key])[:80]}")
    if config.get("resample", _BICUBIC) != _BICUBIC:
        raise UserError(f"{source}: resample: expected {_BICUBIC} (bicubic), got {str(config['resample'])[:80]}")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise UserError(f"{source}: rescale_factor: expected 1/255, got {str(factor)[:80]}")
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    if isinstance(size, Mapping):
        if set(size) != {"shortest_edge"}:
            raise UserError(f"{source}: size: expected shortest_edge, got {str(dict(size))[:80]}")
        size = size["shortest_edge"]
    if isinstance(crop, Mapping):
        crop = shapes.checked_square([crop.get("height"), crop.get("width")], f"{source}: crop_size")
    if shapes.checked_size(crop, f"{source}: crop_size") != shapes.checked_size(size, f"{source}: size"):
        raise UserError(f"{source}: crop_size: expected {size} as size has, got {crop}")
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return check_preprocessing({"size": size, "mean": mean, "std": std}, source)


def is_folder(folder: Path) -> bool:
    """Return whether transformers loads a folder. open_clip's configuration may lie beside its own."""
    if not (folder / CONFIG).is_file() or not (folder / open_clip.CONFIG).is_file():
        return (folder / CONFIG).is_file()
    # repositories for both, or for timm and open_clip
    if "model_type" not in read_json(folder / CONFIG):
        return False
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    return has_weights or not any((folder / name).is_file() for name in open_clip.WEIGHTS)


def holds(path: Path) -> bool:
    """Return whether a file of weights lies beside a config.json that is about it."""
    if path.name not in WEIGHTS or not (path.parent / CONFIG).is_file():
        return False
    with contextlib.suppress(UserError):
        return read_json(path.parent / CONFIG).get("model_type") in ("clip", "clip_vision_model")
    return False


def describe_folder(folder: Path, source: str) -> Description:
    """Return what a folder's configurations say. Raises UserError: they are broken, or no CLIP's."""
    config = read_json(folder / CONFIG)
    settings = from_hugging_face_config(config, f"{source}: {CONFIG}")
    preprocessing: Mapping[str, Any] | None = None
    for name in PREPROCESSORS:
        if preprocessing is None and (folder / name).is_file():
            preprocessing = preprocessing_from_hugging_face(read_json(folder / name), f"{source}: {name}")
    if preprocessing is None and (folder / open_clip.CONFIG).is_file():
        # a repository for both libraries
        preprocessing = open_clip.describe_folder(folder, source).preprocessing
    text_heads, no_text = None, ""
    if config.get("model_type") == "clip":
        try:
            text_heads = from_hugging_face_text_config(config, CONFIG).heads
        except UserError as error:
            # what the text tower is does not matter before it is exported
            no_text = str(error)
    check = partial(check_hugging_face_config, config, source=f"{source}: {CONFIG}")
    return Description(settings.heads, settings.quick_gelu, preprocessing, check, text_heads, no_text)


LAYOUT = Layout("huggingface", (CONFIG, *PREPROCESSORS), WEIGHTS, is_folder, holds, describe_folder)
