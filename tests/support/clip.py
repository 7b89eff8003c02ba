"""One small CLIP with random weights; the same seed is the same weights in every format.

Every tensor is random, biases and norms too: no two are equal, so none can be taken for another. Heads are not to be
guessed from shapes alone, but 128 / 64 = 2 is what OpenAI's own loader would say. No weights are downloaded in tests.
Nothing is imported before it is used: a GPU machine may have torch and pytest and little else.
"""

from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, PATCH, IMAGE, EMBED = 2, 128, 2, 16, 32, 24
TEXT_LAYERS, TEXT_WIDTH, TEXT_HEADS, VOCABULARY, CONTEXT = 1, 64, 1, 100, 8
# not CLIP's own, so that a reader that assumes those is found out
MEAN, STD = (0.41, 0.42, 0.43), (0.21, 0.22, 0.23)
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {
        "image_size": IMAGE,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": PATCH,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": TEXT_WIDTH,
        "heads": TEXT_HEADS,
        "layers": TEXT_LAYERS,
    },
}


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


def head_rows(seed: int = 0, classes: int = 5, dim: int = EMBED) -> Tensor:
    """[classes, dim] unit rows: the zero-shot head that the writers below store."""
    rows = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).float()
