"""Weights as they are stored, beside a module that holds them rounded.

A task vector is the small difference of two large tensors. Where both are rounded to 16 bits first, it is wrong by a
tenth; so everywhere τ_k = W_k − W0 is subtracted as stored, in float32 (float64 where one of the two is), and rounded
to the dtype of the run once. A module in 16 bits no longer has W0 as stored: :func:`remember_stored` says where it is.

W0 itself is rounded once as well. What that loses, W0 − round(W0), is in no task vector: there it would be multiplied
by Σλ, and it is 2⁻⁹ of W0 (bfloat16), as in any model of that dtype. So round(W0) + τ_k is W_k up to two roundings,
while what is merged to a plain model at once (weight averaging, task arithmetic, TIES …) starts from W0 as stored.
"""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints.tensors import TensorMapping, Tensors
from pareto_merging.model.pieces import pieces_of

_ATTRIBUTE = "pareto_stored"


def remember_stored(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Note where the weights of a module are as stored. Its task vectors are made of those. Returns the module.

    Not needed after :func:`pareto_merging.load_models`. For one's own module that was made 16-bit::

        pretrained = pm.remember_stored(copy.deepcopy(wide).bfloat16(), wide.state_dict())

    Args:
        model: the pretrained module, in the dtype of the run. A deep copy remembers it too; a pickle does not.
        weights: its parameters and buffers by name before they were rounded, or some of them: a state dict, or any
            mapping that reads one when it is asked for it. With an attribute ``dtypes`` (by name) it is asked only for
            those that the module does not hold exactly. A tensor of which the module no longer holds the rounding was
            changed since, and counts as the module has it.

    Raises TypeError for no module or no mapping, ValueError for tensors that the module does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping from name to tensor, got {type(weights).__name__}")
    held = {name: t.dtype for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if foreign := [name for name in weights if name not in held]:
        raise ValueError(f"weights: expected tensors of the module, got {', '.join(map(str, foreign[:5]))}")
    model.__dict__[_ATTRIBUTE] = _Stored(weights, {name: held[name] for name in weights})
    return model


def forget_stored(model: nn.Module) -> nn.Module:
    """Drop what :func:`remember_stored` noted: the module is no longer, or not only, the pretrained one."""
    model.__dict__.pop(_ATTRIBUTE, None)
    return model


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a module deeply, to be changed: it remembers nothing."""
    return forget_stored(copy.deepcopy(model))


class _Stored:
    """The weights that a module remembers as stored, and the dtypes it held them in."""

    def __init__(self, weights: Mapping[str, Tensor], held: Mapping[str, torch.dtype]) -> None:
        self.weights, self.held = weights, held
        dtypes = getattr(weights, "dtypes", {})
        self.dtypes: Mapping[str, torch.dtype] = dtypes if isinstance(dtypes, Mapping) else {}

    def __deepcopy__(self, memo: Any) -> "_Stored":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # files of this machine, or a second model: not for a pickle
        return _Stored, ({}, {})


class PretrainedWeights:
    """The tensors W0 of a pretrained module as stored, each read when asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._stored: _Stored = model.__dict__.get(_ATTRIBUTE) or _Stored({}, {})

    def dtype(self, names: Sequence[str], tensor: Tensor) -> torch.dtype:
        """Return the dtype that a tensor of the module is stored in. As far as it is known without reading."""
        return next((self._stored.dtypes[name] for name in names if name in self._stored.dtypes), tensor.dtype)

    def __call__(self, names: Sequence[str], tensor: Tensor) -> Tensor:
        """Return one tensor of the module, by all its names, as stored. Its own where nothing else is known."""
        tensor, stored = tensor.detach(), self._stored
        name = next((name for name in names if name in stored.held), None)
        if name is None or not tensor.is_floating_point():
            return tensor
        dtype, held = stored.dtypes.get(name), stored.held[name]
        if dtype is not None and holds(held, dtype) and holds(tensor.dtype, dtype):
            return tensor
        value = stored.weights[name].detach()
        if value.shape == tensor.shape and _rounds_to(value, tensor, held):
            return value
        now = f"its task vectors are differences to what it is now, in {_short(tensor.dtype)}"
        warnings.warn(f"pretrained: {name} was changed since it was loaded, so {now}", stacklevel=2)
        return tensor


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    return torch.promote_types(dtype, other) == dtype


def _rounds_to(value: Tensor, tensor: Tensor, held: torch.dtype) -> bool:
    """Tell if ``tensor`` is ``value`` in its dtype. Directly, or by way of the dtype it was first held in."""
    return all(
        torch.equal(piece.to(tensor.dtype), own) or torch.equal(piece.to(held).to(tensor.dtype), own)
        for piece, own in ((value[index].to(tensor.device), tensor[index]) for index in pieces_of(tensor.shape))
    )


@dataclass
class Precision:
    """The dtypes that weights are stored in, and what rounding task vectors costs.

    Attributes:
        numbers: of ``pretrained`` and each task, how many floating-point numbers are stored in each dtype.
        error, size: Σ ‖Σ_k (round(τ_k) − τ_k)‖² and Σ ‖Σ_k τ_k‖² over all parameters.
    """

    numbers: dict[str, Counter[torch.dtype]] = field(default_factory=dict)
    error: float = 0.0
    size: float = 0.0

    def count(self, name: str, dtype: torch.dtype, size: int) -> None:
        """Note ``size`` numbers of the weights ``name`` that are stored in ``dtype``."""
        if dtype.is_floating_point:
            self.numbers.setdefault(name, Counter())[dtype] += size

    def add(self, error: Tensor, total: Tensor) -> None:
        """Add a piece of Σ_k (round(τ_k) − τ_k) and of Σ_k τ_k."""
        self.error += float(error.square().sum(dtype=torch.float64))
        self.size += float(total.square().sum(dtype=torch.float64))

    @property
    def relative_error(self) -> float:
        """Return ‖Σλ(round(τ) − τ)‖ / ‖Σλτ‖ where every λ is the same. 0 if nothing is rounded."""
        return math.sqrt(self.error / self.size) if self.size else 0.0

    def dtypes(self) -> dict[str, str]:
        """Name the dtypes of each checkpoint, those of most numbers first: ``{"pretrained": "float32", …}``."""
        return {name: describe_dtypes(numbers) for name, numbers in self.numbers.items()}


def describe_dtypes(numbers: Mapping[torch.dtype, int]) -> str:
    """Name the dtypes of one checkpoint, those of most numbers first: ``float16 and float32``."""
    ordered = sorted(numbers, key=lambda dtype: (-numbers[dtype], str(dtype)))
    return " and ".join(map(_short, ordered)) or "no numbers"


def summarize_dtypes(dtypes: Sequence[str]) -> str:
    """Say of several checkpoints which dtypes they are in: ``float16``, or ``float32 (7), bfloat16 (1)``."""
    counts = Counter(dtypes).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{name} ({count})" for name, count in counts)


def percent(share: float) -> str:
    """Write a share as percent in two digits: 0.00078 -> ``0.078 %``."""
    return f"{100 * share:.2g} %"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class StoredTensors(TensorMapping):
    """A checkpoint's tensors as stored, read when asked for. ``others`` have by name what ``own`` lacks."""

    def __init__(self, own: Tensors, device: torch.device, others: Mapping[str, Tensors] | None = None) -> None:
        self._owner = {**(others or {}), **dict.fromkeys(own.shapes, own)}
        self._device = device
        self.shapes = {name: owner.shapes[name] for name, owner in self._owner.items()}
        self.dtypes = {name: owner.dtypes[name] for name, owner in self._owner.items()}

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name).to(self._device)
