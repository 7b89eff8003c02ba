"""One small CLIP, and a way to export it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints.export import export_hugging_face, export_open_clip

PREPROCESSING = {"size": 12, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
EXPORTS: list[Callable[..., Path]] = [export_hugging_face, export_open_clip]


def encoder(quick_gelu: bool = True) -> dict[str, Any]:
    sizes = {"image_size": 12, "patch_size": 4, "width": 32, "layers": 2, "heads": 4}
    return {"arguments": {**sizes, "mlp_ratio": 1.5, "output_dim": 8}, "quick_gelu": quick_gelu}


def small_clip(quick_gelu: bool = True) -> Any:
    """open_clip's CLIP with sizes that are nobody's default, every parameter random: no bias is zero."""
    import open_clip

    vision_cfg = {"image_size": 12, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 1.5}
    text_cfg = {"context_length": 7, "vocab_size": 99, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 2.0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(8, vision_cfg, text_cfg, quick_gelu=quick_gelu).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def parts(clip: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    vision = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    return vision, {name: t for name, t in state.items() if not name.startswith("visual.")}
