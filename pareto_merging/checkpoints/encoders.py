"""Vision encoders of open_clip by model name, or by the arguments of its VisionTransformer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.errors import UserError


def describe(architecture: str, quick_gelu: bool = False) -> dict[str, Any]:
    """Return what :func:`build` needs of an open_clip model name or a JSON file of arguments.

    Raises:
        UserError: an unknown name (close ones are listed) or an unreadable file.
    """
    if not architecture.endswith(".json"):
        model_config(architecture)
        return {"architecture": architecture, "quick_gelu": quick_gelu}
    path = Path(architecture)
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"expected a JSON file of VisionTransformer's arguments, got {error.strerror}"
        raise UserError(f"{path}: {what}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{path}: expected a mapping of VisionTransformer's arguments, got {type(arguments).__name__}")
    return {"arguments": arguments, "quick_gelu": quick_gelu}


def build(description: Mapping[str, Any]) -> nn.Module:
    """Build the encoder of :func:`describe` with random weights, in eval mode.

    It maps images [n, 3, H, W] to features [n, dim].

    Raises UserError: the description names no architecture, or arguments that VisionTransformer does not take.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower
    from open_clip.transformer import QuickGELU, VisionTransformer

    quick_gelu = has_quick_gelu(description)
    if "architecture" in description:
        config = model_config(description["architecture"])
        vision = CLIPVisionCfg(**config["vision_cfg"])
        tower: nn.Module = _build_vision_tower(config["embed_dim"], vision, quick_gelu=quick_gelu)
        return tower.eval()
    if "arguments" not in description:
        raise UserError(f"encoder: expected architecture or arguments, got {sorted(description)}")
    activation = {"act_layer": QuickGELU} if quick_gelu else {}
    arguments = _checked(description["arguments"])
    # a vision model without a projection: its features are as wide as its blocks
    is_projected = arguments.get("output_dim", 512) is not None
    if not is_projected:
        arguments["output_dim"] = arguments.get("width")
    try:
        model: nn.Module = VisionTransformer(**arguments, **activation)
        if not is_projected:
            model.register_parameter("proj", None)
    except Exception as error:
        # whatever is wrong with the arguments, open_clip finds it somewhere inside
        what = str(error) or type(error).__name__
        raise UserError(f"encoder: expected arguments of open_clip's VisionTransformer, got {what}") from error
    return model.eval()


# beyond any model's: a description may come from a stranger's file
_MOST = {"layers": 1024, "width": 2**16, "heads": 2**12, "image_size": 2**14, "patch_size": 2**12, "output_dim": 2**16}


def _checked(arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, Mapping):
        raise UserError(f"encoder: expected a mapping of arguments, got {type(arguments).__name__}")
    for name, most in _MOST.items():
        for value in arguments[name] if isinstance(arguments.get(name), list | tuple) else [arguments.get(name)]:
            if isinstance(value, int | float) and not 0 < value <= most:
                raise UserError(f"encoder: {name}: expected a number from 1 to {most}, got {str(value)[:40]}")
    ratio = arguments.get("mlp_ratio", 4.0)
    if isinstance(ratio, int | float) and not 0 < ratio <= 64:
        raise UserError(f"encoder: mlp_ratio: expected a number up to 64, got {str(ratio)[:40]}")
    return dict(arguments)


def has_quick_gelu(description: Mapping[str, Any]) -> bool:
    """Return whether an encoder has QuickGELU, by its description or open_clip's model of its name."""
    named = "architecture" in description and model_config(description["architecture"]).get("quick_gelu", False)
    return bool(description.get("quick_gelu") or named)


def default_preprocessing(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``size``, ``mean`` and ``std`` of three channels: how CLIP makes an encoder's images.

    Resized to ``size`` pixels along the shorter side (bicubic), cropped to the middle, 0..1, normalised.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return {"size": image_size(description), "mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}


def image_size(description: Mapping[str, Any]) -> int:
    """Return the side in pixels of the square images that an encoder takes."""
    if "architecture" in description:
        size = model_config(description["architecture"])["vision_cfg"].get("image_size", 224)
    else:
        size = description["arguments"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def model_config(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model. Raises UserError, with names that are near, for an unknown one."""
    import difflib

    import open_clip

    # other schemas (hf-hub:…) would go to the network
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None or "vision_cfg" not in config:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        got = repr(name[:80]) + (f"; near: {', '.join(close)}" if close else "")
        raise UserError(f"encoder: expected an open_clip model name, got {got}")
    return dict(config)
