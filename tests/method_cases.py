"""What the tests of the merging methods share: small models, task sets, and plain loops to compare with."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.model.layer import pareto_modules


def image_tasks(count: int, images: int = 10, dim: int = 8, classes: int = 5, seed: int = 7) -> dict[str, Task]:
    """Unlabelled 8×8 images and a head for each of ``t0`` …"""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{k}": Task(
            TensorImages(torch.randn(images, 3, 8, 8, generator=generator)),
            ZeroShotHead(torch.randn(classes, dim, generator=generator), 10.0),
        )
        for k in range(count)
    }


def labelled_tasks(tasks: Mapping[str, Task], classes: int = 5) -> dict[str, Task]:
    """The same images with the labels 0, 1, …"""
    return {
        name: Task(TensorImages(task.images.images, torch.arange(len(task.images)) % classes), task.head)
        for name, task in tasks.items()
    }


def conv_net() -> nn.Module:
    """Convolution, batch norm, linear: with buffers, without attention, features of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.Dropout(0.5),
        )
    with torch.no_grad():
        net[1].running_mean.add_(0.1)
        net[1].running_var.mul_(0.7)
    return net.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_state(model: nn.Module, expected: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """The floating-point tensors named in ``expected``."""
    found = model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value.detach().double(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def parts_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (W0, τ [K, *shape]) of each parameter of a Pareto model that has task vectors."""
    return {
        f"{prefix}.{name}" if prefix else name: (module._parameters[name].detach(), parts["task_vectors"].detach())
        for prefix, module in pareto_modules(model)
        for name in module.pareto_names
        if (parts := module.pareto_parameter(name).parts())["task_vectors"] is not None
    }


def parameter_task_vectors(pretrained: nn.Module, finetuned: Sequence[nn.Module]) -> dict[str, list[Tensor]]:
    """Name -> τ_1 … τ_K of each parameter."""
    return {
        name: [(other.get_parameter(name) - base).detach() for other in finetuned]
        for name, base in pretrained.named_parameters()
    }


def ties_in_loops(taus: Mapping[str, Sequence[Tensor]], density: float) -> dict[str, list[Tensor]]:
    """Algorithm 1's trimming and sign election over the flattened task vectors, entry by entry."""
    tasks = len(next(iter(taus.values())))
    trimmed = []
    for k in range(tasks):
        flat = list(itertools.chain.from_iterable(tau[k].reshape(-1).tolist() for tau in taus.values()))
        kept = sorted(range(len(flat)), key=lambda i, flat=flat: -abs(flat[i]))[: max(1, int(density * len(flat)))]
        chosen = set(kept)
        trimmed.append([value if i in chosen else 0.0 for i, value in enumerate(flat)])
    for i, column in enumerate(zip(*trimmed, strict=True)):
        total = sum(column)
        for k in range(tasks):
            trimmed[k][i] = column[k] if column[k] * total > 0 else 0.0
    result: dict[str, list[Tensor]] = {name: [] for name in taus}
    for flat in trimmed:
        values = iter(flat)
        for name, tau in taus.items():
            piece = list(itertools.islice(values, tau[0].numel()))
            result[name].append(torch.tensor(piece, dtype=tau[0].dtype).view(tau[0].shape))
    return result


def entropy(logits: Tensor) -> Tensor:
    """The mean Shannon entropy of the predictions, from the definition."""
    p = torch.softmax(logits, dim=-1)
    return -(p * p.log()).sum(dim=-1).mean()
