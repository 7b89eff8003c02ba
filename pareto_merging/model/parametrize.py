"""Any nn.Module and K fine-tuned copies of it, turned into a Pareto model."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.model.convert import convert, prepare_transformers, unchanged_on_error
from pareto_merging.model.copies import Weights, check_copies, names_in, read_tensor
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.learned import Granularity, lambda_group
from pareto_merging.model.parameters import part_name
from pareto_merging.model.pieces import pieces_of
from pareto_merging.model.preprocessing import Preprocess, PreprocessName, check_density, make_preprocess
from pareto_merging.model.state import Computation, ParetoState, pareto_states
from pareto_merging.model.stored import PretrainedWeights, forget_stored
from pareto_merging.model.task_vectors import Sources, give_back_free_memory
from pareto_merging.preferences import equal_preference

LowRank: TypeAlias = Literal["attention", "in-projection", "all", "none"] | Callable[[str, nn.Module], bool]
Core: TypeAlias = Literal["tensor", "outer-product", "outer-vector"]
CORES: tuple[str, ...] = ("tensor", "outer-product", "outer-vector")
# part -> it, of one parameter; all names of each parameter, and its parts
Parts: TypeAlias = dict[str, nn.Parameter]
Planned: TypeAlias = Sequence[tuple[list[str], Parts]]

# Kaiming uniform (He et al. 2015, gain √2) over the dimension that A and B share with the weight; the paper names the
# distribution but not the fan. A file made with another rule says so.
INITIAL_SCALE = "kaiming-uniform: A ~ U(±sqrt(6/out)), B ~ U(±sqrt(6/in)), G = 0"
OUTER_INITIAL_SCALE = "kaiming-uniform: A = 0, B ~ U(±sqrt(6/in))"

# what a Pareto set file says of how its model was built
NOTED = (
    *("rank", "low_rank", "init_lambda", "granularity", "buffers", "seed", "initial_scale"),
    *("preprocess", "density", "core", "constant_rank"),
)

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_OUT_PROJECTION = re.compile(r"(^|\.)(out_proj|o_proj|proj|to_out(\.\d+)?|c_proj|dense|wo)$")


def parametrize(
    pretrained: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights],
    rank: int = 16,
    low_rank: LowRank = "attention",
    *,
    init_lambda: float = 0.3,
    granularity: Granularity = "tensor",
    buffers: Literal["pretrained", "average"] = "pretrained",
    seed: int = 0,
    digests: bool = True,
    preprocess: PreprocessName | Preprocess = "none",
    density: float = 0.2,
    core: Core = "tensor",
    constant_rank: int = 0,
    copy: bool = True,
) -> nn.Module:
    """Turn a pretrained module and K fine-tuned copies into a Pareto model. It has the same class and call signature.

    Every floating-point parameter becomes W0 + Σ_k λ_k τ_k with τ_k = W_k − W0; the chosen projections add the low-rank
    term A·(G ×₃ γ)·Bᵀ. Only λ, A, G and B require a gradient. The model is a copy, unless ``copy=False``: W0 and the
    task vectors are held once, in the dtype and on the device of ``pretrained``, and ``pretrained`` is left alone. A
    parameter whose task vectors are all zero stores none. It starts at the equal preference, with the low-rank term at
    zero.

    Precision: W_k and W0 are taken as they are given, whatever the two dtypes, subtracted in float32 (float64 where one
    of them is), and τ_k is rounded to the dtype of ``pretrained`` once. A module in 16 bits that was made of a wider
    one has lost W0 as stored: see :func:`remember_stored`. W0's own rounding is in no task vector
    (:mod:`pareto_merging.model.stored` says why).

    Memory: beside ``pretrained`` and what the result holds, one tensor of one copy at a time, as its mapping gave it,
    and pieces of a megabyte. So with lazy mappings and ``copy=False`` building takes K + 1 models and one tensor. Where
    task vectors are rounded, "one tensor" is three of its shape: W0 and one W_k as stored, and what rounding changed,
    in bfloat16. A ``preprocess`` adds, for one parameter at a time, its K task vectors in float32 and what the function
    makes of them (about 4·K tensors in all under ``"ties"``, 2·K under ``"dare"``).

    Args:
        pretrained: the module all copies started from.
        finetuned: K copies, as modules or as state dicts; in a mapping the keys are the task names, otherwise the tasks
            are ``task_1`` … ``task_K``. A state dict may be any mapping, such as one that reads a file whenever it is
            asked for a tensor: what it gave is let go before the next is asked for. Each tensor is read once to look at
            its shape, and once to use it (more often with a ``preprocess``, or where tensors are tied). A mapping with
            an attribute ``shapes``, the shape of each of its tensors by name (``Mapping[str, Sequence[int]]``), is
            not read for the first.
        rank: r of the low-rank term.
        low_rank: which matrices have it: ``"attention"`` (in- and out-projections), ``"in-projection"`` (q, k and v
            alone, the paper's "+0.5 %" of parameters), ``"all"`` linear layers, ``"none"``, or a function of the
            parameter's name and its module.
        init_lambda: where every λ starts.
        granularity: one λ vector per parameter ``"tensor"`` (as the published AdaMerging code has it), per
            ``"module"``, per ``"block"`` (up to the last number in the name: ``resblocks.3``), or for the ``"model"``.
        buffers: floating-point buffers (batch norm's statistics) of the ``"pretrained"`` model, or the ``"average"`` of
            the fine-tuned ones.
        seed: of the starting values of A and B.
        preprocess: what is done to the task vectors first: ``"ties"`` (trim and elect signs, as Pareto Merging++ and
            AdaMerging++ do), ``"dare"`` (drop at random and rescale), or any function of a parameter's name and its
            task vectors [K, *shape] in float32 that gives others of the same shape.
        density: the share of its entries each task vector keeps under ``"ties"`` and ``"dare"``.
        core: how the preference enters the low-rank term: ``"tensor"``, or one of the paper's outer products
            (:func:`preference_core`; they learn A and B only, r = K).
        constant_rank: r_c of a term A_c·B_cᵀ that no preference changes, in every matrix and convolution (as [out,
            in·k·k]; at most the matrix's own rank) but embeddings' tables. :func:`fold` and :func:`merge` add it to the
            base: it costs nothing to serve. Not in the published method.
        digests: record a SHA-256 of every set of weights, for the Pareto set file (about a second per 1.5 GB).
        copy: False turns ``pretrained`` itself into the Pareto model and returns it: there is no second W0 in memory.
            On an error it is the plain module that it was.

    Longer than 60 lines because every setting is explained here.

    Raises:
        ValueError: no copies; missing, extra or differently shaped tensors (all are named, with the task); tensors
            tied in ``pretrained`` but different in a copy; NaN or inf in a copy; a setting out of range. TypeError: not
            a module, or something else than tensors.
    """
    if not isinstance(pretrained, nn.Module):
        raise TypeError(f"pretrained: expected an nn.Module, got {type(pretrained).__name__}")
    if isinstance(pretrained, torch.jit.ScriptModule):
        raise TypeError("pretrained: expected a plain nn.Module, got a ScriptModule")
    if pareto_states(pretrained):
        raise ValueError("pretrained: expected a plain module, got a Pareto model")
    how = preprocess, density, core, constant_rank
    settings = _Settings(rank, low_rank, init_lambda, granularity, buffers, seed, *how)
    settings.check()
    if not isinstance(copy, bool):
        raise ValueError(f"copy: expected True or False, got {copy!r}")
    model = deepcopy(pretrained) if copy else pretrained
    copies, tensors = check_copies(model, finetuned)
    names = tuple(copies)
    if "pretrained" in names:
        raise ValueError("finetuned: expected task names other than pretrained, which is the model they came from")
    if core != "tensor":
        settings = replace(settings, rank=len(names))
    state = ParetoState(names, Computation(equal_preference(len(names))), settings=settings.noted(), core=core)
    parameters = [(group, tensor) for group, tensor in tensors if isinstance(tensor, nn.Parameter)]
    as_stored = PretrainedWeights(model)
    weights = parameters, copies, as_stored
    change = preprocess if callable(preprocess) else make_preprocess(preprocess, density, seed, *weights)
    hashers = {name: TensorDigest() for name in ("pretrained", *names)} if digests else {}
    sources = Sources(as_stored, copies, change, hashers=hashers)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        plan = functools.partial(_parts, model, sources, settings, generator)
        planned = [(group, plan(group, tensor)) for group, tensor in parameters]
    # what is above changes nothing in the model
    with unchanged_on_error(model, buffers=not copy and buffers == "average"):
        with torch.no_grad():
            _merge_buffers(tensors, sources, buffers)
        _register(model, planned, settings, state)
        prepare_transformers(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for _, pareto in pareto_modules(model):
            for _, parameter in pareto.pareto_learned():
                parameter.requires_grad_(True)
        object.__setattr__(model, "pareto", state)
        device = next((t.device for t in model.state_dict().values()), state.now.gamma.device)
        state.now.gamma = state.now.gamma.to(device)
        state.digests = {name: hasher.hexdigest() for name, hasher in sources.hashers.items()}
        state.stored_dtypes = sources.precision.dtypes()
        state.rounding_error = sources.precision.relative_error
    return forget_stored(model)


@dataclass(frozen=True)
class _Settings:
    """How a Pareto model is made of its weights: :func:`parametrize` explains each."""

    rank: int
    low_rank: LowRank
    init_lambda: float
    granularity: Granularity
    buffers: str
    seed: int
    preprocess: PreprocessName | Preprocess
    density: float
    core: Core
    constant_rank: int

    def check(self) -> None:
        """Raise ValueError for a setting out of range."""
        rank, low_rank, init_lambda, seed = self.rank, self.low_rank, self.init_lambda, self.seed
        if not callable(low_rank) and low_rank not in ("attention", "in-projection", "all", "none"):
            raise ValueError(f"low_rank: expected attention, in-projection, all, none or a function, got {low_rank!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or (rank < 1 and low_rank != "none"):
            raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}")
        if self.granularity not in ("tensor", "module", "block", "model"):
            raise ValueError(f"granularity: expected tensor, module, block or model, got {self.granularity!r}")
        if self.buffers not in ("pretrained", "average"):
            raise ValueError(f"buffers: expected pretrained or average, got {self.buffers!r}")
        if not isinstance(init_lambda, int | float) or not math.isfinite(init_lambda):
            raise ValueError(f"init_lambda: expected a finite number, got {init_lambda!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected a whole number, got {seed!r}")
        if self.core not in CORES:
            raise ValueError(f"core: expected {', '.join(CORES)}, got {self.core!r}")
        if isinstance(self.constant_rank, bool) or not isinstance(self.constant_rank, int) or self.constant_rank < 0:
            raise ValueError(f"constant_rank: expected a whole number of at least 0, got {self.constant_rank!r}")
        check_density(self.density)

    def noted(self) -> dict[str, Any]:
        """Return them as a Pareto set file has them."""
        scale = INITIAL_SCALE if self.core == "tensor" else OUTER_INITIAL_SCALE
        values = {**vars(self), "initial_scale": scale, "density": float(self.density)}
        return {name: "function" if callable(values[name]) else values[name] for name in NOTED}


def _parts(
    model: nn.Module,
    sources: Sources,
    settings: _Settings,
    generator: torch.Generator,
    names: list[str],
    weight: Tensor,
) -> Parts:
    """Read the task vectors of one parameter, and start its low-rank term. What it lacks is left out."""
    parts: Parts = {}
    base = sources.pretrained(names, weight)
    sources.precision.count("pretrained", sources.pretrained.dtype(names, base), base.numel())
    if sources.hashers:
        sources.hashers["pretrained"].add(names[0], base)
    task_vectors = sources.task_vectors(names, weight, base)
    if base.data_ptr() != weight.data_ptr():
        del base
        give_back_free_memory(weight.numel())
    if task_vectors is not None:
        parts["task_vectors"] = nn.Parameter(task_vectors, requires_grad=False)
    if weight.ndim == 2 and any(wants_low_rank(model, name, settings.low_rank) for name in names):
        # drawn in float32 in every dtype, A before B
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rank, device = settings.rank, weight.device
        A, B = (_kaiming_uniform(size, rank, generator).to(device, dtype) for size in weight.shape)
        parts["A"] = nn.Parameter(A)
        if settings.core == "tensor":
            parts["G"] = nn.Parameter(torch.zeros(rank, rank, len(sources.copies), dtype=dtype, device=device))
        else:
            # without a G that starts at zero it is A that does, or the model would not start at its base
            A.zero_()
        parts["B"] = nn.Parameter(B)
    if settings.constant_rank and (size := constant_size(model, names[0], weight, settings.constant_rank)) is not None:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        outputs, inputs, rank = size
        parts["A_c"] = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=weight.device))
        parts["B_c"] = nn.Parameter(_kaiming_uniform(inputs, rank, generator).to(weight.device, dtype))
    return parts


def constant_size(model: nn.Module, name: str, weight: Tensor, rank: int) -> tuple[int, int, int] | None:
    """Return out, in and r_c of a parameter's constant term; None where it has none."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if weight.ndim < 2 or not weight.numel() or isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return None
    outputs, inputs = weight.shape[0], weight[0].numel()
    return outputs, inputs, min(rank, outputs, inputs)


def wants_low_rank(model: nn.Module, name: str, low_rank: LowRank) -> bool:
    """Tell if the matrix ``name`` of ``model`` has a low-rank term under a setting."""
    if low_rank == "none":
        return False
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if callable(low_rank):
        return low_rank(name, owner)
    is_linear = isinstance(owner, nn.Linear) and attribute == "weight"
    if low_rank == "all" and (is_linear or isinstance(owner, nn.MultiheadAttention)):
        return attribute == "weight" or attribute.endswith("proj_weight")
    # attention by the names on the way to it (blocks.0.attn.qkv) or by the class that holds it (CLIPAttention's q_proj)
    parent = model.get_submodule(owner_name.rpartition(".")[0])
    in_attention = any(_ATTENTION.search(part) for part in owner_name.split(".")[-4:]) or any(
        _ATTENTION.search(type(module).__name__) and any(isinstance(child, nn.Linear) for child in module.children())
        for module in (owner, parent)
    )
    if isinstance(owner, nn.MultiheadAttention) or (_ATTENTION.search(type(owner).__name__) and not is_linear):
        in_attention = True
    if not in_attention or not (is_linear or attribute.endswith("proj_weight")):
        return False
    return low_rank in ("attention", "all") or not _OUT_PROJECTION.search(owner_name)


def _kaiming_uniform(size: int, rank: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6.0 / size)
    return torch.empty(size, rank, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _merge_buffers(tensors: Sequence[tuple[Sequence[str], Tensor]], sources: Sources, buffers: str) -> None:
    """Average floating-point buffers over the copies where that is the setting, and digest all."""
    for names, tensor in tensors:
        is_averaged = buffers == "average" and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter) or not (sources.hashers or is_averaged):
            continue
        if sources.hashers:
            sources.hashers["pretrained"].add(names[0], sources.pretrained(names, tensor))
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total = torch.zeros_like(tensor, dtype=wide) if is_averaged else None
        for task, weights in sources.copies.items():
            value = read_tensor(weights, names_in(names, weights)[0], task, tensor)
            if sources.hashers:
                sources.hashers[task].add(names[0], value)
            if total is not None:
                for index in pieces_of(tensor.shape):
                    total[index] += value[index].to(total)
            # before the next one is read
            del value
        if total is not None:
            tensor.copy_(total.div_(len(sources.copies)))


def _register(model: nn.Module, planned: Planned, settings: _Settings, state: ParetoState) -> None:
    """Convert the modules that own a planned parameter under any of its names. They get its parts."""
    lambdas: dict[str, nn.Parameter] = {}
    # a module comes once, whatever names it has itself
    owners: dict[nn.Module, dict[str, tuple[str, Parts]]] = {}
    for names, parts in planned:
        group = lambda_group(names[0], settings.granularity)
        if (task_vectors := parts.get("task_vectors")) is not None:
            if group not in lambdas:
                dtype = torch.float64 if task_vectors.dtype == torch.float64 else torch.float32
                shape, start = (len(state.task_names),), float(settings.init_lambda)
                lambdas[group] = nn.Parameter(torch.full(shape, start, dtype=dtype, device=task_vectors.device))
            parts["lam"] = lambdas[group]
        for name in names if parts else ():
            owner, _, attribute = name.rpartition(".")
            owners.setdefault(model.get_submodule(owner), {})[attribute] = group, parts
    for module, attributes in owners.items():
        pareto = convert(module, list(attributes), state)
        for attribute, (group, parts) in attributes.items():
            if "lam" in parts:
                pareto.pareto_groups[attribute] = group
            for part, value in parts.items():
                pareto.register_parameter(part_name(attribute, part), value)
