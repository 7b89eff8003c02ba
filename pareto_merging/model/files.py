"""The two files of a learned Pareto set.

A *Pareto set file* holds what was learned (λ, A, G, B) and which weights it belongs to: everything but the frozen
weights. A *folded file* is self-sufficient: the base weights with λ folded in, the low-rank terms, the zero-shot heads
and the encoder's description. Both are safetensors with a JSON metadata header.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_metadata, read_shapes, read_tensors, write_tensors
from pareto_merging.data.tasks import ZeroShotHead
from pareto_merging.errors import UserError, user_errors
from pareto_merging.model.base import base_digest, base_tensors, check_base, set_base
from pareto_merging.model.convert import convert, prepare_transformers, unchanged_on_error
from pareto_merging.model.copies import Weights
from pareto_merging.model.fold import fold
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.learned import get_lambda, learned_parameters, set_lambda
from pareto_merging.model.parameters import LEARNED, part_name
from pareto_merging.model.parametrize import CORES, INITIAL_SCALE, NOTED, parametrize
from pareto_merging.model.preprocessing import PREPROCESS_NAMES, Preprocess
from pareto_merging.model.state import Computation, ParetoState, pareto_state
from pareto_merging.preferences import equal_preference
from pareto_merging.version import VERSION

# 2: task vectors may be preprocessed, and the low-rank term have another core. 3: there may be a constant low-rank
# term, and another base than the pretrained weights. What uses none of this is written as 1
FORMAT_VERSION = 3
# of a base that is not the pretrained weights
BASE = "base."
SET_FORMAT, FOLDED_FORMAT = "pareto-set", "pareto-folded"


def save_pareto_set(
    model: nn.Module, path: Path, *, preset: str = "", training: Mapping[str, Any] | None = None
) -> None:
    """Write what a Pareto model has learned, atomically. And its base, where that is not the pretrained weights.

    The header names the format and its version, the tasks, K, r, the layer map (module -> its merged parameters and
    which have a low-rank term), the grouping of λ, the initial scale, the digests of the pretrained and fine-tuned
    weights, the preset, the seed and the package's version; ``training`` may add more.

    Raises ValueError for no Pareto model, a folded one (:func:`save_folded`), or one made with ``digests=False``.
    """
    state = pareto_state(model)
    learned = learned_parameters(model)
    if state.folded:
        raise ValueError("model: expected a Pareto model with task vectors, got a folded one (use save_folded)")
    if not state.digests:
        raise ValueError("model: expected one made with digests=True (a file must say which weights it belongs to)")
    metadata = {"initial_scale": INITIAL_SCALE, **_header(model, SET_FORMAT, training)}
    metadata |= {"tasks": len(state.task_names), "preset": preset}
    metadata["lambda_grouping"] = metadata.pop("granularity", "tensor")
    base: dict[str, Tensor] = {}
    if state.start != "pretrained":
        metadata |= {"start": state.start, "base_digest": state.base_digest}
        base = {f"{BASE}{name}": tensor for name, tensor in base_tensors(model).items()}
    write_tensors(Path(path), learned | base, metadata)


def _version(settings: Mapping[str, Any], start: str) -> int:
    """Return the oldest version of the format that has what a model uses."""
    if settings.get("constant_rank", 0) or start != "pretrained":
        return 3
    return 2 if settings.get("preprocess", "none") != "none" or settings.get("core", "tensor") != "tensor" else 1


def _header(model: nn.Module, kind: str, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what both headers say. ``layers`` has by module the names of its merged and low-rank parameters."""
    state, layers = pareto_state(model), {}
    for name, module in pareto_modules(model):
        low_rank = [p for p in module.pareto_names if module.pareto_parameter(p).A is not None]
        layers[name] = {"merged": list(module.pareto_names), "low_rank": low_rank}
    built = {"task_names": list(state.task_names), **state.settings, "layers": layers, "digests": state.digests}
    # a folded model has both in its base
    version = _version({"core": state.core}, "pretrained") if state.folded else _version(state.settings, state.start)
    if version < 3:
        built.pop("constant_rank", None)
    written = {"format": kind, "format_version": version, "package_version": VERSION}
    return {**built, **written, "training": dict(training or {})}


# what a header has to have, and of which type
_SET_KEYS: dict[str, Any] = {
    "task_names": list,
    "rank": int,
    "low_rank": str,
    "init_lambda": (int, float),
    "lambda_grouping": str,
    "buffers": str,
    "seed": int,
    "initial_scale": str,
    "layers": dict,
    "digests": dict,
}
_FOLDED_KEYS = {"task_names": list, "layers": dict, "encoder": dict}


def read_header(path: Path, expected_format: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the header of a Pareto set or folded file, values decoded.

    Raises UserError for another file, a newer version, or lack of one of ``keys`` of its type.
    """
    path = Path(path)
    raw = read_metadata(path)
    if raw.get("format") != expected_format:
        how = " (pareto-merging export RUN --folded writes one)" if expected_format == FOLDED_FORMAT else ""
        got = raw.get("format", "another safetensors file")
        raise UserError(f"{path}: expected a {expected_format} file{how}, got {got}")
    header: dict[str, Any] = dict(raw)
    for key, value in raw.items():
        with contextlib.suppress(ValueError):
            header[key] = json.loads(value)
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"{path}: expected format version {FORMAT_VERSION} or older, got {version!r}")
    for key, kind in (keys or {}).items():
        if not isinstance(header.get(key), kind):
            raise UserError(f"{path}: expected {key} in the header, got {str(header.get(key))[:40]}")
    for key, allowed in {"preprocess": (*PREPROCESS_NAMES, "function"), "core": CORES}.items():
        if header.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: expected {key} {', '.join(allowed)} in the header, got {str(header[key])[:40]}")
    constant = header.get("constant_rank", 0)
    if isinstance(constant, bool) or not isinstance(constant, int) or constant < 0:
        raise UserError(f"{path}: expected a constant_rank of at least 0 in the header, got {str(constant)[:40]}")
    density = header.get("density", 1.0)
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise UserError(f"{path}: expected density in (0, 1] in the header, got {str(density)[:40]}")
    if "digests" in (keys or {}) and not {"pretrained", *header["task_names"]} <= set(header["digests"]):
        raise UserError(f"{path}: expected a digest for pretrained and every task, got {', '.join(header['digests'])}")
    return header


def load_pareto_set(
    path: Path,
    pretrained: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights],
    *,
    preprocess: Preprocess | None = None,
    copy: bool = True,
) -> nn.Module:
    """Put a Pareto set file and the weights it belongs to together again.

    Args:
        path: a Pareto set file. pretrained, finetuned: as for :func:`parametrize`, the same weights (in any
            precision that holds their values). A mapping may have the tasks in any order and more of them.
        preprocess: the function that was given to :func:`parametrize`, where it was one of the user's own.
        copy: False turns ``pretrained`` itself into the model, as :func:`parametrize` does; on an error it is the plain
            module that it was.

    Raises UserError for another file, missing or foreign tensors, or weights whose digest differs: each is named.
    """
    path = Path(path)
    header = read_header(path, SET_FORMAT, _SET_KEYS)
    finetuned = _tasks_of(path, header["task_names"], finetuned)
    name = header.get("preprocess", "none")
    if (name == "function") != (preprocess is not None):
        expected = "the function that preprocessed the task vectors" if name == "function" else f"none beside {name!r}"
        raise UserError(f"{path}: expected {expected} as preprocess, got {'none' if preprocess is None else 'one'}")
    settings = header["low_rank"]
    low_rank: Any = settings if settings in ("attention", "in-projection", "all", "none") else _listed_low_rank(header)
    # the file may turn out not to be theirs when pretrained is a Pareto model already
    with unchanged_on_error(pretrained, buffers=not copy and header["buffers"] == "average"):
        model = parametrize(
            pretrained,
            finetuned,
            rank=_rank_of(path, header),
            low_rank=low_rank,
            init_lambda=header["init_lambda"],
            granularity=header["lambda_grouping"],
            buffers=header["buffers"],
            seed=header["seed"],
            preprocess=name if preprocess is None else preprocess,
            density=header.get("density", 0.2),
            core=header.get("core", "tensor"),
            constant_rank=header.get("constant_rank", 0),
            copy=copy,
        )
        state = pareto_state(model)
        state.settings = {**state.settings, "low_rank": settings, "initial_scale": header["initial_scale"]}
        if wrong := [
            f"{name} has {state.digests[name][:12]}…, expected {digest[:12]}…"
            for name, digest in header["digests"].items()
            if state.digests.get(name) != digest
        ]:
            raise UserError(f"{path}: belongs to other weights; digest of {'; '.join(wrong)}")
        tensors = read_tensors(path)
        base = {name.removeprefix(BASE): tensors.pop(name) for name in list(tensors) if name.startswith(BASE)}
        load_learned(model, tensors, path)
        _load_base(model, base, header, path)
    return model


def _load_base(model: nn.Module, base: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
    """Replace the base by that of a file, where it has one. UserError for one that is not whole."""
    start, digest = str(header.get("start", "pretrained")), str(header.get("base_digest", ""))
    own = base_tensors(model)
    if start == "pretrained":
        if base:
            raise UserError(f"{path}: expected no tensors of a base for start {start!r}, got {next(iter(base))}")
        return
    if lacking := [name for name in own if name not in base]:
        raise UserError(f"{path}: expected a base with every parameter, got none named {', '.join(lacking[:5])}")
    # before anything is written: the frozen weights may be the caller's own
    with user_errors(str(path)):
        check_base(model, base)
    if base_digest({name: base[name].to(tensor.dtype) for name, tensor in own.items()}) != digest:
        raise UserError(f"{path}: expected a base of digest {digest[:12]}…, got one in another precision or changed")
    with user_errors(str(path)):
        lam = get_lambda(model)
        set_base(model, base, start)
        set_lambda(model, lam)


def _tasks_of(
    path: Path, names: Sequence[str], finetuned: Sequence[Weights] | Mapping[str, Weights]
) -> dict[str, Weights]:
    """Return the fine-tuned copies of a file's tasks, in the file's order."""
    if isinstance(finetuned, Mapping):
        if missing := [name for name in names if name not in finetuned]:
            raise UserError(f"finetuned: expected the tasks of {path}, got none named {', '.join(missing)}")
        return {name: finetuned[name] for name in names}
    if len(finetuned) != len(names):
        raise UserError(f"finetuned: expected {len(names)} copies ({', '.join(names)}), got {len(finetuned)}")
    return dict(zip(names, finetuned, strict=True))


def _rank_of(path: Path, header: Mapping[str, Any]) -> int:
    """Return the rank that a Pareto set file's header and its A agree on."""
    ranks = {shape[1] for name, (shape, _) in read_shapes(path).items() if name.startswith("A.") and len(shape) == 2}
    if header.get("core", "tensor") == "tensor" and ranks - {header["rank"]}:
        raise UserError(f"{path}: expected rank {min(ranks)} as its A has, got {header['rank']} in the header")
    return int(header["rank"]) if ranks else 1


def _listed_low_rank(header: Mapping[str, Any]) -> Callable[[str, nn.Module], bool]:
    listed = {f"{m}.{p}" if m else p for m, entry in header["layers"].items() for p in entry["low_rank"]}
    return lambda name, module: name in listed


def load_learned(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy what is learned by name into a Pareto model. UserError names what is missing, extra, misshapen or NaN."""
    learned = learned_parameters(model)
    problems = [f"lacks {name}" for name in learned if name not in tensors]
    problems += [f"has an unknown {name}" for name in tensors if name not in learned]
    for name, parameter in learned.items():
        if name in tensors and tensors[name].shape != parameter.shape:
            problems.append(f"has {name} {list(tensors[name].shape)}, expected {list(parameter.shape)}")
        elif name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"has NaN or inf in {name}")
    if problems:
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems[:5])}")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(tensors[name])


def save_folded(
    model: nn.Module,
    path: Path,
    *,
    heads: Mapping[str, tuple[Tensor, float]] | None = None,
    encoder: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a Pareto or folded model as one self-sufficient file, atomically.

    Args:
        heads: task -> (class embeddings ``[classes, dim]``, logit scale): what turns features into predictions.
        encoder: how to build the plain module again (the arguments of :func:`.encoders.build`).
        preprocessing: how images become its input, where not as CLIP does it: as
            :func:`.encoders.default_preprocessing` describes it.
    """
    folded = fold(model)
    tensors = {f"model.{k}": tensor for k, tensor in folded.state_dict().items() if isinstance(tensor, Tensor)}
    for name, (weight, _) in (heads or {}).items():
        tensors[f"head.{name}"] = weight
    metadata = {
        **_header(folded, FOLDED_FORMAT, training),
        "logit_scales": {name: scale for name, (_, scale) in (heads or {}).items()},
        "encoder": dict(encoder or {}),
        **({} if preprocessing is None else {"preprocessing": dict(preprocessing)}),
    }
    write_tensors(Path(path), tensors, metadata)


def read_folded_header(path: Path) -> dict[str, Any]:
    """Read what a folded file says of itself. Raises UserError as :func:`load_folded`."""
    return read_header(Path(path), FOLDED_FORMAT, _FOLDED_KEYS)


def load_heads(path: Path) -> dict[str, ZeroShotHead]:
    """Load the zero-shot heads of a folded file by task name. Raises UserError as :func:`load_folded`."""
    path, header = Path(path), read_folded_header(path)
    tensors, scales = read_tensors(path), header.get("logit_scales", {})
    names = [name for name in header["task_names"] if f"head.{name}" in tensors]
    try:
        return {name: ZeroShotHead(tensors[f"head.{name}"], scales.get(name, 100.0)) for name in names}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected zero-shot heads with their logit_scales, got {error}") from error


def load_folded(path: Path, plain: nn.Module | None = None) -> nn.Module:
    """Load a folded model from its file alone, in eval mode, ready for :func:`set_preference`.

    ``plain`` is a module of the original class and shapes, where the file does not say how to build one (its values do
    not matter, and it is changed in place). Raises UserError for no folded file, or one of another architecture.
    """
    path, header = Path(path), read_folded_header(path)
    if plain is None:
        _check_description(path, header["encoder"])
        plain = encoders.build(header["encoder"])
    tensors = {k.removeprefix("model."): t for k, t in read_tensors(path).items() if k.startswith("model.")}
    names = tuple(header["task_names"])
    now = Computation(equal_preference(len(names)))
    state = ParetoState(names, now, digests=header.get("digests", {}), folded=True)
    state.settings = {key: header[key] for key in NOTED if key in header}
    state.core = str(header.get("core", "tensor"))
    _check_layers(path, header["layers"], plain)
    learned = set()
    for module_name, entry in header["layers"].items():
        pareto = convert(plain.get_submodule(module_name), entry["low_rank"], state)
        for attribute in (part_name(name, part) for name in entry["low_rank"] for part in LEARNED):
            key = f"{module_name}.{attribute}" if module_name else attribute
            if key in tensors:
                learned.add(key)
                pareto.register_parameter(attribute, nn.Parameter(torch.empty_like(tensors[key])))
    object.__setattr__(plain, "pareto", state)
    try:
        plain.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the model: {' '.join(str(error).split())}") from error
    prepare_transformers(plain)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in learned)
    return plain.eval()


def _check_description(path: Path, description: Mapping[str, Any]) -> None:
    """Compare the encoder that a file describes with its tensors. Before there is memory for it."""
    shapes = {name: shape for name, (shape, _) in read_shapes(path).items()}
    with torch.device("meta"):
        expected = encoders.build(description).state_dict()
    for name, tensor in expected.items():
        shape = shapes.get(f"model.{name}")
        if shape != list(tensor.shape):
            got = "none" if shape is None else str(shape)
            raise UserError(f"{path}: does not fit the model: expected {name} {list(tensor.shape)}, got {got}")


def _check_layers(path: Path, layers: Mapping[str, Any], plain: nn.Module) -> None:
    """Compare the layer map of a file with the model. Its modules are there, each with a list of its own parameters."""
    modules = dict(plain.named_modules())
    for module_name, entry in layers.items():
        if module_name not in modules:
            raise UserError(f"{path}: expected a model with a module {module_name[:80]}, got none")
        names = entry.get("low_rank") if isinstance(entry, dict) else None
        own = modules[module_name]._parameters
        if not isinstance(names, list) or not all(isinstance(name, str) and name in own for name in names):
            raise UserError(f"{path}: expected parameters of {module_name} in the layer map, got {str(names)[:80]}")
