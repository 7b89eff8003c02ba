"""The shape of a CLIP: read off tensors' shapes, and told to and by open_clip, Hugging Face and ourselves.

No file is opened here, and no weight is looked at. Everything that comes from outside is checked, in time proportional
to its length: shapes and configurations may come from anybody.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pareto_merging.checkpoints.names import BLOCK_NAMES, block_and_rest, listed
from pareto_merging.errors import UserError

_LARGEST = 2**31 - 1  # of any dimension: products of a few stay exact and cheap
_EPS = 1e-5  # of every layer norm, in open_clip and in transformers


@dataclass(frozen=True)
class Architecture:
    """A plain CLIP vision transformer.

    Attributes:
        image_size, patch_size: in pixels, both square. width, mlp_width: features of the stream and inside the MLPs.
        layers, heads: blocks, and attention heads of each. output_dim: of the projection; None without one.
        quick_gelu: x·sigmoid(1.702x) instead of GELU; None where nothing has said which.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    output_dim: int | None
    quick_gelu: bool | None


@dataclass(frozen=True)
class TextArchitecture:
    """A plain CLIP text transformer: sizes as in :class:`Architecture`; its activation is the vision tower's."""

    context_length: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    output_dim: int


class HuggingFaceSettings(NamedTuple):
    """What a config.json says that no shape does."""

    heads: int
    quick_gelu: bool


# --- from and to shapes


def from_shapes(
    shapes: Mapping[str, Sequence[int]], *, heads: int | None = None, quick_gelu: bool | None = None
) -> Architecture:
    """The vision transformer whose tensors have these shapes.

    Args:
        shapes: open_clip's vision names (without ``visual.``) -> shapes, all of them.
        heads: attention heads, which no shape shows. Default: those of open_clip's model of the same depth and
            widths (ViT-H-14 has heads of 80 features), else one for every 64 features.

    Raises:
        UserError: missing, extra or misshapen tensors, or heads that do not divide the width.
    """
    sizes = _checked_shapes(shapes)
    conv = _shape(sizes, "conv1.weight", 4)
    width, channels, patch, patch_width = conv
    if channels != 3 or patch != patch_width:
        raise UserError(f"conv1.weight: expected shape [width, 3, patch, patch], got {list(conv)}")
    positions = _shape(sizes, "positional_embedding", 2)[0]
    grid = math.isqrt(positions - 1)
    if grid == 0 or grid**2 != positions - 1:
        raise UserError(
            f"positional_embedding: expected one row and those of a square grid of patches, got {positions} rows"
        )
    dim = _shape(sizes, "proj", 2)[1] if "proj" in sizes else None
    layers, mlp_width = _layers(sizes), _shape(sizes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    found = Architecture(grid * patch, patch, width, layers, 1, mlp_width, dim, quick_gelu)
    _compare_shapes(sizes, expected_shapes(found))
    if heads is None:
        known = (key.heads for key in _known() if _depth_and_widths(key) == _depth_and_widths(found))
        heads = next(known, None) or _default_heads(width)
    _check_heads(heads, width)
    return replace(found, heads=heads)


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the vision transformer in open_clip's names -> its shape."""
    width, patch = architecture.width, architecture.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": ((architecture.image_size // patch) ** 2 + 1, width),
        "conv1.weight": (width, 3, patch, patch),
        **{f"{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **_block_shapes(architecture.layers, width, architecture.mlp_width),
    }
    if architecture.output_dim is not None:
        shapes["proj"] = (width, architecture.output_dim)
    return shapes


def text_from_shapes(shapes: Mapping[str, Sequence[int]], *, heads: int | None = None) -> TextArchitecture:
    """The text transformer whose tensors (open_clip CLIP's names, all that are not ``visual.``) have these shapes.

    Args:
        heads: default: one for every 64 features, as all of open_clip's have.

    Raises:
        UserError: as :func:`from_shapes`.
    """
    sizes = _checked_shapes(shapes)
    vocabulary, width = _shape(sizes, "token_embedding.weight", 2)
    context, dim = _shape(sizes, "positional_embedding", 2)[0], _shape(sizes, "text_projection", 2)[1]
    layers, mlp_width = _layers(sizes), _shape(sizes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    expected = {
        "token_embedding.weight": (vocabulary, width),
        "positional_embedding": (context, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, dim),
        # some of open_clip's models have one dimension here
        "logit_scale": (1,) if sizes.get("logit_scale") == (1,) else (),
        **_block_shapes(layers, width, mlp_width),
    }
    _compare_shapes(sizes, expected)
    heads = _default_heads(width) if heads is None else heads
    _check_heads(heads, width)
    return TextArchitecture(context, vocabulary, width, layers, heads, mlp_width, dim)


def _checked_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(shape) > 4 or not all(_is_size(size) for size in shape):
            raise UserError(f"{listed([name])}: expected a shape of up to four sizes, got {str(list(shape[:5]))[:80]}")
        sizes[name] = tuple(shape)
    return sizes


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"checkpoint: expected the tensors of a plain CLIP, got none named {name}")
    if len(shapes[name]) != dims:
        raise UserError(f"{name}: expected {dims} dimensions, got shape {list(shapes[name])}")
    return shapes[name]


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({found[0] for found in map(block_and_rest, shapes) if found})


def _block_shapes(layers: int, width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    out_features = {"attn.in_proj": 3 * width, "mlp.c_fc": mlp_width}
    block: dict[str, tuple[int, ...]] = {}
    for name in sorted(BLOCK_NAMES):
        layer, kind = re.sub(r"[._](weight|bias)$", "", name), name.endswith("weight")
        out = out_features.get(layer, width)
        is_matrix = kind and not layer.startswith("ln_")
        block[name] = (out, mlp_width if layer == "mlp.c_proj" else width) if is_matrix else (out,)
    return {f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def _compare_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing:
        raise UserError(
            f"checkpoint: expected the tensors of a plain CLIP transformer, got none named {listed(missing)}"
        )
    if extra:
        raise UserError(f"checkpoint: expected the tensors of a plain CLIP transformer, got also {listed(extra)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{name}: expected shape {list(shape)}, got {list(shapes[name])}")


def _default_heads(width: int) -> int:
    if width % 64:
        raise UserError(f"heads: expected the number of attention heads for a width of {width}, got none")
    return width // 64


def _check_heads(heads: int, width: int) -> None:
    if not _is_size(heads) or width % heads:
        raise UserError(f"heads: expected a number of attention heads that divides the width {width}, got {heads!r}")


# --- from and to our descriptions (encoders.build)


def describe(architecture: Architecture) -> dict[str, Any]:
    """Plain JSON for :func:`.encoders.build`: open_clip's model name where it is exactly that model's
    vision transformer, else the arguments of VisionTransformer (``output_dim`` null without a projection).

    ``quick_gelu`` None is written as False.
    """
    quick_gelu = bool(architecture.quick_gelu)
    name = _known().get(_without_gelu(architecture))
    if name is not None:
        return {"architecture": name, "quick_gelu": quick_gelu}
    arguments = {
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "width": architecture.width,
        "layers": architecture.layers,
        "heads": architecture.heads,
        "mlp_ratio": _mlp_ratio(architecture.width, architecture.mlp_width),
        "output_dim": architecture.output_dim,
    }
    return {"arguments": arguments, "quick_gelu": quick_gelu}


# what may stand in a configuration without changing what the encoder computes from images
_HARMLESS = {
    *("patch_dropout", "pos_embed_type", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
}
_OPEN_CLIP_VISION_DEFAULTS = {
    "layers": 12,
    "width": 768,
    "patch_size": 16,
    "head_width": 64,
    "image_size": 224,
    "mlp_ratio": 4.0,
}
_SIZES = {"image_size", "patch_size", "width", "layers", "heads", "head_width", "mlp_ratio", "output_dim"}


def from_description(description: Mapping[str, Any]) -> Architecture:
    """The inverse of :func:`describe`, for any description that :func:`.encoders.build` takes.

    Raises:
        UserError: no description of an encoder, or one that a plain CLIP cannot express (another pooling, layer scale,
            no ``ln_pre``, a timm model or a ResNet, …): names the setting.
    """
    from pareto_merging.checkpoints import encoders

    quick_gelu = description.get("quick_gelu") or False
    if not isinstance(quick_gelu, bool):
        raise UserError(f"encoder: quick_gelu: expected true or false, got {str(quick_gelu)[:80]}")
    if isinstance(description.get("architecture"), str):
        config = encoders.model_config(description["architecture"])
        settings = {**_OPEN_CLIP_VISION_DEFAULTS, **config["vision_cfg"]}
        quick_gelu = quick_gelu or bool(config.get("quick_gelu", False))
        settings["output_dim"] = config["embed_dim"]
        source = f"encoder {description['architecture']}"
    elif isinstance(description.get("arguments"), Mapping):
        settings = {"output_dim": 512, **description["arguments"]}
        source = "encoder"
    else:
        raise UserError(f"encoder: expected architecture or arguments, got {listed(map(str, description))}")
    plain = {"pool_type": "tok", "block_type": "default"}
    for key, value in settings.items():
        if key not in _SIZES | _HARMLESS and value is not None and value is not False and value != plain.get(key):
            raise UserError(f"{source}: expected what a plain CLIP can express, got {key}={str(value)[:80]}")
    sizes = {key: _square(settings.get(key), f"{source}: {key}") for key in ("image_size", "patch_size")}
    sizes |= {key: _size(settings.get(key), f"{source}: {key}") for key in ("width", "layers")}
    if "heads" in settings:
        heads = _size(settings["heads"], f"{source}: heads")
    else:
        heads = sizes["width"] // _size(settings.get("head_width"), f"{source}: head_width")
    _check_heads(heads, sizes["width"])
    ratio = settings.get("mlp_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio * sizes["width"] <= _LARGEST:
        raise UserError(f"{source}: mlp_ratio: expected a positive number, got {str(ratio)[:80]}")
    mlp_width = _size(int(sizes["width"] * ratio), f"{source}: mlp_ratio times width")
    dim = settings["output_dim"]
    dim = None if dim is None else _size(dim, f"{source}: output_dim")
    return Architecture(**sizes, heads=heads, mlp_width=mlp_width, output_dim=dim, quick_gelu=quick_gelu)


@functools.lru_cache(maxsize=1)
def _known() -> dict[Architecture, str]:
    """Architectures with ``quick_gelu`` None -> the name of open_clip's model."""
    import open_clip

    known: dict[Architecture, str] = {}
    for name in open_clip.list_models():
        # ViT-B-32 and not ViT-B-32-quickgelu or a model with another text tower
        if re.fullmatch(r"ViT-[A-Za-z]+-\d+(-plus|-alt)?(-\d+)?", name):
            try:
                known.setdefault(_without_gelu(from_description({"architecture": name})), name)
            except UserError:
                continue  # layer scale and the like
    return known


def _without_gelu(architecture: Architecture) -> Architecture:
    return replace(architecture, quick_gelu=None)


def _depth_and_widths(architecture: Architecture) -> tuple[int, int, int]:
    return architecture.layers, architecture.width, architecture.mlp_width


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """A ratio that open_clip's int(width * ratio) turns into ``mlp_width`` again, rounding or not."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def _size(value: object, what: str) -> int:
    if not isinstance(value, int) or not _is_size(value):
        raise UserError(f"{what}: expected a positive whole number, got {str(value)[:80]}")
    return value


def _square(value: object, what: str) -> int:
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise UserError(f"{what}: expected a square, got {str(value)[:80]}")
        value = value[0]
    return _size(value, what)


# --- from and to Hugging Face's config.json

_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
}
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
}


def from_hugging_face_config(config: Mapping[str, Any], source: str = "config.json") -> HuggingFaceSettings:
    """The vision tower's heads and activation from a config.json, as transformers reads it (keys may be missing).

    Args:
        config: of ``model_type`` clip_vision_model, or clip (with ``vision_config`` inside). source: for messages.

    Raises:
        UserError: another kind of model, activation or layer norm, or values of the wrong type.
    """
    return _settings(_vision_config(config, source), source)


def from_hugging_face_text_config(config: Mapping[str, Any], source: str = "config.json") -> HuggingFaceSettings:
    """The text tower's heads and activation from a config.json of ``model_type`` clip.

    Raises:
        UserError: as :func:`from_hugging_face_config`, or an activation other than the vision tower's (open_clip's CLIP
            has one for both), or an end of text that is not the last of the vocabulary.
    """
    vision = from_hugging_face_config(config, source)
    if config["model_type"] != "clip":
        raise UserError(f"{source}: expected model_type clip for a text tower, got {config['model_type']}")
    inner = _inner(config, "text_config", _TEXT_DEFAULTS, source)
    text = _settings(inner, f"{source}: text_config")
    # where transformers takes the features: at the largest token (2, by its own convention) or at this one
    last = _size(inner["vocab_size"], f"{source}: text_config: vocab_size") - 1
    if inner["eos_token_id"] not in (2, last):
        raise UserError(
            f"{source}: text_config: eos_token_id: expected {last}, the last token, whose features open_clip takes, "
            f"got {str(inner['eos_token_id'])[:80]}"
        )
    if text.quick_gelu != vision.quick_gelu:
        raise UserError(f"{source}: expected one hidden_act for both towers, got two")
    return text


def check_hugging_face_config(config: Mapping[str, Any], architecture: Architecture, source: str) -> None:
    """Compare what a config.json claims of the vision tower with what the tensors are.

    Raises:
        UserError: names the first claim that differs, or as :func:`from_hugging_face_config`.
    """
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
    for key, found in claims.items():
        if _size(vision[key], f"{source}: {key}") != found:
            raise UserError(f"{source}: {key}: expected {found} as the tensors have, got {vision[key]}")
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
    heads = _size(config["num_attention_heads"], f"{source}: num_attention_heads")
    _check_heads(heads, _size(config["hidden_size"], f"{source}: hidden_size"))
    activation, eps, channels = config["hidden_act"], config["layer_norm_eps"], config.get("num_channels", 3)
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{source}: hidden_act: expected quick_gelu or gelu, got {str(activation)[:80]!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not math.isclose(eps, _EPS, rel_tol=1e-3):
        raise UserError(f"{source}: layer_norm_eps: expected {_EPS} as open_clip has, got {str(eps)[:80]}")
    if channels != 3:
        raise UserError(f"{source}: num_channels: expected 3, got {str(channels)[:80]}")
    return HuggingFaceSettings(heads, activation == "quick_gelu")


def hugging_face_vision_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a CLIPVisionModelWithProjection (a CLIPVisionModel without a projection) of this dtype."""
    kind = "CLIPVisionModel" if architecture.output_dim is None else "CLIPVisionModelWithProjection"
    return {
        "architectures": [kind],
        "model_type": "clip_vision_model",
        "hidden_size": architecture.width,
        "intermediate_size": architecture.mlp_width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_channels": 3,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "projection_dim": architecture.width if architecture.output_dim is None else architecture.output_dim,
        "hidden_act": "quick_gelu" if architecture.quick_gelu else "gelu",
        "layer_norm_eps": _EPS,
        "attention_dropout": 0.0,
        **_dtype_keys(dtype),
    }


def hugging_face_text_config(text: TextArchitecture, quick_gelu: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The ``text_config`` of a CLIPModel."""
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
    """The config.json of a whole CLIPModel. Raises UserError if the two towers do not end in the same dimension."""
    _check_towers(architecture, text)
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


def _check_towers(architecture: Architecture, text: TextArchitecture) -> None:
    if architecture.output_dim != text.output_dim:
        raise UserError(
            f"text: expected a projection to {architecture.output_dim} features as the images', got {text.output_dim}"
        )


# --- to open_clip's open_clip_config.json


def open_clip_model_config(architecture: Architecture, text: TextArchitecture | None = None) -> dict[str, Any]:
    """The ``model_cfg`` of an open_clip_config.json.

    Args:
        text: None where there is no text tower: open_clip then builds the smallest one, with random weights.

    Raises:
        UserError: no projection (open_clip's CLIP has one), or towers that do not end in the same dimension.
    """
    if architecture.output_dim is None:
        raise UserError("encoder: expected a projection for open_clip, got none")
    if text is None:
        text = TextArchitecture(77, 49408, 64, 1, 1, 64, architecture.output_dim)
    _check_towers(architecture, text)
    return {
        "embed_dim": architecture.output_dim,
        "quick_gelu": bool(architecture.quick_gelu),
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": architecture.width,
            "layers": architecture.layers,
            "head_width": architecture.width // architecture.heads,
            "mlp_ratio": _mlp_ratio(architecture.width, architecture.mlp_width),
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "layers": text.layers,
            "heads": text.heads,
            "mlp_ratio": _mlp_ratio(text.width, text.mlp_width),
        },
    }


def from_open_clip_config(config: Mapping[str, Any], source: str = "open_clip_config.json") -> Architecture:
    """The vision transformer that an open_clip_config.json describes.

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
    settings = {**_OPEN_CLIP_VISION_DEFAULTS, **vision, "output_dim": model.get("embed_dim")}
    return from_description({"arguments": settings, "quick_gelu": quick_gelu})


# --- preprocessing: {"size", "mean", "std"} as encoders.default_preprocessing has it

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL's number
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


def hugging_face_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json of a CLIPImageProcessor. Raises UserError if ``preprocessing`` is not ours."""
    size, mean, std = _checked_preprocessing(preprocessing, "preprocessing")
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
    """``size``, ``mean`` and ``std`` of a preprocessor_config.json, or of a processor_config.json that holds one.

    Sizes may be numbers (before transformers 4.23) or mappings; what is missing is as CLIPImageProcessor has it.
    ``do_convert_rgb`` does not matter: our images are always RGB. None where nothing in it is about images.

    Raises:
        UserError: anything but bicubic resizing of the shorter side, a central crop of the same size, 1/255 and
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
        crop = _square([crop.get("height"), crop.get("width")], f"{source}: crop_size")
    if _size(crop, f"{source}: crop_size") != _size(size, f"{source}: size"):
        raise UserError(f"{source}: crop_size: expected {size} as size has, got {crop}")
    found = {"size": size, "mean": config.get("image_mean", _CLIP_MEAN), "std": config.get("image_std", _CLIP_STD)}
    return dict(zip(found, _checked_preprocessing(found, source), strict=True))


def open_clip_preprocessing(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The ``preprocess_cfg`` of an open_clip_config.json. Raises UserError if ``preprocessing`` is not ours."""
    size, mean, std = _checked_preprocessing(preprocessing, "preprocessing")
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
    """``size``, ``mean`` and ``std`` of a ``preprocess_cfg``.

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
    found = {
        "size": image_size,
        "mean": _CLIP_MEAN if mean is None else mean,
        "std": _CLIP_STD if std is None else std,
    }
    return dict(zip(found, _checked_preprocessing(found, source), strict=True))


def check_preprocessing(preprocessing: Mapping[str, Any], source: str = "preprocessing") -> dict[str, Any]:
    """``size``, ``mean`` and ``std`` and nothing else. Raises UserError if ``preprocessing`` is not ours."""
    size, mean, std = _checked_preprocessing(preprocessing, source)
    return {"size": size, "mean": mean, "std": std}


def _checked_preprocessing(preprocessing: Mapping[str, Any], source: str) -> tuple[int, list[float], list[float]]:
    size = _size(preprocessing.get("size"), f"{source}: size")
    values: list[list[float]] = []
    for key in ("mean", "std"):
        given = preprocessing.get(key)
        given = list(given) if isinstance(given, list | tuple) else []
        is_valid = len(given) == 3 and all(
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6 for value in given
        )
        if not is_valid or (key == "std" and min(given) <= 0):
            raise UserError(
                f"{source}: {key}: expected a {'positive ' if key == 'std' else ''}number for each of three channels, "
                f"got {str(preprocessing.get(key))[:80]}"
            )
        values.append([float(value) for value in given])
    return size, values[0], values[1]
