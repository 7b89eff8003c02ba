"""The serving suite's variants: the engine, the plain merged model, and other ways.

Every variant answers the same request, a batch of images of which item i wants preference i mod P, from the same
folded vision tower of open_clip. Its attention is rebuilt from two linear layers where a variant needs to reach them;
all other weights are shared with the folded tower, not copied.
"""

import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.timing import free_memory
from benchmarks.common.towers import RANK
from benchmarks.serving import names
from benchmarks.serving.folded import Case, Projection, Request, linear, tower
from pareto_merging import merge
from pareto_merging.serving import Engine
from pmkernels import reference
from pmkernels.graphs import capture, warm_up

# of memory that is free, what merged copies may take
SHARE_OF_MEMORY = 0.8


class Unavailable(Exception):
    """A variant that cannot be measured here, which is not a fault of it. The message says why."""


def unused_memory(device: torch.device) -> float:
    """Return bytes that tensors can still take on the device."""
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return math.inf
    return free_memory(device)


def tensor_bytes(*objects: Any) -> int:
    """Return the bytes of all tensors reached from ``objects``. Memory that several of them share is counted once."""
    storages: dict[Any, int] = {}
    seen: dict[int, Any] = {}
    waiting: list[Any] = list(objects)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | str | bytes | int | float):
            continue
        # kept, so that no other object gets its address
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.device.type != "meta":
                storage = value.untyped_storage()
                storages[storage.data_ptr(), value.device] = storage.nbytes()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, functools.partial):
            waiting += [value.func, value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            waiting += inspect.getclosurevars(value).nonlocals.values()
        else:
            waiting.append(getattr(value, "__dict__", {}))
            waiting += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    return sum(storages.values())


@dataclass
class Variant:
    """``run`` answers a request: images [n, 3, H, W] -> features [n, dim].

    ``holds``: the objects whose tensors it keeps, its weights among them. ``set_up``: it knows its preferences
    beforehand and answers no others. ``single``: it answers with the first of them for all items. ``weights``: their
    bytes, where not all that it holds are weights.
    """

    run: Callable[[Tensor, Request], Tensor]
    holds: tuple[Any, ...]
    set_up: bool = False
    single: bool = False
    weights: Callable[[], int] | None = None

    def weight_bytes(self) -> int:
        """Return bytes of the weights it keeps now."""
        return tensor_bytes(*self.holds) if self.weights is None else self.weights()


def plain_model(case: Case, request: Request) -> Variant:
    """Return the model merged at the first preference, as :func:`pareto_merging.merge` gives it."""
    model = merge(case.folded, request.distinct[0])
    return Variant(lambda images, _: model(images), (model,), set_up=True, single=True)


def plain_linear_model(case: Case, request: Request) -> Variant:
    """Return the same with the attention that the variants below have."""
    gamma = request.distinct_on_device[0]
    model = tower(case.folded, lambda part: linear(part.merged(gamma), part.bias))
    return Variant(lambda images, _: model(images), (model,), set_up=True, single=True)


def engine(case: Case, request: Request) -> Variant:
    """Return ours, from the folded file; preferences come from the host, as requests do."""
    made = Engine(case.file, device=case.device, dtype=case.dtype, max_batch=len(request.each))
    # images that its CUDA graphs read are no weights
    return Variant(lambda images, request: made(images, request.each), (made,), weights=lambda: int(made.bytes))


def engine_again(case: Case, request: Request) -> Variant:
    """Return an engine that keeps its merged weights. Every request asks it for the same preference.

    Raises:
        Unavailable: requests with several.
    """
    if len(request.distinct) > 1:
        raise Unavailable("nothing is kept of several preferences")
    return replace(engine(case, request), set_up=True)


def engine_on_device(case: Case, request: Request) -> Variant:
    """Return an engine whose preferences are on the GPU already. It cannot see that some are equal.

    Raises:
        Unavailable: not on a GPU, where the host sees them all.
    """
    if case.device.type != "cuda":
        raise Unavailable("the host is the device")
    of = engine(case, request)
    (made,) = of.holds
    return replace(of, run=lambda images, request: made(images, request.each_on_device))


class Remerged(nn.Module):
    """A projection with a weight of its own to merge into."""

    weight: Tensor

    def __init__(self, part: Projection) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("weight", part.weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return [*, D] -> [*, N]."""
        return F.linear(x, self.weight, self.part.bias)


def merge_again(case: Case, request: Request) -> Variant:
    """Return a call that merges in place for each distinct preference, then runs its items. There is one workspace."""
    model, count = tower(case.folded, Remerged), len(request.distinct)
    layers = [module for module in model.modules() if isinstance(module, Remerged)]

    def run(images: Tensor, request: Request) -> Tensor:
        features: list[Tensor] = []
        for index in range(count):
            for layer in layers:
                layer.part.merged(request.distinct_on_device[index], out=layer.weight)
            features.append(model(images[index::count]))
        return _in_order(features)

    return Variant(run, (model,))


def _in_order(features: Sequence[Tensor]) -> Tensor:
    """Put P groups of features [n / P, dim] in order. Item i of [n, dim] comes from group i mod P."""
    return torch.stack(list(features), dim=1).flatten(0, 1)


class Copies(nn.Module):
    """A projection merged at P preferences: weights [P, N, D]. Its input has the items of each together."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, part: Projection, gammas: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.stack([part.merged(gamma) for gamma in gammas]))
        self.register_buffer("bias", part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, D] -> [n, tokens, N]."""
        grouped, weight = x.reshape(len(self.weight), -1, x.shape[-1]), self.weight.transpose(1, 2)
        y = torch.bmm(grouped, weight) if self.bias is None else torch.baddbmm(self.bias, grouped, weight)
        return y.view(*x.shape[:-1], y.shape[-1])


def merged_copies(case: Case, request: Request) -> Variant:
    """Return merged copies of each projection per preference, made beforehand. One batched product over them.

    Raises:
        Unavailable: the copies take more than :data:`SHARE_OF_MEMORY` of what is free.
    """
    count = len(request.distinct)
    projections = [projection.weight for projection in Projection.all_of(case.folded)]
    needed, free = count * tensor_bytes(projections), unused_memory(case.device)
    if needed > SHARE_OF_MEMORY * free:
        raise Unavailable(f"{count} merged copies take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free")
    model = tower(case.folded, lambda part: Copies(part, request.distinct_on_device))

    def run(images: Tensor, request: Request) -> Tensor:
        grouped = images.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)
        return _in_order(model(grouped).chunk(count))

    return Variant(run, (model,), set_up=True)


@dataclass
class Groups:
    """The preferences [P, K] of the batch under way, and which items have each."""

    gammas: Tensor
    items: list[Tensor]


class Looped(nn.Module):
    """A projection with P low-rank terms: one product for all, then x·B·Cᵀ·Aᵀ for each."""

    def __init__(self, part: Projection, groups: Groups) -> None:
        super().__init__()
        self.base, self.G, self.groups = linear(part.weight, part.bias), part.G, groups
        self.low, self.up = part.B.to(part.weight.dtype), part.A.to(part.weight.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, D] -> [n, tokens, N]."""
        cores = reference.preference_core(self.G, self.groups.gammas).transpose(1, 2).to(x.dtype)
        y: Tensor = self.base(x)
        for items, core in zip(self.groups.items, cores, strict=True):
            y[items] += x[items] @ self.low @ core @ self.up
        return y


def looped(case: Case, request: Request) -> Variant:
    """Return the same as multi-adapter libraries do it. In each layer one adapter comes after the other."""
    count, items = len(request.distinct), len(request.each)
    of_each = [torch.arange(first, items, count, device=case.device) for first in range(count)]
    groups = Groups(request.distinct_on_device, of_each)
    model = tower(case.folded, lambda part: Looped(part, groups))

    def run(images: Tensor, request: Request) -> Tensor:
        groups.gammas = request.distinct_on_device
        features: Tensor = model(images)
        return features

    return Variant(run, (model,))


def peft_version() -> str | None:
    """Return the version of PEFT, None where it is not installed."""
    try:
        return str(importlib.import_module("peft").__version__)
    except ImportError:
        return None


def peft_mixed_batch(case: Case, request: Request) -> Variant:
    """Return PEFT itself. Every preference is a LoRA adapter, Bᵀ and then A·C(γ), added beforehand, and named for each
    item.

    Raises:
        Unavailable: PEFT cannot be imported.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise Unavailable(f"PEFT cannot be imported: {error}") from error
    parts: dict[int, Projection] = {}

    def remembered(part: Projection) -> nn.Linear:
        layer = linear(part.weight, part.bias)
        parts[id(layer)] = part
        return layer

    plain = tower(case.folded, remembered)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", target_modules=["in_proj", "out_proj"]
    )
    adapters = [f"preference_{index}" for index in range(len(request.distinct))]
    model = peft.get_peft_model(plain, config, adapter_name=adapters[0], autocast_adapter_dtype=False)
    for name in adapters[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model = model.to(case.device, case.dtype).eval()
    with torch.no_grad():
        for layer in model.modules():
            part = parts.get(id(getattr(layer, "base_layer", None)))
            if part is None:
                continue
            cores = reference.preference_core(part.G, request.distinct_on_device)
            for name, core in zip(adapters, cores, strict=True):
                layer.lora_A[name].weight.copy_(part.B.t())
                layer.lora_B[name].weight.copy_(part.A @ core)
    each = [adapters[item % len(adapters)] for item in range(len(request.each))]
    return Variant(lambda images, _: model(images, adapter_names=each), (model,), set_up=True)


# name -> what makes it for requests like one, in the order of the tables
VARIANTS: dict[str, Callable[[Case, Request], Variant]] = {
    names.LIMIT: plain_model,
    names.LIMIT_LINEAR: plain_linear_model,
    names.ENGINE: engine,
    names.ENGINE_AGAIN: engine_again,
    names.ENGINE_DEVICE: engine_on_device,
    names.REMERGE: merge_again,
    names.COPIES: merged_copies,
    names.LOOP: looped,
    names.PEFT: peft_mixed_batch,
}


def graphed(of: Variant, images: Tensor, request: Request) -> Variant:
    """Return ``of`` as a CUDA graph over inputs that every call copies into its own.

    Raises:
        Unavailable: it cannot be captured.
    """
    device = images.device
    own, gammas, each = images.clone(), request.distinct_on_device.clone(), request.each_on_device.clone()
    inside = Request(request.distinct, request.each, gammas, each)
    compute = functools.partial(of.run, own, inside)
    try:
        warm_up(compute, device)
        graph, features = capture(compute, device)
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise Unavailable(f"no CUDA graph of it: {error}"[:200]) from error

    def run(images: Tensor, request: Request) -> Tensor:
        own.copy_(images)
        gammas.copy_(request.distinct_on_device)
        each.copy_(request.each_on_device)
        graph.replay()
        return features

    return replace(of, run=run)
