"""A vision transformer with K made-up fine-tuned copies. What a step of it costs at the least is counted."""

import copy
import functools
import gc
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.towers import BATCH, RANK, Tower, vision_transformer
from pareto_merging import MethodSettings, learned_parameters
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.parametrize import parametrize
from pmkernels import costs, reference

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


def products(
    skeleton: nn.Module, shape: Sequence[int], width: int
) -> tuple[list[tuple[int, int, int, bool]], float, float]:
    """Return every product of one forward, then the operations and numbers moved of all attention. A product is rows,
    out, in and whether its input needs a gradient. They are counted by a run of the model without memory."""
    counted: list[tuple[int, int, int, bool]] = []
    attention: list[int] = []

    def hook(name: str, module: Any, args: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            counted.append((output.numel() // output.shape[1], output.shape[1], module.weight[0].numel(), False))
            return
        rows = args[0].numel() // args[0].shape[-1]
        if isinstance(module, nn.MultiheadAttention):
            counted.extend([(rows, 3 * width, width, True), (rows, width, width, True)])
        else:
            counted.append((rows, module.out_features, module.in_features, True))
        if isinstance(module, nn.MultiheadAttention) or name.endswith("qkv"):
            attention.append(rows)

    kinds = (nn.Linear, nn.MultiheadAttention, nn.Conv2d)
    modules = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(functools.partial(hook, name)) for name, module in modules]
    try:
        dtype = next(skeleton.parameters()).dtype
        # with gradients wanted, attention takes the ordinary path
        skeleton(torch.empty(*shape, device="meta", dtype=dtype))
    finally:
        for handle in handles:
            handle.remove()
    operations = sum(4.0 * rows * (rows // shape[0]) * width for rows in attention)
    return counted, operations, sum(4.0 * rows * width for rows in attention)


def bound_ms(case: Case, rates: Mapping[str, float], dtype: torch.dtype) -> float:
    """Return a step's bound in ms: merge, products and attention, one after the other."""
    kind = "float32" if dtype == torch.float32 else "16-bit"
    wide, copy = rates["float32"], rates["copy"]
    gpu = costs.Rates(
        rates["bfloat16"], wide, wide, copy, cache=copy, cache_bytes=0.0, multiprocessors=1, measured=True
    )
    counted, operations, numbers = products(case.skeleton, case.images[0].shape, case.tower.width)
    seconds = 0.0
    size = 4 if kind == "float32" else 2
    for rows, n, d, inner in counted:
        problem = costs.Problem(rows, n, d, case.tasks, RANK, kind)
        seconds += costs.bound("merge", problem).seconds(gpu, kind)
        each = [costs.bound("forward", problem, cached=True), costs.bound("weight_grad", problem)]
        each += [costs.bound("dx", problem, cached=True)] if inner else []
        seconds += case.tasks * sum(bound.seconds(gpu, kind) for bound in each)
    # backward: twice the operations and the bytes of the forward
    seconds += 3 * case.tasks * costs.Bound(operations, numbers * size).seconds(gpu, kind)
    return 1e3 * seconds
