"""What the tests share: small models, noisy copies, and no GPU or second thread unless a test wants one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import noisy_copy
from torch import nn

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def tiny_vit() -> nn.Module:
    """open_clip's VisionTransformer with two layers of width 32, images of 8×8 in patches of 4."""
    # a GPU machine may have torch and triton and nothing else
    transformer = pytest.importorskip("open_clip.transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformer.VisionTransformer(
            image_size=8, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
        ).eval()


@pytest.fixture
def copies() -> Callable[[nn.Module, int], dict[str, nn.Module]]:
    """``copies(model, K)``: task name -> noisy copy."""
    return lambda model, tasks: {f"t{k}": noisy_copy(model, seed=k + 1) for k in range(tasks)}
