"""Every checkpoint format that others write as a function, and what its tensors are."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from support import clip, hf_files, open_clip_files, pickled_modules
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders

RELEASE = Path(__file__).parents[1] / "data" / "task_vectors"
Writer = Callable[[Path, int, bool], Path]


def hugging_face(**options: Any) -> Writer:
    return lambda folder, seed, quick_gelu: hf_files.huggingface_folder(folder / "model", seed, quick_gelu, **options)


def open_clip_file(name: str, **options: Any) -> Writer:
    return lambda folder, seed, _: open_clip_files.open_clip_file(folder / name, seed, **options)


def task_vectors(**options: Any) -> Writer:
    return lambda folder, seed, quick_gelu: pickled_modules.task_vectors_encoder(
        folder / "finetuned.pt", seed, quick_gelu, **options
    )


# the vision tower alone; without its projection where the name says "vision"
TOWERS: dict[str, Writer] = {
    "hf vision": hugging_face(),
    "hf vision, transformers 4": hugging_face(transformers4=True),
    "hf vision, position_ids": hugging_face(position_ids=True),
    "hf vision, transformers 4, position_ids": hugging_face(transformers4=True, position_ids=True),
    "hf vision, bin": hugging_face(weights="bin"),
    "hf vision, transformers 4, bin": hugging_face(transformers4=True, weights="bin"),
    "hf projected": hugging_face(kind="vision_with_projection"),
    "hf projected, transformers 4": hugging_face(kind="vision_with_projection", transformers4=True),
    "hf projected, shards": hugging_face(kind="vision_with_projection", shards=True),
    "open_clip visual pt": open_clip_file("visual.pt", part="visual"),
    "open_clip visual pt, legacy": open_clip_file("visual.pth", part="visual", legacy=True),
    "open_clip visual safetensors": open_clip_file("visual.safetensors", part="visual"),
    "task vectors": task_vectors(),
    "task vectors, legacy": task_vectors(legacy=True),
}


WHOLE: dict[str, Writer] = {
    "hf clip": hugging_face(kind="clip"),
    "hf clip, transformers 4, position_ids": hugging_face(kind="clip", transformers4=True, position_ids=True),
    "hf clip, shards": hugging_face(kind="clip", shards=True),
    "hf clip, processor": hugging_face(kind="clip", processor=True),
    "hf clip, bin": hugging_face(kind="clip", weights="bin"),
    "hf clip, bin, shards": hugging_face(kind="clip", weights="bin", shards=True),
    "open_clip pt": open_clip_file("clip.pt"),
    "open_clip pt, legacy": open_clip_file("clip.pt", legacy=True),
    "open_clip bin": open_clip_file("open_clip_pytorch_model.bin"),
    "open_clip training": open_clip_file("epoch_32.pt", training=True),
    "open_clip training, legacy": open_clip_file("epoch_32.pt", training=True, legacy=True),
    "open_clip safetensors": open_clip_file("clip.safetensors"),
    "open_clip folder": lambda folder, seed, quick_gelu: open_clip_files.open_clip_folder(
        folder / "model", seed, quick_gelu
    ),
    "open_clip folder, no preprocessing": lambda folder, seed, quick_gelu: open_clip_files.open_clip_folder(
        folder / "model", seed, quick_gelu, preprocess=False
    ),
    "task vectors, keep_lang": task_vectors(keep_lang=True),
    "task vectors, keep_lang, legacy": task_vectors(keep_lang=True, legacy=True),
}


FORMATS = TOWERS | WHOLE


def expected_tower(name: str, seed: int = 0) -> dict[str, Tensor]:
    state = dict(clip.tower(seed).state_dict())
    if name.startswith("hf vision"):
        del state["proj"]
    return state


def assert_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, types, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """As :func:`assert_bits`, and in memory of its own."""
    assert_bits(found, expected)
    for name in expected:
        assert found[name].is_contiguous(), name


def features(model: nn.Module, size: int = clip.IMAGE) -> Tensor:
    with torch.no_grad():
        return model(clip.images(size=size))


def built(checkpoint: Any, **missing: Tensor) -> nn.Module:
    """The encoder that a checkpoint describes, with its weights, and a projection where it has none."""
    # a description is stored as JSON beside what is learned
    description = json.loads(json.dumps(checkpoint.encoder))
    if "proj" in missing:
        assert description["arguments"]["output_dim"] is None
        description["arguments"]["output_dim"] = missing["proj"].shape[1]
    model = encoders.build(description)
    model.load_state_dict({**checkpoint, **missing})
    return model.float()
