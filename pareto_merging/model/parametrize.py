"""Any nn.Module and K fine-tuned copies of it -> a Pareto model; and from there back to plain modules."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from pareto_merging.model.modules import LEARNED, ParetoModule, convert, pareto_modules, part_name, restore
from pareto_merging.model.preprocessing import (
    Preprocess,
    PreprocessName,
    check_density,
    extremes,
    make_preprocess,
    pieces_of,
    widest,
)
from pareto_merging.model.state import ParetoState, pareto_state, pareto_states
from pareto_merging.model.stored import Differences, Precision, PretrainedWeights, forget_stored, rounded
from pareto_merging.preferences import Preference, check_preference, equal_preference

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]
LowRank: TypeAlias = Literal["attention", "in-projection", "all", "none"] | Callable[[str, nn.Module], bool]
Granularity: TypeAlias = Literal["tensor", "module", "block", "model"]
Core: TypeAlias = Literal["tensor", "outer-product", "outer-vector"]
CORES: tuple[str, ...] = ("tensor", "outer-product", "outer-vector")

# Kaiming uniform (He et al. 2015, gain √2) over the dimension that A and B share with the weight; the paper names the
# distribution but not the fan. A file made with another rule says so.
INITIAL_SCALE = "kaiming-uniform: A ~ U(±sqrt(6/out)), B ~ U(±sqrt(6/in)), G = 0"

# from this many numbers on, a tensor that was read and let go leaves memory worth giving back
LARGE = 1 << 17

OUTER_INITIAL_SCALE = "kaiming-uniform: A = 0, B ~ U(±sqrt(6/in))"

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


@contextlib.contextmanager
def unchanged_on_error(model: Any, *, buffers: bool) -> Iterator[None]:
    """A block that turns the plain module ``model`` into a Pareto model; if it fails, the module is plain again.

    ``buffers``: whether it may change the numbers in floating-point buffers, which are then kept until it is through.
    What is no plain module to begin with is not touched.
    """
    if not isinstance(model, nn.Module) or pareto_states(model):
        yield
        return
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(tensor, tensor.clone()) for tensor in model.buffers() if buffers and tensor.is_floating_point()]
    try:
        yield
    except BaseException:
        _make_plain(model)
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


def _make_plain(model: nn.Module) -> None:
    """Every module its original class again, with none of our attributes and parts; W0 is where the parameters were."""
    for _, pareto in list(pareto_modules(model)):
        restore(pareto)
    for module in model.modules():
        if isinstance(module.__dict__.get("pareto"), ParetoState):
            del module.__dict__["pareto"]
        module.__dict__.update(module.__dict__.pop("pareto_flags", {}))


def prepare_transformers(model: nn.Module) -> None:
    """What torch's own transformer blocks need around Pareto layers; :func:`merge` puts their flags back.

    nn.TransformerEncoderLayer has a fused inference path that wants each weight as one tensor, nn.TransformerEncoder
    one with nested tensors; the ordinary path calls the layers, which can do more (a preference per item). And in a
    block whose attention is sequence-first, the linear layers beside it have the items along dimension 1 as well.
    """
    for module in list(model.modules()):
        if not any(True for _ in pareto_modules(module)):
            continue
        flags = {}
        if isinstance(module, nn.TransformerEncoderLayer):
            flags = {"activation_relu_or_gelu": 0}
        elif isinstance(module, nn.TransformerEncoder):
            flags = {"enable_nested_tensor": False, "use_nested_tensor": False}
        if flags:
            module.__dict__.setdefault("pareto_flags", {name: getattr(module, name) for name in flags})
            module.__dict__.update(flags)
        attentions = [child for child in module.children() if isinstance(child, nn.MultiheadAttention)]
        if any(not attention.batch_first for attention in attentions):
            for _, inner in pareto_modules(module):
                inner.pareto_batch_dim = 1


class TensorDigest:
    """SHA-256 over named tensors: 16-bit values count as the float32 they stand for, so a file and the model loaded
    from it agree whatever the precision it was loaded in."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self.parts[name] = tensor_digest(tensor)

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(self.parts.items())).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and numbers, as :class:`TensorDigest` takes them; copies a piece at a time."""
    value = tensor.detach()
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    digest = hashlib.sha256(f"{dtype} {list(value.shape)} ".encode())
    for index in pieces_of(value.shape):
        piece = value[index].cpu().to(dtype).contiguous()
        # not view(-1): the strides of a single number may be anything
        raw: Any = piece.as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


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


def check_copies(
    model: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]
) -> tuple[dict[str, Mapping[str, Tensor]], list[tuple[list[str], Tensor]]]:
    """The tensors of each fine-tuned copy by task name, and those of ``model``: (all names of a tensor, the tensor).

    Raises:
        ValueError: no copies, or missing, extra or differently shaped tensors; all are named. TypeError: one copy only.
    """
    if isinstance(finetuned, nn.Module) or (
        isinstance(finetuned, Mapping) and any(isinstance(value, Tensor) for value in finetuned.values())
    ):
        raise TypeError("finetuned: expected a sequence or mapping of K fine-tuned copies, got a single one")
    if not isinstance(finetuned, Mapping | Sequence) or isinstance(finetuned, str):
        raise TypeError(
            f"finetuned: expected a sequence or mapping of K fine-tuned copies, got {type(finetuned).__name__}"
        )
    if not isinstance(finetuned, Mapping):
        finetuned = {f"task_{k + 1}": source for k, source in enumerate(finetuned)}
    if not finetuned:
        raise ValueError("finetuned: expected at least one fine-tuned copy, got none")
    for name in finetuned:
        if not isinstance(name, str):
            raise TypeError(f"finetuned: expected task names that are strings, got {name!r}")
    copies = {name: _tensors(source) for name, source in finetuned.items()}
    tensors = named_tensors(model)
    _check_same_tensors(copies, tensors)
    return copies, tensors


def _tensors(source: Weights) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        # modules may put more than tensors there (get_extra_state)
        return {k: value for k, value in source.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if isinstance(source, LazyTensors):
        return source
    if isinstance(source, Mapping):
        return LazyTensors(source) if not isinstance(source, dict) or _shapes(source) is not None else source
    raise TypeError(f"finetuned: expected modules or state dicts, got {type(source).__name__}")


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that may read a file for each tensor: which names it has is asked once.

    ``name in mapping`` of ``collections.abc.Mapping`` gets the value to see whether there is one.
    """

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source, self.shapes = source, _shapes(source)
        self._names = dict.fromkeys(source if self.shapes is None else self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shapes(source: Mapping[str, Tensor]) -> Mapping[str, Sequence[int]] | None:
    """The shapes that a mapping says its tensors have, if it does."""
    shapes = getattr(source, "shapes", None)
    return shapes if isinstance(shapes, Mapping) else None


def named_tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every tensor of a module's state dict once, with all the names it has there."""
    return [(group, _lookup(model, group[0])) for group in _aliases(model).values()]


def _lookup(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    value: Tensor | None = module._parameters.get(attribute)
    value = module._buffers.get(attribute) if value is None else value
    assert value is not None
    return value


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """The tensors of the model by identity, each with all its names: tied weights have more than one."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            groups.setdefault(id(tensor), []).append(name)
    return groups


def _check_same_tensors(
    copies: Mapping[str, Mapping[str, Tensor]], tensors: Sequence[tuple[Sequence[str], Tensor]]
) -> None:
    problems = []
    known = {name for group, _ in tensors for name in group}
    for task, weights in copies.items():
        present, shapes = set(weights), _shapes(weights)
        # a file may name a tied tensor once
        problems += [f"{task} lacks {group[0]}" for group, _ in tensors if not present.intersection(group)]
        extra = [name for name in sorted(present - known) if shapes is not None or isinstance(weights[name], Tensor)]
        problems += [f"{task} has an extra {name}" for name in extra]
        for group, tensor in tensors:
            expected = list(tensor.shape)
            for name in group:
                if name in present:
                    shape = list(_tensor(weights, name, task).shape if shapes is None else shapes[name])
                    if shape != expected:
                        problems.append(f"{task} has {name} of shape {shape}, expected {expected}")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"finetuned: expected the tensors of pretrained, but {shown}")


def _tensor(weights: Mapping[str, Tensor], name: str, task: str) -> Tensor:
    value = weights[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"finetuned: expected {name} of {task} to be a tensor, got {type(value).__name__}")
    return value.detach()


def _read(weights: Mapping[str, Tensor], name: str, task: str, like: Tensor) -> Tensor:
    """One tensor of a copy, of the shape of ``like``: a lazy mapping reads it here, and may have promised another."""
    value = _tensor(weights, name, task)
    if value.shape != like.shape:
        raise ValueError(
            f"finetuned: expected {name} of {task} to have shape {list(like.shape)}, got {list(value.shape)}"
        )
    return value


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
            _give_back_free_memory()
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


def _give_back_free_memory() -> None:
    """Let the operating system have what the C library keeps of freed memory, where that is glibc.

    Its heap keeps a hole wherever a tensor that was read lay below one that stays, which came to tens of megabytes for
    a model of 12 million parameters. Nothing but the resident memory of the process changes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def task_vectors_of(
    names: Sequence[str],
    weight: Tensor,
    base: Tensor,
    copies: Mapping[str, Mapping[str, Tensor]],
    precision: Precision,
    preprocess: Preprocess | None = None,
    hashers: Mapping[str, TensorDigest] | None = None,
) -> Tensor | None:
    """τ of one parameter, [K, *shape] in the dtype and on the device of ``weight``; None where they are all zero.

    Args:
        names: all it has. weight, base: it in the module, and as stored. precision: what is counted into.
    """
    hashers = hashers or {}
    if not weight.is_floating_point():
        for task, weights in copies.items():
            _subtract(names, weight, task, weights, hashers.get(task), precision, None)
        return None
    dtype = weight.dtype
    if preprocess is not None:
        # what is compared with a threshold is not rounded to 16 bits before
        found = (_tensor(weights, _present(names, weights)[0], task).dtype for task, weights in copies.items())
        dtype = widest([dtype, base.dtype, *found])
    task_vectors, is_zero = torch.empty((len(copies), *weight.shape), dtype=dtype, device=weight.device), True
    differences = Differences(base, task_vectors)
    for number, (task, weights) in enumerate(copies.items()):
        _subtract(names, weight, task, weights, hashers.get(task), precision, (differences, number))
        if isinstance(weights, LazyTensors) and weight.numel() >= LARGE:
            _give_back_free_memory()
        low, high = extremes(task_vectors[number])
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"finetuned: expected finite numbers in {names[0]} of {task} minus pretrained, got NaN or inf"
            )
        is_zero = is_zero and low == high == 0
    differences.add_to(precision)
    if preprocess is not None:
        return _preprocessed(preprocess, names[0], task_vectors, weight, precision)
    return None if is_zero else task_vectors


def _subtract(
    names: Sequence[str],
    weight: Tensor,
    task: str,
    weights: Mapping[str, Tensor],
    hasher: TensorDigest | None,
    precision: Precision,
    target: tuple[Differences, int] | None,
) -> None:
    """Write one parameter of one copy minus W0 to its place in ``target``, rounded once; no target, no difference.

    What was read is let go on return.

    Raises:
        ValueError: another shape than that of ``weight``; names tied in the model that differ in the copy; a parameter
            without a task vector that is not that of the model.
    """
    present = _present(names, weights)
    value, weight = _read(weights, present[0], task, weight), weight.detach()
    precision.count(task, value.dtype, value.numel())
    # what a dict has is in memory anyway
    by_digest = len(present) > 1 and isinstance(weights, LazyTensors)
    digest = tensor_digest(value) if hasher is not None or by_digest else ""
    if hasher is not None:
        hasher.parts[names[0]] = digest
    if target is not None:
        differences, number = target
        differences.write(number, value)
    elif not _equal(value, weight):
        raise ValueError(f"finetuned: {names[0]} is {weight.dtype} and differs in {task}, expected it unchanged")
    del value
    for other in present[1:]:
        # in a lazy mapping two of them are held only where the bits differ, which may still be the same numbers (-0.0)
        if by_digest and tensor_digest(_read(weights, other, task, weight)) == digest:
            continue
        if not _equal(_read(weights, other, task, weight), _read(weights, present[0], task, weight)):
            raise ValueError(f"finetuned: {present[0]} and {other} are tied in pretrained but differ in {task}")


def _present(names: Sequence[str], weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names if name in weights]


def _equal(value: Tensor, other: Tensor) -> bool:
    return all(torch.equal(value[index].to(other.device), other[index]) for index in pieces_of(other.shape))


def _preprocessed(
    preprocess: Preprocess, name: str, task_vectors: Tensor, weight: Tensor, precision: Precision
) -> Tensor | None:
    """On the device and in the dtype of ``weight``, with memory of its own for every number; None if all are zero."""
    result = preprocess(name, task_vectors)
    if not isinstance(result, Tensor) or result.shape != task_vectors.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"preprocess: expected task vectors of shape {list(task_vectors.shape)} for {name}, got {got}")
    result = rounded(result, weight, precision)
    low, high = extremes(result)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"preprocess: expected finite task vectors for {name}, got NaN or inf")
    return None if low == high == 0 else result


def wants_low_rank(model: nn.Module, name: str, low_rank: LowRank) -> bool:
    """Whether the matrix ``name`` of ``model`` has a low-rank term under the setting ``low_rank``."""
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
            value = _read(weights, _present(names, weights)[0], task, tensor)
            if hashers:
                hashers[task].add(names[0], value)
            if total is not None:
                for index in pieces_of(tensor.shape):
                    total[index] += value[index].to(total)
            # before the next one is read
            del value
        if total is not None:
            tensor.copy_(total.div_(len(copies)))


def lambda_group(name: str, granularity: Granularity) -> str:
    """The name of the λ vector that parameter ``name`` uses: ``blocks.3.attn.weight`` -> ``blocks.3`` per block."""
    if granularity == "tensor":
        return name
    if granularity == "model":
        return "model"
    owner = name.rpartition(".")[0]
    if granularity == "module":
        return owner or name
    parts = owner.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else owner or name


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


def lambda_names(model: nn.Module) -> list[str]:
    """The names of the L λ vectors of a Pareto model, in the order of :func:`get_lambda`."""
    return list(_lambdas(model))


def get_lambda(model: nn.Module) -> Tensor:
    """λ of all layers as one [L, K] tensor (a copy), row l belonging to ``lambda_names(model)[l]``."""
    tasks = len(pareto_state(model).task_names)
    rows = list(_lambdas(model).values())
    return torch.stack([row.detach() for row in rows]) if rows else torch.empty(0, tasks, dtype=torch.float32)


def set_lambda(model: nn.Module, values: Tensor) -> None:
    """Set λ of all layers from one [L, K] tensor (or [K] for every layer, or a number for all); finite values."""
    tasks = len(pareto_state(model).task_names)
    rows = list(_lambdas(model).values())
    try:
        values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lambda: expected a tensor of numbers, got {values!r}") from error
    if values.ndim < 2 and values.shape in ((), (tasks,)):
        values = values.expand(len(rows), tasks)
    if values.shape != (len(rows), tasks):
        raise ValueError(f"lambda: expected shape [{len(rows)}, {tasks}], got {list(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("lambda: expected finite numbers, got NaN or inf")
    with torch.no_grad():
        for row, value in zip(rows, values, strict=True):
            row.copy_(value)


def _lambdas(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for _, module in pareto_modules(model):
        for name, group in module.pareto_groups.items():
            parameter = module._parameters[part_name(name, "lam")]
            assert parameter is not None
            if found.setdefault(group, parameter) is not parameter:
                raise ValueError(
                    f"model: expected one λ vector for {group}, got several (load_state_dict(assign=True) takes apart "
                    "what is shared; load without it)"
                )
    return found


def learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """λ, A, G and B of a Pareto model by name, each tensor once: what is trained, and what a Pareto set file holds.

    A λ vector carries the name of its group, ``lam.<group>``; the rest the name of its parameter, ``A.<parameter>``.
    """
    found: dict[str, nn.Parameter] = {f"lam.{group}": parameter for group, parameter in _lambdas(model).items()}
    seen = {id(parameter) for parameter in found.values()}
    for prefix, module in pareto_modules(model):
        for name in module.pareto_names:
            for part in LEARNED:
                parameter = module._parameters.get(part_name(name, part))
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{part}.{prefix}.{name}" if prefix else f"{part}.{name}"] = parameter
    return found


def merge(model: nn.Module, gamma: Preference) -> nn.Module:
    """A new plain module of the original class: the Pareto (or folded) model at one preference.

    Args:
        gamma: ``[K]`` or by task name, on the simplex.

    Returns:
        A module with the pretrained model's ``state_dict`` keys and nothing of ours; its parameters share no memory
        with ``model`` and require gradients, as those of a new module do.

    Raises:
        ValueError: not a Pareto model, or not a preference.
    """
    model = getattr(model, "_orig_mod", model)
    state = pareto_state(model)
    checked = check_preference(gamma, state.task_names, per_item=False).detach()
    plain = _copy_with(model, lambda module, name: module.pareto_merged(name, checked), keep_low_rank=False)
    _make_plain(plain)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def fold(model: nn.Module) -> nn.Module:
    """A new model with λ folded in: one base W0 + Σ λ_k τ_k and the low-rank terms, no task vectors.

    It takes preferences as the Pareto model does and gives the same results at about the memory of one plain model:
    what a server loads. Folding a folded model copies it. Raises ValueError if ``model`` is no Pareto model.
    """
    model = getattr(model, "_orig_mod", model)
    pareto_state(model)
    folded = _copy_with(model, _base, keep_low_rank=True)
    state = pareto_state(folded)
    state.folded = True
    for _, module in list(pareto_modules(folded)):
        kept = []
        for name in module.pareto_names:
            for part in ("task_vectors", "lam"):
                module._parameters.pop(part_name(name, part), None)
            if module._parameters.get(part_name(name, "A")) is not None:
                kept.append(name)
        module.pareto_groups = {}
        if kept:
            # only the class of an unknown module depends on which of its parameters are merged
            batch_dim, original = module.pareto_batch_dim, cast(Any, module.pareto_original)
            module.__class__ = original
            convert(module, kept, state, has_parts=True).pareto_batch_dim = batch_dim
        else:
            restore(module)
    object.__setattr__(folded, "pareto", state)
    return folded


def _base(module: ParetoModule, name: str) -> Tensor:
    import pmkernels

    weight, parts = module._parameters[name], module.pareto_parts(name)
    assert weight is not None
    lam = parts["lam"]
    if lam is not None and module.pareto.lambda_range is not None:
        lam = lam.clamp(*module.pareto.lambda_range)
    return pmkernels.merge_weight(weight, task_vectors=parts["task_vectors"], lam=lam)


def _copy_with(model: nn.Module, value: Callable[[ParetoModule, str], Tensor], keep_low_rank: bool) -> nn.Module:
    """A deep copy in which merged parameters hold ``value(module, name)`` and the task vectors are not copied."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                weight = module._parameters[name]
                assert weight is not None
                if id(weight) not in memo:
                    merged = value(module, name).detach()
                    merged = merged.clone() if merged.data_ptr() == weight.data_ptr() else merged
                    memo[id(weight)] = nn.Parameter(merged, requires_grad=False)
                parts = ("task_vectors", "lam") if keep_low_rank else ("task_vectors", *LEARNED)
                for part in parts:
                    parameter = module._parameters.get(part_name(name, part))
                    if parameter is not None:
                        memo[id(parameter)] = None
        # the current preference may carry a graph, which cannot be copied
        for _, module in pareto_modules(model):
            memo[id(module.pareto.gamma)] = module.pareto.gamma.detach().clone()
    # deepcopy keeps alive, and later frees, what the memo maps from; what we put there must survive as well
    return deepcopy(model, memo)
