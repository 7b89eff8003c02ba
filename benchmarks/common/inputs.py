"""Random inputs of one layer, on the scale of a real one."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common.towers import Layer


class Source:
    """Normal random numbers on a device, the same in every run. On the meta device there are shapes alone."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers of that standard deviation."""
        if self.generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype)
        return (scale * torch.randn(*shape, generator=self.generator, device=self.device)).to(dtype)


def make_folded(
    layer: Layer, tasks: int, rank: int, dtype: torch.dtype, source: Source, items: int | None = None
) -> dict[str, Tensor]:
    """Return W0, and A, G, B and γ of a low-rank term, as in :mod:`pmkernels`.

    γ is [K], or [items, 1, K] where each of ``items`` has its own.
    """
    width, lead = layer.d**-0.5, () if items is None else (items, 1)
    values = {"weight": source.normal(layer.n, layer.d, scale=width, dtype=dtype)}
    if rank:
        values |= {
            "A": source.normal(layer.n, rank),
            "G": source.normal(rank, rank, tasks, scale=0.1),
            "B": source.normal(layer.d, rank, scale=width),
            "gamma": torch.softmax(source.normal(*lead, tasks), dim=-1),
        }
    return values


def make_served(layer: Layer, tasks: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return W0 and bias of a folded layer, x [items, tokens, D], and the low-rank term at each item's preference."""
    source = Source(device)
    values = make_folded(layer, tasks, rank, dtype, source, layer.items)
    values["x"] = source.normal(layer.items, layer.tokens, layer.d, dtype=dtype)
    return {**values, "bias": source.normal(layer.n, dtype=dtype)}


def make_weights(layer: Layer, tasks: int, rank: int, dtype: torch.dtype, source: Source) -> dict[str, Tensor]:
    """Return W0, τ and λ of a layer, and its low-rank term."""
    scale = 0.1 * layer.d**-0.5
    vectors = [source.normal(layer.n, layer.d, scale=scale, dtype=dtype) for _ in range(tasks)]
    learned = {"task_vectors": torch.stack(vectors), "lam": source.normal(tasks, scale=0.3)}
    return {**make_folded(layer, tasks, rank, dtype, source), **learned}


def make_activations(rows: int, layer: Layer, source: Source, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and dy. dy depends on x through Σ_k τ_k, so that no dλ_k is a sum that cancels."""
    x = source.normal(rows, layer.d, dtype=task_vectors.dtype)
    dy = F.linear(x, task_vectors.sum(dim=0))
    return x, dy / dy.float().square().mean().sqrt().to(dy.dtype)


def learned(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return those of λ, A, G and B that a layer has: their gradients are reductions of dW."""
    return tuple(name for name in ("lam", "A", "G", "B") if name in weights)
