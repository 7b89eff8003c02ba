"""Checkpoints by the code that writes the real ones."""

import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pareto_merging.checkpoints.convert import convert_checkpoint


def randomize(module: nn.Module) -> nn.Module:
    """Make every parameter random, at a scale at which activations stay near 1. Biases and norms are too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                # the logit scale
                continue
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + ("norm" in name or "ln_" in name) * name.endswith("weight"))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def copies(parts: Sequence[Any], tasks: int) -> Iterator[str]:
    """Yield ``pretrained``, then ``t1`` … with small noise on the parameters of ``parts``, in place."""
    yield "pretrained"
    parameters = [parameter for part in parts for parameter in part.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    for k in range(1, tasks + 1):
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter, its in zip(parameters, before, strict=True):
                bound = 0.1 * float(its.norm(dtype=torch.float32)) / its.numel() ** 0.5
                noise = torch.empty(its.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(noise.add_(its))
        yield f"t{k}"


def hugging_face_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' CLIPConfig of an open_clip model, with QuickGELU as OpenAI's."""
    vision, text, shared = config["vision_cfg"], config["text_cfg"], {"projection_dim": config["embed_dim"]}

    def tower(width: int, layers: int, heads: int, **more: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**shared, "hidden_act": "quick_gelu", **sizes, "num_attention_heads": heads, **more}

    images = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    words = {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
    words |= {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    return {
        **shared,
        "vision_config": tower(vision["width"], vision["layers"], vision["width"] // 64, **images),
        "text_config": tower(text["width"], text["layers"], text["heads"], **words),
    }


def write_hugging_face(
    config: Mapping[str, Any], folder: Path, tasks: int, *, shard: str = "50GB", bin: bool = False, vision: bool = False
) -> list[Path]:
    """Write folders as transformers does, a whole CLIPModel each.

    ``shard``: the largest file. ``bin``: pytorch_model.bin, as version 4. ``vision``: the fine-tuned ones a
    CLIPVisionModel.
    """
    import transformers

    size = config["vision_cfg"]["image_size"]
    model: Any = randomize(transformers.CLIPModel(transformers.CLIPConfig(**hugging_face_config(config))))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    parts = [model.vision_model] if vision else [model.vision_model, model.visual_projection]
    paths = []
    for name in copies(parts, tasks):
        path, written = folder / name, model
        if vision and name != "pretrained":
            with torch.device("meta"):
                written = transformers.CLIPVisionModel(model.config.vision_config)
            state = {key.removeprefix("vision_model."): value for key, value in model.vision_model.state_dict().items()}
            written.load_state_dict(state, assign=True, strict=False)
        if bin:
            # transformers 5 itself writes safetensors alone
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(path)
            torch.save(model.state_dict(), path / "pytorch_model.bin")
        else:
            written.save_pretrained(path, max_shard_size=shard)
        images.save_pretrained(path)
        paths.append(path)
    return paths


Save = Callable[[nn.Module, Path, Mapping[str, Any]], None]


def write_open_clip(
    config: Mapping[str, Any], folder: Path, tasks: int, *, save: Save, suffix: str = ".pt", quick_gelu: bool = False
) -> list[Path]:
    """Write open_clip's whole CLIP K + 1 times, as ``save(model, path, config)`` does."""
    import open_clip

    model, paths = randomize(open_clip.CLIP(**config, quick_gelu=quick_gelu)), []
    for name in copies([model.visual], tasks):
        paths.append(folder / f"{name}{suffix}")
        save(model, paths[-1], config)
    return paths


def save_pt(model: nn.Module, path: Path, config: Mapping[str, Any], *, legacy: bool = False) -> None:
    """Save a state dict by torch.save; ``legacy``: in its format before 1.6."""
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)


def save_safetensors(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Save a state dict as open_clip's training and hub scripts do."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)


def save_folder(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Save what ``local-dir:`` and the hub have of an open_clip model."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.push_to_hf_hub import save_config_for_hf

    path.mkdir(parents=True)
    visual: Any = model.visual
    visual.image_mean, visual.image_std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    visual.preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
    save_config_for_hf(model, path / "open_clip_config.json", dict(config))
    save_safetensors(model, path / "open_clip_model.safetensors", config)


def save_torchscript(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Save a traced CLIP as OpenAI's: float16 but for norms and embeddings, sizes as tensors."""
    from open_clip.model import convert_weights_to_lp

    size, context = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    sizes = {"input_resolution": size, "context_length": context, "vocab_size": config["text_cfg"]["vocab_size"]}
    if "input_resolution" not in dict(model.named_buffers()):
        convert_weights_to_lp(model, torch.float16)
        mask = model.attn_mask
        # no part of OpenAI's state dict
        del model.attn_mask, model.context_length, model.vocab_size
        model.attn_mask = mask
        for name, value in sizes.items():
            model.register_buffer(name, torch.tensor(value))
    images, tokens = torch.randn(1, 3, size, size).half(), torch.ones(1, context, dtype=torch.long)
    inputs = {"forward": (images, tokens), "encode_image": (images,), "encode_text": (tokens,)}
    with torch.no_grad():
        torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), str(path))


class ImageEncoder(nn.Module):
    """src/modeling.py of github.com/mlfoundations/task_vectors: what their checkpoints are pickles of."""

    __module__ = "src.modeling"

    def __init__(self, model: nn.Module, train_preprocess: Any, val_preprocess: Any) -> None:
        super().__init__()
        self.model, self.train_preprocess, self.val_preprocess = model, train_preprocess, val_preprocess
        self.cache_dir = None
        if hasattr(self.model, "transformer"):
            delattr(self.model, "transformer")


def save_task_vectors(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Pickle a whole ImageEncoder around today's open_clip, without the blocks of its text tower."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=config["vision_cfg"]["image_size"])
    train, evaluate = (image_transform_v2(settings, is_train=is_train) for is_train in (True, False))
    module: Any = types.ModuleType("src.modeling")
    module.ImageEncoder = ImageEncoder
    # pickle looks for the class where it says that it is
    sys.modules |= {"src": types.ModuleType("src"), "src.modeling": module}
    try:
        torch.save(ImageEncoder(model, train, evaluate), path)
    finally:
        del sys.modules["src"], sys.modules["src.modeling"]


def save_converted(model: nn.Module, path: Path, config: Mapping[str, Any]) -> None:
    """Save what ``pareto-merging convert`` makes of an open_clip .pt."""
    source = path.with_suffix(".pt")
    save_pt(model, source, config)
    convert_checkpoint(source, path, progress=False)
    source.unlink()


# name of a format -> its writer, which is given open_clip's configuration, a folder and K
FORMATS: dict[str, Callable[[Mapping[str, Any], Path, int], list[Path]]] = {
    "huggingface": write_hugging_face,
    "huggingface-sharded": partial(write_hugging_face, shard="200MB"),
    "huggingface-bin": partial(write_hugging_face, bin=True),
    "huggingface-vision": partial(write_hugging_face, vision=True),
    "open_clip-pt": partial(write_open_clip, save=save_pt),
    "open_clip-legacy": partial(write_open_clip, save=partial(save_pt, legacy=True)),
    "open_clip-safetensors": partial(write_open_clip, save=save_safetensors, suffix=".safetensors"),
    "open_clip-folder": partial(write_open_clip, save=save_folder, suffix=""),
    "torchscript": partial(write_open_clip, save=save_torchscript, quick_gelu=True),
    "task-vectors": partial(write_open_clip, save=save_task_vectors, quick_gelu=True),
    "converted": partial(write_open_clip, save=save_converted, suffix=".safetensors"),
}
NO_TEXT_TOWER = ("task-vectors", "converted")
