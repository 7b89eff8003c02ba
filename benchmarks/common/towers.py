"""Layers and vision transformers that are measured, by their sizes. The latter also with random weights."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# of the goals: tasks, rank, images in a batch, and types of 16 bits as pmkernels.costs calls them
TASKS, RANK, BATCH, KIND = 8, 16, 32, "16-bit"


@dataclass(frozen=True)
class Layer:
    """One projection: out and in features, and its input's rows as items times tokens."""

    name: str
    n: int
    d: int
    items: int
    tokens: int

    @property
    def rows(self) -> int:
        """Return the rows of its input."""
        return self.items * self.tokens

    @property
    def rank(self) -> int:
        """Return the rank of A·C(γ)·Bᵀ, which attention's projections have. The language model's is taken as one."""
        return 0 if "MLP" in self.name else RANK


@dataclass(frozen=True)
class Tower:
    """A vision transformer: MLPs of four widths, patches of ``patch``² pixels of images of ``image``²."""

    name: str
    width: int
    blocks: int
    heads: int
    patch: int
    output: int
    image: int = 224
    timm: str = "vit_base_patch32_clip_224"

    @property
    def tokens(self) -> int:
        """Return the patches of an image and the class token."""
        return (self.image // self.patch) ** 2 + 1

    def block_layers(self, items: int) -> tuple[Layer, ...]:
        """Return the four projections of a block, for that many images."""
        shapes = (("in-projection", 3, 1), ("out-projection", 1, 1), ("MLP fc", 4, 1), ("MLP proj", 1, 4))
        width = self.width
        return tuple(Layer(f"{self.name} {name}", n * width, d * width, items, self.tokens) for name, n, d in shapes)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of open_clip's VisionTransformer."""
        sizes = {"image_size": self.image, "patch_size": self.patch, "width": self.width, "layers": self.blocks}
        return {**sizes, "heads": self.heads, "mlp_ratio": 4.0, "output_dim": self.output}

    @property
    def parameters(self) -> int:
        """Return how many the whole tower has: products, biases, normalisations and embeddings."""
        width = self.width
        ends = width * (3 * self.patch**2 + 1 + self.tokens + 4 + self.output)
        return self.blocks * (12 * width**2 + 13 * width) + ends


VIT_B = Tower("ViT-B/32", 768, 12, 12, 32, 512)
VIT_L = Tower("ViT-L/14", 1024, 24, 16, 14, 768, timm="vit_large_patch14_clip_224")
TOWERS = (VIT_B, VIT_L)
# of rehearsals, which measure nothing
TINY = Tower("tiny ViT", 32, 2, 2, 4, 8, image=8)
TINY_LAYERS = (Layer("tiny", 40, 24, 3, 5), Layer("tiny MLP", 24, 40, 3, 5))
LANGUAGE_MODEL = tuple(Layer("7B projection", 4096, 4096, 1, rows) for rows in (1, 16, 128, 512, 2048, 8192))


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


# the first library that is installed is taken; of open_clip the text tower is not built
BUILDERS: dict[str, Callable[[Tower], Any]] = {
    "open_clip": lambda tower: importlib.import_module("open_clip.transformer").VisionTransformer(**tower.arguments),
    "timm": _timm,
    "torchvision": _torchvision,
}


def vision_transformer(tower: Tower, source: str | None = None) -> tuple[nn.Module, str]:
    """Build a randomly initialised vision tower in eval mode. Return it and the library it comes from.

    Raises:
        ImportError: none of the libraries is installed, or not the one asked for.
    """
    libraries = tuple(BUILDERS) if source is None else (source,)
    for library in libraries:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return BUILDERS[library](tower).eval(), library
        except ModuleNotFoundError:
            continue
    raise ImportError(f"{tower.name}: expected {' or '.join(libraries)}, got none")
