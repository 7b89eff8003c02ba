"""A vision transformer with K made-up fine-tuned copies, which every variant is given."""

import copy
import gc
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.towers import BATCH, RANK, Tower, vision_transformer
from pareto_merging import MethodSettings, learned_parameters
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.parametrize import parametrize
from pmkernels import reference

CLASSES = 100
# ‖τ_k‖ as a share of ‖W0‖
TASK_VECTOR_SIZE = 0.02
# so small that a step leaves every parameter as it is, and the same step can be repeated
LEARNING_RATE = 1e-30


class FineTuned(Mapping[str, Tensor]):
    """The state dict of a made-up fine-tuned copy. A tensor is made when it is asked for, the same every time."""

    def __init__(self, plain: nn.Module, task: int) -> None:
        self._tensors, self._task = plain.state_dict(), task

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            return tensor
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(f"{self._task} {name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        wide = tensor.float()
        # biases that start at zero move as well
        return wide + TASK_VECTOR_SIZE * wide.square().mean().sqrt().clamp(min=0.02) * noise

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Head(nn.Module):
    """A zero-shot head of random class embeddings: features [n, dim] -> logits [n, classes], float32 (float64).

    At CLIP's scale of 100 random features make predictions so sharp that bfloat16's rounding of a feature decides most
    of the gradient, and no mistake could be told from it.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: float = 20.0) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(weight, dim=-1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        dtype = reference.accumulate_dtype(features)
        return self.scale * F.normalize(features.to(dtype), dim=-1) @ self.weight.to(dtype).t()


# what one merged parameter is made of, by the names of pmkernels: W0, and of τ, λ, A, G and B what it has
Part: TypeAlias = dict[str, Tensor]


@dataclass
class Case:
    """One model with K tasks: what every variant is given.

    ``plain``: the plain model, on the CPU, because its memory is nobody's but the limit's. ``skeleton``: the same
    without any memory.
    """

    plain: nn.Module
    tower: Tower
    source: str
    tasks: int
    device: torch.device
    dtype: torch.dtype
    skeleton: nn.Module
    heads: list[Head]
    images: list[Tensor]
    gamma: Tensor
    settings: MethodSettings
    pareto: nn.Module | None
    parts: dict[str, Part]
    others: dict[str, Tensor]
    learned: dict[str, nn.Parameter]

    @property
    def title(self) -> str:
        """Return what the rows of this case call it."""
        return f"{self.tower.name}, K = {self.tasks}"


def build_case(
    tower: Tower, tasks: int, device: torch.device, dtype: torch.dtype, *, batch: int = BATCH, source: str | None = None
) -> Case:
    """Build the models and everything else. λ, A, G and B are off their starting values, where G is 0."""
    plain, library = vision_transformer(tower, source)
    plain = plain.to(device, dtype)
    copies = {f"task_{k + 1}": FineTuned(plain, k) for k in range(tasks)}
    pareto = parametrize(plain, copies, rank=RANK, low_rank="attention", digests=False).eval()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    learned = learned_parameters(pareto)
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(0.05 * random(*parameter.shape).to(parameter))
    # none so large that the others' gradients vanish beside it, no two alike
    shares = torch.linspace(1.0, 1.1, tasks, dtype=torch.float64)
    gamma = (shares / shares.sum()).tolist()
    parts = {
        stored.path: {name: t for name, t in {"weight": stored.weight, **stored.parts()}.items() if t is not None}
        for stored in merged_parameters(pareto)
    }
    others = {name: tensor for name, tensor in plain.state_dict().items() if name not in parts}
    skeleton, size = copy.deepcopy(plain).to("meta"), tower.image
    return Case(
        plain=plain.cpu(),
        tower=tower,
        source=library,
        tasks=tasks,
        device=device,
        dtype=dtype,
        skeleton=skeleton,
        heads=[Head(random(CLASSES, tower.output)).to(device) for _ in range(tasks)],
        images=[random(batch, 3, size, size).to(device, dtype) for _ in range(tasks)],
        gamma=torch.tensor(gamma, dtype=torch.float32, device=device),
        settings=MethodSettings.model_validate(
            {"batch_size": batch, "preference": "fixed", "gamma": gamma, "learning_rate": LEARNING_RATE}
        ),
        pareto=pareto,
        parts=parts,
        others=others,
        learned=learned,
    )


def widen(case: Case) -> None:
    """Put weights and task vectors into float32, one at a time. The Pareto model that held them is gone afterwards."""
    case.pareto = None
    gc.collect()
    for part in case.parts.values():
        part |= {name: part[name].detach().float() for name in ("weight", "task_vectors") if name in part}
