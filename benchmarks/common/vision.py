"""Randomly initialised vision transformers, from the first library that is installed."""

import importlib
from typing import Any

import torch
from torch import nn

from benchmarks.common.towers import TINY, TOWERS, Tower

SOURCES = ("open_clip", "timm", "torchvision")


def vision_transformer(name: str, source: str | None = None) -> tuple[nn.Module, str]:
    """Build a randomly initialised vision tower in eval mode. Return it and the library it comes from.

    Raises:
        ValueError: an unknown name. ImportError: none of the libraries is installed, or not the one asked for.
    """
    known = {tower.name: tower for tower in (*TOWERS, TINY)}
    if name not in known:
        raise ValueError(f"name: expected one of {', '.join(known)}, got {name!r}")
    for library in SOURCES if source is None else (source,):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return _BUILD[library](known[name]).eval(), library
        except ModuleNotFoundError:
            continue
    raise ImportError(f"{name}: expected {' or '.join(SOURCES if source is None else (source,))}, got none")


def _open_clip(tower: Tower) -> Any:
    # the text tower is not built
    return importlib.import_module("open_clip.transformer").VisionTransformer(**tower.arguments)


def _timm(tower: Tower) -> Any:
    sizes = {"img_size": tower.image, "patch_size": tower.patch, "embed_dim": tower.width}
    sizes |= {"depth": tower.blocks, "num_heads": tower.heads, "num_classes": tower.output}
    return importlib.import_module("timm").create_model(tower.timm, pretrained=False, **sizes)


def _torchvision(tower: Tower) -> Any:
    sizes = {"image_size": tower.image, "patch_size": tower.patch, "num_layers": tower.blocks}
    sizes |= {"num_heads": tower.heads, "hidden_dim": tower.width, "mlp_dim": 4 * tower.width}
    module = importlib.import_module("torchvision.models.vision_transformer")
    built: nn.Module = module.VisionTransformer(**sizes, num_classes=tower.output)
    # torchvision's starts at zero, which has no gradient
    nn.init.normal_(built.get_parameter("heads.head.weight"), std=tower.width**-0.5)
    return built


_BUILD = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision}
