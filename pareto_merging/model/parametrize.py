"""Any nn.Module and K fine-tuned copies of it -> a Pareto model; and from there back to plain modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.model.convert import convert, prepare_transformers, unchanged_on_error
from pareto_merging.model.copies import Weights, check_copies, names_in, read_tensor
from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.layer import ParetoModule, pareto_modules, part_name
from pareto_merging.model.low_rank import LowRank, wants_low_rank
from pareto_merging.model.parameters import Granularity, lambda_group
from pareto_merging.model.pieces import pieces_of
from pareto_merging.model.preprocessing import Preprocess, PreprocessName, check_density, make_preprocess
from pareto_merging.model.state import ParetoState, pareto_states
from pareto_merging.model.stored import Precision, PretrainedWeights, forget_stored
from pareto_merging.model.task_vectors import LARGE, give_back_free_memory, task_vectors_of
from pareto_merging.preferences import equal_preference

Core: TypeAlias = Literal["tensor", "outer-product", "outer-vector"]
CORES: tuple[str, ...] = ("tensor", "outer-product", "outer-vector")

# Kaiming uniform (He et al. 2015, gain √2) over the dimension that A and B share with the weight; the paper names the
# distribution but not the fan. A file made with another rule says so.
INITIAL_SCALE = "kaiming-uniform: A ~ U(±sqrt(6/out)), B ~ U(±sqrt(6/in)), G = 0"


OUTER_INITIAL_SCALE = "kaiming-uniform: A = 0, B ~ U(±sqrt(6/in))"


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
    copy: bool = True,
) -> nn.Module:
    """Turn a pretrained module and K fine-tuned copies into a Pareto model: the same class, the same call signature.

    Every floating-point parameter becomes W0 + Σ_k λ_k τ_k with τ_k = W_k − W0; the chosen projections add the low-rank
    term A·(G ×₃ γ)·Bᵀ. Only λ, A, G and B require a gradient. The model is a copy, unless ``copy=False``: W0 and the
    task vectors are held once, in the dtype and on the device of ``pretrained``, and ``pretrained`` is left alone. A
    parameter whose task vectors are all zero stores none. It starts at the equal preference, with the low-rank term at
    zero.

    Precision: W_k and W0 are taken as they are given, whatever the two dtypes, subtracted in float32 (float64 where one
    of them is), and τ_k is rounded to the dtype of ``pretrained`` once. A module in 16 bits that was made of a wider
    one has lost W0 as stored; that of :func:`load_models` remembers where it is, and your own does after
    :func:`remember_stored`. W0's own rounding is in no task vector (:mod:`pareto_merging.model.stored` says why).

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
        digests: record a SHA-256 of every set of weights, for the Pareto set file (about a second per 1.5 GB).
        copy: False turns ``pretrained`` itself into the Pareto model and returns it: there is no second W0 in memory.
            On an error it is the plain module that it was.

    Raises:
        ValueError: no copies; missing, extra or differently shaped tensors (all are named, with the task); tensors
            tied in ``pretrained`` but different in a copy; NaN or inf in a copy; a setting out of range. TypeError: not
            a module, or something else than tensors.
    """
    _check_settings(pretrained, rank, low_rank, granularity, buffers, init_lambda, seed)
    if core not in CORES:
        raise ValueError(f"core: expected {', '.join(CORES)}, got {core!r}")
    check_density(density)
    if not isinstance(copy, bool):
        raise ValueError(f"copy: expected True or False, got {copy!r}")
    model = deepcopy(pretrained) if copy else pretrained
    copies, tensors = check_copies(model, finetuned)
    names = tuple(copies)
    if "pretrained" in names:
        raise ValueError("finetuned: expected task names other than pretrained, which is the model they came from")
    rank = rank if core == "tensor" else len(names)
    as_stored, precision = PretrainedWeights(model), Precision()
    apply = preprocess if callable(preprocess) else None
    if not callable(preprocess):
        parameters = [(group, tensor) for group, tensor in tensors if isinstance(tensor, nn.Parameter)]
        apply = make_preprocess(preprocess, density, seed, parameters, copies, as_stored)
    state = ParetoState(
        names,
        equal_preference(len(names)),
        settings={
            "rank": rank,
            "low_rank": low_rank if isinstance(low_rank, str) else "function",
            "init_lambda": init_lambda,
            "granularity": granularity,
            "buffers": buffers,
            "seed": seed,
            "initial_scale": INITIAL_SCALE if core == "tensor" else OUTER_INITIAL_SCALE,
            "preprocess": preprocess if isinstance(preprocess, str) else "function",
            "density": float(density),
            "core": core,
        },
        core=core,
    )
    hashers = {name: TensorDigest() for name in ("pretrained", *names)} if digests else {}

    generator = torch.Generator("cpu").manual_seed(seed)
    lambdas: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        plans = [
            _plan(
                *(model, group, tensor, copies, rank, low_rank, generator, hashers, apply, core),
                as_stored=as_stored,
                precision=precision,
            )
            for group, tensor in tensors
            if isinstance(tensor, nn.Parameter)
        ]
    # by identity: one module may have several names
    owners: dict[int, tuple[nn.Module, list[str]]] = {}
    for plan in plans:
        if plan["task_vectors"] is None and plan["A"] is None:
            continue
        for name in plan["names"]:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            attributes = owners.setdefault(id(module), (module, []))[1]
            if attribute not in attributes:
                attributes.append(attribute)
    # what is above changes nothing in the model
    with unchanged_on_error(model, buffers=not copy and buffers == "average"):
        with torch.no_grad():
            _merge_buffers(tensors, copies, buffers, hashers, as_stored)
        for module, attributes in owners.values():
            convert(module, attributes, state)
        prepare_transformers(model)
        for plan in plans:
            _register(model, plan, granularity, init_lambda, len(names), lambdas)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for _, pareto in pareto_modules(model):
            for _, parameter in pareto.pareto_learned():
                parameter.requires_grad_(True)
        object.__setattr__(model, "pareto", state)
        device = next((t.device for t in model.state_dict().values()), state.gamma.device)
        state.gamma = state.gamma.to(device)
        state.digests = {name: hasher.hexdigest() for name, hasher in hashers.items()}
        state.stored_dtypes, state.rounding_error = precision.dtypes(), precision.relative_error
    return forget_stored(model)


def _check_settings(
    pretrained: Any, rank: Any, low_rank: Any, granularity: str, buffers: str, init_lambda: Any, seed: Any
) -> None:
    if not isinstance(pretrained, nn.Module):
        raise TypeError(f"pretrained: expected an nn.Module, got {type(pretrained).__name__}")
    if isinstance(pretrained, torch.jit.ScriptModule):
        raise TypeError("pretrained: expected a plain nn.Module, got a ScriptModule")
    if pareto_states(pretrained):
        raise ValueError("pretrained: expected a plain module, got a Pareto model")
    if not callable(low_rank) and low_rank not in ("attention", "in-projection", "all", "none"):
        raise ValueError(f"low_rank: expected attention, in-projection, all, none or a function, got {low_rank!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or (rank < 1 and low_rank != "none"):
        raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}")
    if granularity not in ("tensor", "module", "block", "model"):
        raise ValueError(f"granularity: expected tensor, module, block or model, got {granularity!r}")
    if buffers not in ("pretrained", "average"):
        raise ValueError(f"buffers: expected pretrained or average, got {buffers!r}")
    if not isinstance(init_lambda, int | float) or not math.isfinite(init_lambda):
        raise ValueError(f"init_lambda: expected a finite number, got {init_lambda!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected a whole number, got {seed!r}")


def _plan(
    model: nn.Module,
    names: list[str],
    weight: Tensor,
    copies: Mapping[str, Mapping[str, Tensor]],
    rank: int,
    low_rank: LowRank,
    generator: torch.Generator,
    hashers: Mapping[str, TensorDigest],
    preprocess: Preprocess | None,
    core: Core,
    *,
    as_stored: PretrainedWeights,
    precision: Precision,
) -> dict[str, Any]:
    """One parameter (with all its names): its task vectors, and A, G and B where it is to have a low-rank term."""
    plan: dict[str, Any] = {"names": names, "task_vectors": None, "A": None, "G": None, "B": None}
    base = as_stored(names, weight)
    precision.count("pretrained", as_stored.dtype(names, base), base.numel())
    if hashers:
        hashers["pretrained"].add(names[0], base)
    task_vectors = task_vectors_of(names, weight, base, copies, precision, preprocess, hashers)
    if base.data_ptr() != weight.data_ptr():
        del base
        if weight.numel() >= LARGE:
            give_back_free_memory()
    if task_vectors is not None:
        plan["task_vectors"] = nn.Parameter(task_vectors, requires_grad=False)
    if weight.ndim == 2 and any(wants_low_rank(model, name, low_rank) for name in names):
        out_features, in_features = weight.shape
        for part, size in (("A", out_features), ("B", in_features)):
            bound = math.sqrt(6.0 / size)
            start = torch.empty(size, rank, dtype=torch.float32, device="cpu")
            start.uniform_(-bound, bound, generator=generator)
            if core != "tensor" and part == "A":
                # without a G that starts at zero it is A that does, or the model would not start at its base
                start.zero_()
            plan[part] = nn.Parameter(start.to(weight.device))
        if core == "tensor":
            plan["G"] = nn.Parameter(torch.zeros(rank, rank, len(copies), dtype=torch.float32, device=weight.device))
        if weight.dtype == torch.float64:
            for part in ("A", "G", "B"):
                plan[part] = None if plan[part] is None else nn.Parameter(plan[part].detach().double())
    return plan


def _merge_buffers(
    tensors: Sequence[tuple[Sequence[str], Tensor]],
    copies: Mapping[str, Mapping[str, Tensor]],
    buffers: str,
    hashers: Mapping[str, TensorDigest],
    as_stored: PretrainedWeights,
) -> None:
    for names, tensor in tensors:
        is_averaged = buffers == "average" and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter) or not (hashers or is_averaged):
            continue
        if hashers:
            hashers["pretrained"].add(names[0], as_stored(names, tensor))
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total = torch.zeros_like(tensor, dtype=wide) if is_averaged else None
        for task, weights in copies.items():
            value = read_tensor(weights, names_in(names, weights)[0], task, tensor)
            if hashers:
                hashers[task].add(names[0], value)
            if total is not None:
                for index in pieces_of(tensor.shape):
                    total[index] += value[index].to(total)
            # before the next one is read
            del value
        if total is not None:
            tensor.copy_(total.div_(len(copies)))


def _register(
    model: nn.Module,
    plan: Mapping[str, Any],
    granularity: Granularity,
    init_lambda: float,
    tasks: int,
    lambdas: dict[str, nn.Parameter],
) -> None:
    """Register the parts of one parameter with every module that owns it."""
    if plan["task_vectors"] is None and plan["A"] is None:
        return
    group = lambda_group(plan["names"][0], granularity)
    lam = None
    if plan["task_vectors"] is not None:
        weight = plan["task_vectors"]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if group not in lambdas:
            lambdas[group] = nn.Parameter(torch.full((tasks,), float(init_lambda), dtype=dtype, device=weight.device))
        lam = lambdas[group]
    for name in plan["names"]:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        assert isinstance(module, ParetoModule)
        if lam is not None:
            module.pareto_groups[attribute] = group
        for part, value in {**plan, "lam": lam}.items():
            if part != "names" and value is not None:
                module.register_parameter(part_name(attribute, part), value)
