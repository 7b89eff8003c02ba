"""What an engine is given, checked: a file, a type, images, preferences as one tensor."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_shapes
from pareto_merging.errors import UserError
from pareto_merging.model.files import load_folded
from pareto_merging.model.parameters import LEARNED, part_name
from pareto_merging.preferences import Preference, check_preference, parse_preference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STORED = dict(zip(("F32", "BF16", "F16", "F64"), DTYPES, strict=True))
Preferences: TypeAlias = Preference | str | Sequence[Preference | str]


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type that a caller names, None for the file's own. ValueError if no model is served in it."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and named not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"dtype: expected one of {names}, got {dtype}")
    return named


def load_model(
    path: Path, header: Mapping[str, Any], plain: nn.Module | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.dtype]:
    """Load a folded file's model to be served, and return it with its type. ``dtype`` None: the file's.

    ``plain``: a module to load into, which is copied; None: built as the header describes.
    """
    stored = _stored_dtype(path, header)
    plain = encoders.build(header["encoder"]) if plain is None else copy.deepcopy(plain)
    # in the file's own type: loading into another one would round
    model = load_folded(path, plain.to(stored))
    return model.to(device, dtype or stored).requires_grad_(False).eval(), dtype or stored


def _stored_dtype(path: Path, header: Mapping[str, Any]) -> torch.dtype:
    """Return the type of most of a folded file's weights but the learned ones."""
    learned = {
        ".".join(filter(None, ("model", module, part_name(name, part))))
        for module, entry in header["layers"].items()
        for name in entry["low_rank"]
        for part in LEARNED
    }
    numbers: Counter[torch.dtype] = Counter()
    for name, (shape, kind) in read_shapes(path).items():
        if name.startswith("model.") and name not in learned and kind in _STORED:
            numbers[_STORED[kind]] += math.prod(shape)
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)


def preprocessing_in_header(described: Any) -> dict[str, Any]:
    """Return a header's size, and three finite numbers as mean and as std. UserError if it says something else."""
    is_valid = isinstance(described, dict) and all(
        isinstance(described.get(key), list)
        and len(described[key]) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in described[key])
        for key in ("mean", "std")
    )
    if not is_valid or not isinstance(described.get("size"), int) or described["size"] < 1 or not all(described["std"]):
        raise UserError(
            f"preprocessing: expected size, mean and std of three channels in the header, got {described!r:.80}"
        )
    return dict(described)


def check_images(images: Tensor, size: int | None) -> None:
    """Raise TypeError or ValueError if ``images`` is no batch of ``[3, size, size]``; None: of any shape."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, as engine.preprocess makes them, got {kind}")
    if images.ndim < 2 or not len(images):
        raise ValueError(f"images: expected [n, …] with n at least 1, got {list(images.shape)}")
    if size is not None and images.shape[1:] != (3, size, size):
        raise ValueError(f"images: expected shape [n, 3, {size}, {size}], got {list(images.shape)}")


def read_preferences(preferences: Preferences, names: Sequence[str]) -> Tensor:
    """Return γ [K] or [n, K], on a GPU only if it came from there. Of that one only the shape is looked at."""
    tasks = len(names)
    if isinstance(preferences, Tensor) and preferences.is_cuda:
        if preferences.ndim not in (1, 2) or preferences.shape[-1] != tasks or not preferences.is_floating_point():
            expected = f"floating-point [{tasks}] or [n, {tasks}]"
            raise ValueError(f"preferences: expected {expected}, got {list(preferences.shape)} {preferences.dtype}")
        return preferences.detach().float()
    if isinstance(preferences, str):
        return parse_preference(preferences, names)
    if isinstance(preferences, list | tuple) and any(_is_preference(one) for one in preferences):
        return torch.stack([_read_one(one, names) for one in preferences])
    return check_preference(preferences, names).detach()  # type: ignore[arg-type]


def _read_one(preference: Any, names: Sequence[str]) -> Tensor:
    if isinstance(preference, str):
        return parse_preference(preference, names)
    if isinstance(preference, int | float):
        raise ValueError("preferences: expected numbers, or one preference for each item, got a mixture")
    given = torch.as_tensor(preference) if hasattr(preference, "__array__") else preference
    return check_preference(given, names, per_item=False).detach().cpu()


def _is_preference(value: Any) -> bool:
    """Return whether ``value`` is one preference of several, in no form of plain numbers."""
    return isinstance(value, Mapping | str) or (hasattr(value, "__array__") and bool(getattr(value, "ndim", 0)))
