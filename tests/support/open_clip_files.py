"""The small CLIP as open_clip and OpenAI write it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.clip import CONTEXT, IMAGE, MEAN, MODEL_CONFIG, STD, VOCABULARY, clip, images, tokens, tower


def open_clip_file(
    path: Path,
    seed: int = 0,
    *,
    part: str = "clip",
    training: bool = False,
    legacy: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A state dict of open_clip; ``path`` says which kind: .safetensors, or anything else for ``torch.save``.

    Args:
        part: clip for all of it, visual for the vision tower alone with its own names.
        training: as open_clip's training script saves: in "state_dict", each name with "module." before it, beside
            the epoch and the optimizer's state.
        legacy: the format of torch.save before version 1.6.
    """
    model = (clip(seed) if part == "clip" else tower(seed)).to(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
        return path
    content: Mapping[str, Any] = model.state_dict()
    if training:
        weights = {f"module.{name}": tensor.clone() for name, tensor in content.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        sum(parameter.sum() for parameter in model.parameters()).backward()
        optimizer.step()
        content = {
            "epoch": 32,
            "name": "a run",
            "state_dict": weights,
            "optimizer": optimizer.state_dict(),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def open_clip_folder(folder: Path, seed: int = 0, quick_gelu: bool = True, *, preprocess: bool = True) -> Path:
    """What ``local-dir:`` and the hub have of an open_clip model: open_clip_config.json and the weights.

    Args:
        preprocess: with preprocess_cfg, that has :data:`MEAN` and :data:`STD`.
    """
    from open_clip.push_to_hf_hub import save_config_for_hf

    folder.mkdir(parents=True, exist_ok=True)
    model = clip(seed, quick_gelu)
    model.visual.image_mean, model.visual.image_std = MEAN, STD
    model.visual.preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {**MODEL_CONFIG, **({"quick_gelu": True} if quick_gelu else {})}
    path = folder / "open_clip_config.json"
    save_config_for_hf(model, path, config)
    if not preprocess:
        path.write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
    open_clip_file(folder / "open_clip_model.safetensors", seed)
    return folder


def torchscript_archive(path: Path, seed: int = 0) -> Path:
    """A whole CLIP as OpenAI published theirs: traced, QuickGELU, float16 but for norms and embeddings.

    The attributes input_resolution, context_length and vocab_size are tensors beside the weights, as in OpenAI's.
    """
    from open_clip.model import convert_weights_to_lp

    model = clip(seed, quick_gelu=True)
    convert_weights_to_lp(model, torch.float16)
    mask = model.attn_mask
    del model.attn_mask, model.context_length, model.vocab_size
    # no part of OpenAI's state dict
    model.attn_mask = mask
    for name, value in (("input_resolution", IMAGE), ("context_length", CONTEXT), ("vocab_size", VOCABULARY)):
        model.register_buffer(name, torch.tensor(value))
    inputs = images(2).half(), tokens(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        traced = torch.jit.trace_module(
            model,
            {"forward": inputs, "encode_image": inputs[:1], "encode_text": inputs[1:]},
            check_trace=False,
        )
    torch.jit.save(traced, str(path))
    return path
