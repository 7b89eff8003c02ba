"""Modules and state dicts in pickles that were read as data."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pareto_merging.checkpoints.archives import open_archive
from pareto_merging.checkpoints.records import Record, StoredTensor
from pareto_merging.errors import UserError

# beyond any model's; a pickle can name one record a million times over, and one inside itself
_MAX_MODULES, _MAX_TENSORS, _MAX_ENTRIES = 2**15, 2**17, 2**20
_MAX_NAME, _MAX_LETTERS = 2**10, 2**24
# where training programs keep a model among other things
_INNER = ("state_dict", "model_state_dict", "model")


def find_tensors(root: Any, source: str) -> dict[str, StoredTensor]:
    """Return the tensors of a pickled module, state dict or training checkpoint by name. Raises UserError: none."""
    value, tensors = root, {}
    if isinstance(value, dict):
        value = next((value[key] for key in _INNER if isinstance(value.get(key), dict | Record)), value)
    if isinstance(value, Record):
        tensors = _module_tensors(value, source)
    elif isinstance(value, dict):
        tensors = {name: part for name, part in value.items() if isinstance(part, StoredTensor)}
        if any(len(name) > _MAX_NAME for name in tensors):
            raise UserError(f"{source}: expected names of at most {_MAX_NAME} letters, got a longer one")
    if not tensors:
        kind = str(value.type)[:80] if isinstance(value, Record) else f"a {type(value).__name__}"
        what = "a tensor alone" if isinstance(value, StoredTensor) else f"{kind} without tensors"
        raise UserError(f"{source}: expected a module or a state dict, got {what}")
    return tensors


class ArchivedTensors:
    """The tensors of an archive that ``torch.save`` or TorchScript wrote."""

    def __init__(self, path: Path) -> None:
        """Read an archive's pickle. Raises UserError as :func:`.archives.open_archive`, or if it has no tensors."""
        self.archive = archive = open_archive(path)
        self.files = [path]
        self._stored: dict[str, StoredTensor] = find_tensors(archive.root, str(path))
        self.shapes = {name: list(stored.shape) for name, stored in self._stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        # tied weights share a storage; thousands of tensors in one would fill a disk
        held = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self._stored.values())
        size = path.stat().st_size
        if held > 4 * size + 2**20:
            raise UserError(f"{path}: expected about {size} bytes of tensors as in the file, got {held}")

    def read(self, name: str) -> Tensor:
        return self.archive.tensor(self._stored[name])


def walk_modules(root: Any, source: str) -> Iterator[tuple[str, Record]]:
    """Yield every module of a pickled module by name, its own first (name ``""``). What is no module has none."""
    waiting = [("", root)] if isinstance(root, Record) else []
    count = entries = 0
    while waiting:
        name, record = waiting.pop()
        entries += sum(len(part) for part in (record.state, *record.state.values()) if isinstance(part, dict))
        modules = record.state.get("_modules")
        # a scripted module has its children among its attributes
        inside = modules if isinstance(modules, dict) else record.state if record.type.is_script else {}
        items = inside.items() if entries <= _MAX_ENTRIES else ()
        children = {key: child for key, child in items if isinstance(child, Record)}
        count += len(children)
        if count > _MAX_MODULES or entries > _MAX_ENTRIES or len(name) > _MAX_NAME:
            raise UserError(f"{source}: expected at most {_MAX_MODULES} modules, got more (or one inside itself)")
        yield name, record
        waiting += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children.items())]


def _module_tensors(root: Record, source: str) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    skipped_items = letters = 0
    for prefix, record in walk_modules(root, source):
        state = record.state
        groups = [state] if record.type.is_script else [state.get("_parameters"), state.get("_buffers")]
        skipped = _set_items(state.get("_non_persistent_buffers_set"))
        skipped_items += len(skipped)
        if skipped_items > _MAX_ENTRIES:
            raise UserError(f"{source}: expected the buffers of a model, got more than {_MAX_ENTRIES}")
        names = {name for name in skipped if isinstance(name, str)}
        for group in groups:
            for key, value in group.items() if isinstance(group, dict) else ():
                if not isinstance(value, StoredTensor) or key in names:
                    continue
                letters += len(prefix) + len(key)
                if len(key) > _MAX_NAME or letters > _MAX_LETTERS:
                    raise UserError(f"{source}: expected names of at most {_MAX_NAME} letters, got a longer one")
                name = f"{prefix}.{key}" if prefix else key
                if name in tensors or len(tensors) > _MAX_TENSORS:
                    raise UserError(f"{source}: expected each tensor once, got {name[:80]!r} twice")
                tensors[name] = value
    return tensors


def _set_items(record: Any) -> list[Any]:
    """Return what is in a pickled set. It was appended to the set, or the set was made of a list."""
    if not isinstance(record, Record):
        return []
    first = record.arguments[0] if record.arguments else []
    return record.items + (first if isinstance(first, list) else [])


def _modules_below(root: Any, prefix: str, source: str) -> Iterator[Record]:
    return (record for name, record in walk_modules(root, source) if name.startswith(prefix))


def uses_quick_gelu(root: Any, prefix: str, source: str) -> bool | None:
    """Return whether the modules below ``prefix`` have QuickGELU or GELU. None stands for neither, or no module."""
    names = {record.type.name.rpartition(".")[2] for record in _modules_below(root, prefix, source)}
    # open_clip's and transformers' own classes, and torch's
    if names & {"QuickGELU", "QuickGELUActivation"}:
        return True
    return False if names & {"GELU", "GELUActivation"} else None


def attention_heads(root: Any, prefix: str, source: str) -> int | None:
    """Return ``num_heads`` of the first attention below ``prefix``. None stands for no module that says it."""
    heads = (record.state.get("num_heads") for record in _modules_below(root, prefix, source))
    return next((number for number in heads if type(number) is int), None)


def normalisation(root: Any) -> dict[str, Any] | None:
    """Return ``size``, ``mean`` and ``std`` of the transforms that an ImageEncoder keeps as ``val_preprocess``."""
    compose = root.state.get("val_preprocess") if isinstance(root, Record) else None
    steps = compose.state.get("transforms") if isinstance(compose, Record) else None
    transforms: dict[str, Any] = {}
    records = [step for step in steps if isinstance(step, Record)] if isinstance(steps, list) else []
    for step in records:
        if step.type.name == "Normalize":
            transforms |= {key: step.state.get(key) for key in ("mean", "std")}
        elif step.type.name == "CenterCrop":
            size = step.state.get("size")
            transforms["size"] = size[0] if isinstance(size, list | tuple) and size else size
    if set(transforms) != {"size", "mean", "std"}:
        return None
    return {key: list(value) if isinstance(value, tuple) else value for key, value in transforms.items()}
