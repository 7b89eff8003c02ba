"""Models and copies that tests make for themselves."""

import copy

import torch
from torch import nn

from pareto_merging.model.learned import learned_parameters


def noisy_copy(model: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    """A fine-tuned copy for tests: every floating-point parameter and buffer moved."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        seen = set()
        for tensor in changed.state_dict(keep_vars=True).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
                # running variances must stay positive
                tensor.add_(noise.abs() * scale if tensor.numel() and bool((tensor > 0).all()) else noise * scale)
    return changed


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Move λ, A, G and B off their starting values: a G of zero hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learned_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
