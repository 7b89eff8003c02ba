"""What the tests share: small models, noisy copies, and no GPU or second thread unless a test wants one.

A GPU machine may have torch, triton, numpy and pytest and nothing else: nothing here imports more before it is used.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    # before anything imports a kernel: without a GPU, kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


@pytest.fixture
def tiny_vit() -> nn.Module:
    """open_clip's VisionTransformer with two layers of width 32, images of 8×8 in patches of 4."""
    transformer = pytest.importorskip("open_clip.transformer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformer.VisionTransformer(
            image_size=8, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
        ).eval()


@pytest.fixture(params=["eager", "fused"])
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """What ``auto`` means in a test: plain PyTorch, then the kernels wherever they can be."""
    from pmkernels import dispatch
    from pmkernels.configs import Configs

    with dispatch.using(Configs(auto=request.param)):
        yield request.param


@pytest.fixture
def copies() -> Callable[[nn.Module, int], dict[str, nn.Module]]:
    """``copies(model, K)``: task name -> noisy copy."""
    from helpers import noisy_copy

    return lambda model, tasks: {f"t{k}": noisy_copy(model, seed=k + 1) for k in range(tasks)}
