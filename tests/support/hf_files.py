"""The small CLIP as transformers writes it, also version 4, and as a hub's cache has it."""

import hashlib
import json
from pathlib import Path

import torch
from support.clip import (
    CONTEXT,
    EMBED,
    HEADS,
    IMAGE,
    LAYERS,
    MEAN,
    PATCH,
    STD,
    TEXT_HEADS,
    TEXT_LAYERS,
    TEXT_WIDTH,
    VOCABULARY,
    WIDTH,
    clip,
)
from torch import Tensor, nn

# the commit in a fake hub cache
REVISION = "0123456789abcdef0123456789abcdef01234567"


def huggingface_state(seed: int = 0) -> dict[str, Tensor]:
    """The weights of :func:`clip` under the names of transformers' CLIPModel: q, k, v apart, projections transposed."""
    state = clip(seed).state_dict()
    converted = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    norms = {
        # transformers' own spelling
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            converted[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for ours, theirs, layers in (("visual.", "vision_model", LAYERS), ("", "text_model", TEXT_LAYERS)):
        for layer in range(layers):
            block, other = f"{ours}transformer.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                for a, b in parts.items():
                    converted[f"{other}.{b}.{kind}"] = state[f"{block}.{a}.{kind}"]
                for letter, third in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    converted[f"{other}.self_attn.{letter}_proj.{kind}"] = third
    return {name: tensor.clone().contiguous() for name, tensor in converted.items()}


def huggingface_model(seed: int = 0, quick_gelu: bool = True, *, kind: str = "vision_with_projection") -> nn.Module:
    """transformers' model with the weights of :func:`clip`; kind: vision, vision_with_projection or clip."""
    import transformers

    activation = "quick_gelu" if quick_gelu else "gelu"
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": EMBED,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "hidden_act": activation,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "projection_dim": EMBED,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "max_position_embeddings": CONTEXT,
        "hidden_act": activation,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        if kind == "clip":
            config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBED)
            model = transformers.CLIPModel(config)
        elif kind == "vision_with_projection":
            model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
        elif kind == "vision":
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
        else:
            raise ValueError(f"kind: expected vision, vision_with_projection or clip, got {kind!r}")
    state = huggingface_state(seed)
    if kind == "vision":
        # transformers 5 has no vision_model inside CLIPVisionModel
        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model.eval()


def huggingface_folder(
    folder: Path,
    seed: int = 0,
    quick_gelu: bool = True,
    *,
    kind: str = "vision",
    transformers4: bool = False,
    weights: str = "safetensors",
    shards: bool = False,
    position_ids: bool = False,
    preprocessor: bool = True,
    processor: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """What ``save_pretrained`` leaves in ``folder``.

    Args:
        kind: vision (no projection, as the fine-tuned models on the hub), vision_with_projection or clip.
        transformers4: names, config.json and preprocessor_config.json as version 4 wrote them: a ``vision_model.``
            before every name, nested configurations without what equals the defaults, sizes as plain numbers.
        weights: safetensors, or bin for pytorch_model.bin.
        shards: several files and an index.
        position_ids: the buffers ``…embeddings.position_ids`` that version 4 once stored.
        preprocessor: write preprocessor_config.json, with :data:`MEAN` and :data:`STD`.
        processor: write, in its place, the processor_config.json in which version 5 has the image processor beside the
            tokenizer's files (CLIPProcessor).
    """
    import transformers
    from huggingface_hub import save_torch_state_dict

    model = huggingface_model(seed, quick_gelu, kind=kind).to(dtype)
    state = dict(model.state_dict())
    if transformers4 and kind == "vision":
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    if position_ids:
        prefix = "vision_model." if transformers4 or kind != "vision" else ""
        state[f"{prefix}embeddings.position_ids"] = torch.arange((IMAGE // PATCH) ** 2 + 1).unsqueeze(0)
        if kind == "clip":
            state["text_model.embeddings.position_ids"] = torch.arange(CONTEXT).unsqueeze(0)
    shard = "200KB" if shards else "50GB"
    if weights == "safetensors" and not transformers4 and not position_ids:
        model.save_pretrained(folder, max_shard_size=shard)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        save_torch_state_dict(
            state,
            folder,
            filename_pattern="model{suffix}.safetensors" if weights == "safetensors" else "pytorch_model{suffix}.bin",
            max_shard_size=shard,
            safe_serialization=weights == "safetensors",
        )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    if processor:
        words = {"a": 0, "b</w>": 1, "<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
        tokenizer = transformers.CLIPTokenizer(vocab=words, merges=[])
        transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    elif preprocessor:
        images.save_pretrained(folder)
    if transformers4:
        _as_transformers4(folder)
    return folder


def _as_transformers4(folder: Path) -> None:
    import transformers

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.40.0"
    nested = {"vision_config": transformers.CLIPVisionConfig(), "text_config": transformers.CLIPTextConfig()}
    for name, default in nested.items():
        if name in config:
            known = default.to_dict()
            kept = {k: v for k, v in config[name].items() if k not in known or known[k] != v}
            config[name] = {**kept, "model_type": default.model_type}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "preprocessor_config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("image_processor_type", None)
        config.update(feature_extractor_type="CLIPFeatureExtractor", size=IMAGE, crop_size=IMAGE)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hub_cache(cache: Path, repository: str, source: Path, *, revision: str = "main", commit: str = REVISION) -> Path:
    """Put the files of ``source`` into a Hugging Face cache as ``repository`` at ``revision``; returns ``cache``.

    As huggingface_hub lays it out: the content under ``blobs`` by its digest, and links to it under ``snapshots``.
    """
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit, encoding="utf-8")
    for file in sorted(source.iterdir()):
        content = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return cache
