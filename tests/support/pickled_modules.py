"""The small CLIP and a head as the task-vectors code pickles them."""

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.clip import IMAGE, MEAN, STD, clip, head_rows
from torch import Tensor, nn


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
