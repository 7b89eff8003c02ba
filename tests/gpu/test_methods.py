"""Every merging method on a CUDA GPU, against the same method on the CPU."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods.interface import Problem
from pareto_merging.methods.registry import METHODS, run

pytestmark = pytest.mark.gpu
Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def problem(pretrained: nn.Module, finetuned: dict[str, nn.Module], device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    tasks, training = {}, {}
    for name in finetuned:
        images = TensorImages(torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 5)
        head = ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0).to(device)
        tasks[name], training[name] = Task(images, head), Task(images, head)
    method = MethodSettings.model_validate({"steps": 3, "batch_size": 6, "rank": 4, "learning_rate": 1e-2})
    copies = {name: copy.deepcopy(model).to(device) for name, model in finetuned.items()}
    return Problem(copy.deepcopy(pretrained).to(device), copies, tasks, training, method, progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_the_gpu_finds_what_the_cpu_finds(tiny_vit: nn.Module, copies: Copies, name: str) -> None:
    finetuned = copies(tiny_vit, 3)
    gamma: Tensor = torch.tensor([0.5, 0.3, 0.2])
    # Fisher draws a label from probabilities that are rounded differently: its exact expectation does not
    choice = {"labels": "expected"} if name == "fisher" else {}
    cpu, cuda = (run(name, problem(tiny_vit, finetuned, device), **choice).model(gamma) for device in ("cpu", "cuda"))
    for key, expected in cpu.state_dict().items():
        found = cuda.state_dict()[key]
        assert found.is_cuda, key
        torch.testing.assert_close(
            found.cpu(), expected, rtol=2e-3, atol=2e-4, msg=lambda m, k=key: f"{name}, {k}: {m}"
        )
