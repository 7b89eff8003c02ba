"""The shape of a CLIP is read off tensors' shapes or a description, and described.

No file is opened here, and no weight is looked at. Everything that comes from outside is checked, in time proportional
to its length: shapes and configurations may come from anybody.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.names import BLOCK_NAMES, block_and_rest, listed
from pareto_merging.errors import UserError

# of any dimension: products of a few stay exact and cheap
_LARGEST = 2**31 - 1


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
    """A plain CLIP text transformer. Sizes are as in :class:`Architecture`; its activation is the vision tower's."""

    context_length: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    output_dim: int


def from_shapes(
    shapes: Mapping[str, Sequence[int]], *, heads: int | None = None, quick_gelu: bool | None = None
) -> Architecture:
    """Return the vision transformer whose tensors have these shapes.

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
        expected = "one row and those of a square grid of patches"
        raise UserError(f"positional_embedding: expected {expected}, got {positions} rows")
    dim = _shape(sizes, "proj", 2)[1] if "proj" in sizes else None
    layers, mlp_width = _layers(sizes), _shape(sizes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    architecture = Architecture(grid * patch, patch, width, layers, 1, mlp_width, dim, quick_gelu)
    _compare_shapes(sizes, expected_shapes(architecture))
    if heads is None:
        alike = (key for key in _known() if (key.layers, key.width, key.mlp_width) == (layers, width, mlp_width))
        heads = next((key.heads for key in alike), None)
    return replace(architecture, heads=_heads(heads, width))


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return open_clip's name of every tensor of the vision transformer -> its shape."""
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
    """Return the text transformer whose tensors have these shapes. UserError as :func:`from_shapes`.

    Args:
        shapes: open_clip's names of a CLIP, all that are not ``visual.``. heads: default: one for every 64 features, as
            all of open_clip's have.
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
    return TextArchitecture(context, vocabulary, width, layers, _heads(heads, width), mlp_width, dim)


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
    return len({block[0] for block in map(block_and_rest, shapes) if block})


def _block_shapes(layers: int, width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    block: dict[str, tuple[int, ...]] = {}
    for name in sorted(BLOCK_NAMES):
        layer = re.sub(r"[._](weight|bias)$", "", name)
        out = {"attn.in_proj": 3 * width, "mlp.c_fc": mlp_width}.get(layer, width)
        is_matrix = name.endswith("weight") and not layer.startswith("ln_")
        block[name] = (out, mlp_width if layer == "mlp.c_proj" else width) if is_matrix else (out,)
    return {f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def _compare_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    compare_names(shapes, expected, "checkpoint: expected the tensors of a plain CLIP transformer")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{name}: expected shape {list(shape)}, got {list(shapes[name])}")


def compare_names(names: Collection[str], expected: Collection[str], what: str) -> None:
    """Raise UserError unless the names are those that are expected. ``what`` is the beginning of its message."""
    present = set(names)
    for got, others in (("none named", set(expected) - present), ("also", present - set(expected))):
        if others:
            raise UserError(f"{what}, got {got} {listed(others)}")


def _heads(heads: int | None, width: int) -> int:
    if heads is None and width % 64:
        raise UserError(f"heads: expected the number of attention heads for a width of {width}, got none")
    heads = width // 64 if heads is None else heads
    check_heads(heads, width)
    return heads


def check_heads(heads: int, width: int) -> None:
    """Raise UserError unless a width can be divided among so many attention heads."""
    if not _is_size(heads) or width % heads:
        raise UserError(f"heads: expected a number of attention heads that divides the width {width}, got {heads!r}")


def description_of(architecture: Architecture) -> dict[str, Any]:
    """Return plain JSON that :func:`.encoders.build` takes; ``quick_gelu`` None is written as False.

    It is open_clip's model name where this is exactly that model's vision transformer, else the arguments of
    VisionTransformer (``output_dim`` null without a projection).
    """
    quick_gelu = bool(architecture.quick_gelu)
    name = _known().get(replace(architecture, quick_gelu=None))
    if name is not None:
        return {"architecture": name, "quick_gelu": quick_gelu}
    ratio = mlp_ratio_of(architecture.width, architecture.mlp_width)
    arguments = {key: ratio if key == "mlp_ratio" else getattr(architecture, key) for key in _ARGUMENTS}
    return {"arguments": arguments, "quick_gelu": quick_gelu}


_ARGUMENTS = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim")
# what is read of a configuration, and what may stand in it without changing what the encoder computes from images
_EXPRESSED = {
    *(*_ARGUMENTS, "head_width"),
    *("patch_dropout", "pos_embed_type", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
}
# of open_clip's CLIPVisionCfg
VISION_DEFAULTS = {"layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "image_size": 224, "mlp_ratio": 4.0}


def from_description(description: Mapping[str, Any]) -> Architecture:
    """Return the architecture that :func:`description_of` describes, or any that :func:`.encoders.build` takes.

    Raises:
        UserError: no description of an encoder, or one that a plain CLIP cannot express (another pooling, layer scale,
            no ``ln_pre``, a timm model or a ResNet, …): names the setting.
    """
    quick_gelu = description.get("quick_gelu") or False
    if not isinstance(quick_gelu, bool):
        raise UserError(f"encoder: quick_gelu: expected true or false, got {str(quick_gelu)[:80]}")
    if isinstance(description.get("architecture"), str):
        config = encoders.model_config(description["architecture"])
        settings = {**VISION_DEFAULTS, **config["vision_cfg"]}
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
        if key not in _EXPRESSED and value is not None and value is not False and value != plain.get(key):
            raise UserError(f"{source}: expected what a plain CLIP can express, got {key}={str(value)[:80]}")
    sizes = {key: checked_square(settings.get(key), f"{source}: {key}") for key in ("image_size", "patch_size")}
    sizes |= {key: checked_size(settings.get(key), f"{source}: {key}") for key in ("width", "layers")}
    if "heads" in settings:
        heads = checked_size(settings["heads"], f"{source}: heads")
    else:
        heads = sizes["width"] // checked_size(settings.get("head_width"), f"{source}: head_width")
    check_heads(heads, sizes["width"])
    ratio = settings.get("mlp_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio * sizes["width"] <= _LARGEST:
        raise UserError(f"{source}: mlp_ratio: expected a positive number, got {str(ratio)[:80]}")
    mlp_width = checked_size(int(sizes["width"] * ratio), f"{source}: mlp_ratio times width")
    dim = settings["output_dim"]
    dim = None if dim is None else checked_size(dim, f"{source}: output_dim")
    return Architecture(**sizes, heads=heads, mlp_width=mlp_width, output_dim=dim, quick_gelu=quick_gelu)


@functools.cache
def _known() -> dict[Architecture, str]:
    """Return architectures with ``quick_gelu`` None -> the name of open_clip's model."""
    import open_clip

    known: dict[Architecture, str] = {}
    for name in open_clip.list_models():
        # ViT-B-32 and not ViT-B-32-quickgelu or a model with another text tower
        if re.fullmatch(r"ViT-[A-Za-z]+-\d+(-plus|-alt)?(-\d+)?", name):
            try:
                architecture = from_description({"architecture": name})
                known.setdefault(replace(architecture, quick_gelu=None), name)
            except UserError:
                # layer scale and the like
                continue
    return known


def mlp_ratio_of(width: int, mlp_width: int) -> float:
    """Return a ratio that open_clip's int(width * ratio) turns into ``mlp_width`` again, rounding or not."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def checked_size(value: object, what: str) -> int:
    """Return a positive whole number. Raises UserError for any other."""
    if not isinstance(value, int) or not _is_size(value):
        raise UserError(f"{what}: expected a positive whole number, got {str(value)[:80]}")
    return value


def checked_square(value: object, what: str) -> int:
    """Return the side of a square, given as one number or two. Raises UserError for any other."""
    if not isinstance(value, list | tuple):
        return checked_size(value, what)
    if len(value) != 2 or value[0] != value[1]:
        raise UserError(f"{what}: expected a square, got {str(value)[:80]}")
    return checked_size(value[0], what)


def check_towers(architecture: Architecture, text: TextArchitecture) -> None:
    """Raise UserError unless both towers end in the same dimension."""
    dim = architecture.output_dim
    if dim != text.output_dim:
        raise UserError(f"text: expected a projection to {dim} features as the images', got {text.output_dim}")


def check_claims(actual: Architecture, claimed: Architecture) -> None:
    """Raise UserError for the first claim that the tensors contradict. A projection may be left out of them."""
    for key, value in asdict(actual).items():
        other = getattr(claimed, key)
        if value is not None and other is not None and value != other:
            raise UserError(f"expected {key} {value} as the tensors have, got {other} in the description")
