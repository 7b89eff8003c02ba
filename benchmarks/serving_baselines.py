"""What the serving suite measures: the engine, the plain merged model, and other ways to serve a preference per item.

Every variant answers the same request, a batch of images of which item i wants preference i mod P, from the same
folded vision tower of open_clip. Its attention is rebuilt from two linear layers where a variant needs to reach them;
all other weights are shared with the folded tower, not copied.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from benchmarks.layers import free_memory
from pareto_merging import ParetoAttention, fold, merge, save_folded
from pareto_merging.checkpoints import encoders
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.parametrize import parametrize
from pareto_merging.serving import Engine
from pmkernels import reference
from pmkernels.graphs import capture, warm_up

TASKS, RANK = 8, 16
# sets of preferences that calls take in turn, so that none comes twice in a row
SETS = 4
# of memory that is free, what merged copies may take
SHARE_OF_MEMORY = 0.8

LIMIT = "limit: plain merged model"
LIMIT_LINEAR = "limit: plain merged model, linear layers"
ENGINE = "engine"
ENGINE_AGAIN = "engine, the same preference again"
ENGINE_DEVICE = "engine, preferences on the device"
REMERGE = "merge again for each request"
COPIES = "batched product over merged copies"
LOOP = "loop over distinct preferences"
PEFT = "PEFT's mixed batch"
GRAPH = ", CUDA graph"


class Unavailable(Exception):
    """A variant that cannot be measured here, which is not a fault of it; the message says why."""


@dataclass(frozen=True)
class Request:
    """What comes with a batch: the P distinct preferences [P, K], and the one of each item [n, K], float32.

    Both are on the host, where requests arrive, and on the device, where most variants want them.
    """

    distinct: Tensor
    each: Tensor
    distinct_on_device: Tensor
    each_on_device: Tensor

    @classmethod
    def make(cls, distinct: Tensor, items: int, device: torch.device) -> Request:
        """Item i of ``items`` has preference i mod P of ``distinct`` [P, K]."""
        each = distinct[torch.arange(items) % len(distinct)]
        return cls(distinct, each, distinct.to(device), each.to(device))


@dataclass
class Variant:
    """``run`` answers a request: images [n, 3, H, W] -> features [n, dim].

    ``holds``: the objects whose tensors it keeps, its weights among them. ``set_up``: it knows its preferences
    beforehand and answers no others. ``single``: it answers with the first of them for all items. ``weights``: their
    bytes, where not all that it holds are weights.
    """

    name: str
    run: Callable[[Tensor, Request], Tensor]
    holds: tuple[Any, ...]
    set_up: bool = False
    single: bool = False
    weights: Callable[[], int] | None = None

    def weight_bytes(self) -> int:
        """Bytes of the weights it keeps now."""
        return tensor_bytes(*self.holds) if self.weights is None else self.weights()


@dataclass(frozen=True)
class Case:
    """One folded tower on a device, in the type it is served in, and its folded file."""

    name: str
    folded: nn.Module
    file: Path
    dtype: torch.dtype
    device: torch.device


def build_case(
    name: str, encoder: Mapping[str, Any], folder: Path, dtype: torch.dtype, device: torch.device, share: float = 0.3
) -> Case:
    """A random tower, folded, with low-rank terms of about ``share`` of each projection's norm for one task alone.

    λ is folded, so nothing is left of the K fine-tuned copies, and none is made.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = encoders.build(encoder)
        for parameter in plain.parameters():
            if not bool(parameter.any()):
                # a bias that is zero hides that it is missing
                nn.init.normal_(parameter, std=0.05)
    # there at once: eight differences of a large model take long on a CPU
    plain = plain.to(device, dtype)
    weights = plain.state_dict()
    copies = {f"task_{k + 1}": weights for k in range(TASKS)}
    folded = fold(parametrize(plain, copies, rank=RANK, low_rank="attention", digests=False)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in pareto_modules(folded):
            for attribute in module.pareto_names:
                part = Projection.of(module, attribute)
                part.G.copy_(torch.randn(part.G.shape, generator=generator))
                term = part.A @ part.G[:, :, 0] @ part.B.t()
                part.G.mul_(share * part.weight.float().norm() / term.norm())
    file = folder / f"{name.lower().replace('/', '-').replace(' ', '-')}.safetensors"
    save_folded(folded, file, encoder=encoder)
    return Case(name, folded, file, dtype, device)


def preferences(count: int) -> Tensor:
    """Sets of ``count`` preferences drawn uniformly from the simplex, float32 [SETS, count, K]."""
    drawn = torch.empty(SETS, count, TASKS).exponential_(generator=torch.Generator().manual_seed(2))
    return drawn / drawn.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Projection:
    """The parts of a folded projection: weight [N, D], bias [N], and A [N, R], G [R, R, K], B [D, R] in float32."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    G: Tensor
    B: Tensor

    @classmethod
    def of(cls, module: ParetoModule, name: str) -> Projection:
        """Parameter ``name`` of a folded layer."""
        bias = module._parameters[name.replace("weight", "bias")]
        stored = module.pareto_parameter(name)
        term = stored.low_rank()
        assert term is not None
        return cls(stored.weight.detach(), None if bias is None else bias.detach(), *(t.detach() for t in term))

    def merged(self, gamma: Tensor, out: Tensor | None = None) -> Tensor:
        """W(γ) [N, D] in the type of the weight."""
        return pmkernels.merge_weight(self.weight, A=self.A, G=self.G, B=self.B, gamma=gamma, out=out)


class LinearAttention(nn.Module):
    """Self-attention of two projections, called as open_clip calls nn.MultiheadAttention."""

    def __init__(self, in_proj: nn.Module, out_proj: nn.Module, heads: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.heads = in_proj, out_proj, heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[n, tokens, E] -> [n, tokens, E]; key and value are the query."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(query).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def tower(folded: nn.Module, make: Callable[[Projection], nn.Module]) -> nn.Module:
    """The folded tower with what ``make`` makes of each projection in its place; other weights are shared."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in folded.state_dict(keep_vars=True).values()}
    built = copy.deepcopy(folded, memo)
    # its preference is nobody's here
    built.__dict__.pop("pareto", None)
    for parent in list(built.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ParetoAttention):
                out = child.out_proj
                assert isinstance(out, ParetoModule)
                in_proj, out_proj = Projection.of(child, "in_proj_weight"), Projection.of(out, "weight")
                setattr(parent, name, LinearAttention(make(in_proj), make(out_proj), child.num_heads))
    return built.eval()


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear of these very tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def plain_model(case: Case, request: Request) -> Variant:
    """The model merged at the first preference, as :func:`pareto_merging.merge` gives it."""
    model = merge(case.folded, request.distinct[0])
    return Variant(LIMIT, lambda images, _: model(images), (model,), set_up=True, single=True)


def plain_linear_model(case: Case, request: Request) -> Variant:
    """The same with the attention that the variants below have."""
    gamma = request.distinct_on_device[0]
    model = tower(case.folded, lambda part: linear(part.merged(gamma), part.bias))
    return Variant(LIMIT_LINEAR, lambda images, _: model(images), (model,), set_up=True, single=True)


def engine(case: Case, request: Request) -> Variant:
    """Ours, from the folded file; preferences come from the host, as requests do."""
    made = Engine(case.file, device=case.device, dtype=case.dtype, max_batch=len(request.each))
    # images that its CUDA graphs read are no weights
    return Variant(ENGINE, lambda images, request: made(images, request.each), (made,), weights=lambda: int(made.bytes))


def engine_again(case: Case, request: Request) -> Variant:
    """An engine that is asked for one preference by every request, and has kept its merged weights.

    Raises:
        Unavailable: requests with several.
    """
    if len(request.distinct) > 1:
        raise Unavailable("nothing is kept of several preferences")
    return replace(engine(case, request), name=ENGINE_AGAIN, set_up=True)


def engine_on_device(case: Case, request: Request) -> Variant:
    """An engine whose preferences are on the GPU already: it cannot see that some are equal.

    Raises:
        Unavailable: not on a GPU, where the host sees them all.
    """
    if case.device.type != "cuda":
        raise Unavailable("the host is the device")
    of = engine(case, request)
    (made,) = of.holds
    return replace(of, name=ENGINE_DEVICE, run=lambda images, request: made(images, request.each_on_device))


class Remerged(nn.Module):
    """A projection with a weight of its own to merge into."""

    weight: Tensor

    def __init__(self, part: Projection) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("weight", part.weight.clone())

    def merge(self, gamma: Tensor) -> None:
        """W(γ) at gamma [K] from now on."""
        self.part.merged(gamma, out=self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[*, D] -> [*, N]."""
        return F.linear(x, self.weight, self.part.bias)


def merge_again(case: Case, request: Request) -> Variant:
    """For each distinct preference: merge into one workspace in place, then run its items."""
    model, count = tower(case.folded, Remerged), len(request.distinct)
    layers = [module for module in model.modules() if isinstance(module, Remerged)]

    def run(images: Tensor, request: Request) -> Tensor:
        found: list[Tensor] = []
        for index in range(count):
            gamma = request.distinct_on_device[index]
            for layer in layers:
                layer.merge(gamma)
            found.append(model(images[index::count]))
        return _in_order(found)

    return Variant(REMERGE, run, (model,))


def _in_order(found: Sequence[Tensor]) -> Tensor:
    """P groups of features [n / P, dim] -> [n, dim] with item i from group i mod P."""
    return torch.stack(list(found), dim=1).flatten(0, 1)


class Copies(nn.Module):
    """A projection merged at P preferences: weights [P, N, D]; its input has the items of each together."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, part: Projection, gammas: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.stack([part.merged(gamma) for gamma in gammas]))
        self.register_buffer("bias", part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, D] -> [n, tokens, N]."""
        grouped, weight = x.reshape(len(self.weight), -1, x.shape[-1]), self.weight.transpose(1, 2)
        y = torch.bmm(grouped, weight) if self.bias is None else torch.baddbmm(self.bias, grouped, weight)
        return y.view(*x.shape[:-1], y.shape[-1])


def merged_copies(case: Case, request: Request) -> Variant:
    """One merged copy of each projection per preference, made beforehand; one batched product over them.

    Raises:
        Unavailable: the copies take more than :data:`SHARE_OF_MEMORY` of what is free.
    """
    count = len(request.distinct)
    projections = [
        Projection.of(module, name).weight for _, module in pareto_modules(case.folded) for name in module.pareto_names
    ]
    needed, free = count * tensor_bytes(projections), _free_memory(case.device)
    if needed > SHARE_OF_MEMORY * free:
        raise Unavailable(f"{count} merged copies take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free")
    model = tower(case.folded, lambda part: Copies(part, request.distinct_on_device))

    def run(images: Tensor, request: Request) -> Tensor:
        grouped = images.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)
        return _in_order(model(grouped).chunk(count))

    return Variant(COPIES, run, (model,), set_up=True)


def _free_memory(device: torch.device) -> float:
    """Bytes that tensors can still take on the device."""
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return math.inf
    return free_memory(device)


@dataclass
class Groups:
    """The preferences [P, K] of the batch that is under way, and which items have each."""

    gammas: Tensor
    items: list[Tensor]


class Looped(nn.Module):
    """A projection and P low-rank terms: one product for all items, then for each preference x·B·Cᵀ·Aᵀ of its own."""

    def __init__(self, part: Projection, groups: Groups) -> None:
        super().__init__()
        self.base, self.G, self.groups = linear(part.weight, part.bias), part.G, groups
        self.low, self.up = part.B.to(part.weight.dtype), part.A.to(part.weight.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, D] -> [n, tokens, N]."""
        cores = reference.preference_core(self.G, self.groups.gammas).transpose(1, 2).to(x.dtype)
        y: Tensor = self.base(x)
        for items, core in zip(self.groups.items, cores, strict=True):
            y[items] += x[items] @ self.low @ core @ self.up
        return y


def looped(case: Case, request: Request) -> Variant:
    """As multi-adapter libraries do it: in each layer, one adapter after the other."""
    count, items = len(request.distinct), len(request.each)
    groups = Groups(
        request.distinct_on_device, [torch.arange(first, items, count, device=case.device) for first in range(count)]
    )
    model = tower(case.folded, lambda part: Looped(part, groups))

    def run(images: Tensor, request: Request) -> Tensor:
        groups.gammas = request.distinct_on_device
        found: Tensor = model(images)
        return found

    return Variant(LOOP, run, (model,))


def peft_version() -> str | None:
    """The version of PEFT, None where it is not installed."""
    try:
        return str(importlib.import_module("peft").__version__)
    except ImportError:
        return None


def peft_mixed_batch(case: Case, request: Request) -> Variant:
    """PEFT itself: every preference is a LoRA adapter, Bᵀ and then A·C(γ), added beforehand, and named for each item.

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
    names = [f"preference_{index}" for index in range(len(request.distinct))]
    model = peft.get_peft_model(plain, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model = model.to(case.device, case.dtype).eval()
    with torch.no_grad():
        for layer in model.modules():
            part = parts.get(id(getattr(layer, "base_layer", None)))
            if part is None:
                continue
            cores = reference.preference_core(part.G, request.distinct_on_device)
            for name, core in zip(names, cores, strict=True):
                layer.lora_A[name].weight.copy_(part.B.t())
                layer.lora_B[name].weight.copy_(part.A @ core)
    each = [names[item % len(names)] for item in range(len(request.each))]
    return Variant(PEFT, lambda images, _: model(images, adapter_names=each), (model,), set_up=True)


# name -> what makes it for requests like one, in the order of the tables
VARIANTS: dict[str, Callable[[Case, Request], Variant]] = {
    LIMIT: plain_model,
    LIMIT_LINEAR: plain_linear_model,
    ENGINE: engine,
    ENGINE_AGAIN: engine_again,
    ENGINE_DEVICE: engine_on_device,
    REMERGE: merge_again,
    COPIES: merged_copies,
    LOOP: looped,
    PEFT: peft_mixed_batch,
}


def graphed(of: Variant, images: Tensor, request: Request) -> Variant:
    """``of`` as a CUDA graph over inputs that every call copies into its own.

    Raises:
        Unavailable: it cannot be captured.
    """
    device = images.device
    own, gammas, each = images.clone(), request.distinct_on_device.clone(), request.each_on_device.clone()
    inside = Request(request.distinct, request.each, gammas, each)
    compute = functools.partial(of.run, own, inside)
    try:
        warm_up(compute, device)
        graph, found = capture(compute, device)
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise Unavailable(f"no CUDA graph of it: {error}"[:200]) from error

    def run(images: Tensor, request: Request) -> Tensor:
        own.copy_(images)
        gammas.copy_(request.distinct_on_device)
        each.copy_(request.each_on_device)
        graph.replay()
        return found

    return replace(of, name=f"{of.name}{GRAPH}", run=run)


def tensor_bytes(*objects: Any) -> int:
    """Bytes of all tensors that are reached from ``objects``, memory that several of them share counted once."""
    storages = {}
    for tensor in _tensors(list(objects)):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def _tensors(waiting: list[Any]) -> Iterator[Tensor]:
    seen: dict[int, Any] = {}
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | types.ModuleType | str | bytes | int | float):
            continue
        # kept, so that no other object gets its address
        seen[id(found)] = found
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, Mapping):
            waiting += list(found.values())
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += list(found)
        elif isinstance(found, functools.partial):
            waiting += [found.func, found.args, found.keywords]
        elif isinstance(found, types.MethodType):
            waiting.append(found.__self__)
        elif isinstance(found, types.FunctionType):
            waiting += list(inspect.getclosurevars(found).nonlocals.values())
        else:
            waiting.append(getattr(found, "__dict__", {}))
            waiting += [getattr(found, name, None) for name in getattr(type(found), "__slots__", ())]
