"""The K fine-tuned copies of a model, checked against it."""

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from pareto_merging.checkpoints.tensors import TensorMapping

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]


def check_copies(
    model: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]
) -> tuple[dict[str, Mapping[str, Tensor]], list[tuple[list[str], Tensor]]]:
    """Return the tensors of each copy by task, and of ``model``. The latter are (all its names, the tensor).

    Raises ValueError for no copies, or missing, extra or differently shaped tensors; all are named. TypeError: one copy
    only.
    """
    is_state_dict = isinstance(finetuned, Mapping) and any(isinstance(v, Tensor) for v in finetuned.values())
    is_one = is_state_dict or isinstance(finetuned, nn.Module)
    if is_one or not isinstance(finetuned, Mapping | Sequence) or isinstance(finetuned, str):
        got = "a single one" if is_one else type(finetuned).__name__
        raise TypeError(f"finetuned: expected a sequence or mapping of K fine-tuned copies, got {got}")
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


class LazyTensors(TensorMapping):
    """A user's mapping that may read a file for each tensor. Which names it has is asked once."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source, shapes = source, _shapes(source)
        self._names = dict.fromkeys(source if shapes is None else shapes)
        if shapes is not None:
            self.shapes = shapes

    @property
    def names(self) -> Collection[str]:
        return self._names

    def read(self, name: str) -> Tensor:
        return self.source[name]


def _shapes(source: Mapping[str, Tensor]) -> Mapping[str, Sequence[int]] | None:
    """Return the shapes that a mapping says its tensors have, if it does."""
    shapes = getattr(source, "shapes", None)
    return shapes if isinstance(shapes, Mapping) else None


def named_tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """List the tensors of a module's state dict, each once with all its names there."""
    tensors: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            tensors.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(tensors.values())


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
                    shape = list(tensor_of(weights, name, task).shape if shapes is None else shapes[name])
                    if shape != expected:
                        problems.append(f"{task} has {name} of shape {shape}, expected {expected}")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"finetuned: expected the tensors of pretrained, but {shown}")


def tensor_of(weights: Mapping[str, Tensor], name: str, task: str) -> Tensor:
    value = weights[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"finetuned: expected {name} of {task} to be a tensor, got {type(value).__name__}")
    return value.detach()


def read_tensor(weights: Mapping[str, Tensor], name: str, task: str, like: Tensor) -> Tensor:
    """Read one tensor of a copy, of the shape of ``like``. A lazy mapping may have promised another."""
    value = tensor_of(weights, name, task)
    if value.shape != like.shape:
        expected, got = list(like.shape), list(value.shape)
        raise ValueError(f"finetuned: expected {name} of {task} to have shape {expected}, got {got}")
    return value


def names_in(names: Sequence[str], weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names if name in weights]
