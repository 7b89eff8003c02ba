"""One small CLIP in every format that real checkpoints come in, written by the libraries that wrote the real ones.

No weights are downloaded in tests. All writers take a seed, and the same seed is the same weights, so that what is read
from one format can be compared bit by bit with another and with :func:`clip`. Every tensor is random, biases and norms
too: no two are equal, so none can be taken for another. Heads are not to be guessed from shapes alone, but 128 / 64 = 2
is what OpenAI's own loader would say.

Nothing is imported before it is used: a GPU machine may have torch and pytest and little else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, PATCH, IMAGE, EMBED = 2, 128, 2, 16, 32, 24
TEXT_LAYERS, TEXT_WIDTH, TEXT_HEADS, VOCABULARY, CONTEXT = 1, 64, 1, 100, 8

# not CLIP's own, so that a reader that assumes those is found out
MEAN, STD = (0.41, 0.42, 0.43), (0.21, 0.22, 0.23)

# the commit in a fake hub cache
REVISION = "0123456789abcdef0123456789abcdef01234567"

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": IMAGE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": TEXT_WIDTH,
        "heads": TEXT_HEADS,
        "layers": TEXT_LAYERS,
    },
}
MODEL_CONFIG["vision_cfg"]["patch_size"] = PATCH


# the weights


def clip(seed: int = 0, quick_gelu: bool = True) -> nn.Module:
    """open_clip's CLIP in eval mode; the weights depend on ``seed`` alone, not on ``quick_gelu``."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        model: nn.Module = open_clip.CLIP(**MODEL_CONFIG, quick_gelu=quick_gelu)
    randomize_all(model, seed)
    return model.eval()


def tower(seed: int = 0, quick_gelu: bool = True) -> nn.Module:
    """The VisionTransformer of :func:`clip`, 24 features of images of 32×32."""
    model: nn.Module = clip(seed, quick_gelu).visual
    return model


def randomize_all(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Every parameter random, at a scale at which activations stay near 1 and an activation function matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if name.endswith("logit_scale"):
                parameter.fill_(4.0 + 0.1 * float(noise))
            elif name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embedding" in name:
                parameter.copy_(0.3 * noise)
            elif name.endswith(("proj", "projection")):
                parameter.copy_(noise / parameter.shape[0] ** 0.5)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def text_state(seed: int = 0) -> dict[str, Tensor]:
    """Everything of :func:`clip` but the vision tower, in open_clip's names."""
    return {name: tensor for name, tensor in clip(seed).state_dict().items() if not name.startswith("visual.")}


def images(n: int = 3, seed: int = 0, size: int = IMAGE) -> Tensor:
    """[n, 3, size, size], as after normalisation."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 3, seed: int = 0) -> Tensor:
    """[n, 8] token ids; the highest, the end of the text, is at a different place in each."""
    ids = torch.randint(1, VOCABULARY - 2, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))
    for row in range(n):
        ids[row, CONTEXT - 1 - row % CONTEXT] = VOCABULARY - 1
    return ids


# Hugging Face


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


# open_clip


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


# the release of "Editing models with task arithmetic"


class ImageEncoder(nn.Module):
    """src/modeling.py of github.com/mlfoundations/task_vectors: what their checkpoints are pickles of."""

    __module__ = "src.modeling"

    def __init__(self, model: nn.Module, train_preprocess: Any, val_preprocess: Any, keep_lang: bool = False) -> None:
        super().__init__()
        self.model, self.train_preprocess, self.val_preprocess = model, train_preprocess, val_preprocess
        self.cache_dir = None
        if not keep_lang and hasattr(self.model, "transformer"):
            delattr(self.model, "transformer")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(images)
        return features


class ClassificationHead(nn.Linear):
    """src/modeling.py of github.com/mlfoundations/task_vectors: a zero-shot head, the logit scale in its weights."""

    __module__ = "src.modeling"

    def __init__(self, normalize: bool, weights: Tensor, biases: Tensor | None = None) -> None:
        output_size, input_size = weights.shape
        super().__init__(input_size, output_size)
        self.normalize = normalize
        self.weight = nn.Parameter(weights.clone())
        self.bias = nn.Parameter(torch.zeros_like(self.bias) if biases is None else biases.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        if self.normalize:
            inputs = inputs / inputs.norm(dim=-1, keepdim=True)
        return super().forward(inputs)


@contextlib.contextmanager
def task_vectors_code() -> Iterator[None]:
    """While it lasts, the two classes can be pickled as ``src.modeling``'s; there is no such module afterwards."""
    package, module = types.ModuleType("src"), types.ModuleType("src.modeling")
    module.__file__ = __file__
    package.modeling, module.ImageEncoder, module.ClassificationHead = module, ImageEncoder, ClassificationHead
    sys.modules.update({"src": package, "src.modeling": module})
    try:
        yield
    finally:
        del sys.modules["src"], sys.modules["src.modeling"]


def task_vectors_encoder(
    path: Path,
    seed: int = 0,
    quick_gelu: bool = True,
    *,
    keep_lang: bool = False,
    legacy: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A pickle of a whole ImageEncoder around today's open_clip; those of version 2.0.2 lie in data/task_vectors."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(size=IMAGE, mean=MEAN, std=STD)
    encoder = ImageEncoder(
        clip(seed, quick_gelu).to(dtype),
        image_transform_v2(settings, is_train=True),
        image_transform_v2(settings, is_train=False),
        keep_lang,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with task_vectors_code():
        torch.save(encoder, path, _use_new_zipfile_serialization=not legacy)
    return path


def head_rows(seed: int = 0, classes: int = 5, dim: int = EMBED) -> Tensor:
    """[classes, dim] unit rows: the zero-shot head that the writers below store."""
    rows = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).float()


def task_vectors_head(
    path: Path, seed: int = 0, *, logit_scale: float = 100.0, transposed: bool = False, legacy: bool = False
) -> Path:
    """A pickle of a ClassificationHead: :func:`head_rows` times ``logit_scale``.

    Args:
        transposed: in memory (and so in the file) column by column.
    """
    weight = head_rows(seed) * logit_scale
    if transposed:
        weight = weight.T.contiguous().T
    path.parent.mkdir(parents=True, exist_ok=True)
    with task_vectors_code():
        torch.save(ClassificationHead(True, weight), path, _use_new_zipfile_serialization=not legacy)
    return path
