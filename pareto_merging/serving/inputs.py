"""What a caller gives an engine, checked: images, and preferences as one tensor."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pareto_merging.errors import UserError
from pareto_merging.preferences import Preference, check_preference, parse_preference

Preferences: TypeAlias = Preference | str | Sequence[Preference | str]


def check_images(images: Tensor, size: int | None) -> None:
    """Check that ``images`` is a batch of ``[3, size, size]``, of any shape where size is None.

    Raises:
        TypeError: no floating-point tensor. ValueError: another shape.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, as engine.preprocess makes them, got {kind}")
    if images.ndim < 2 or not len(images):
        raise ValueError(f"images: expected [n, …] with n at least 1, got {list(images.shape)}")
    if size is not None and images.shape[1:] != (3, size, size):
        raise ValueError(f"images: expected shape [n, 3, {size}, {size}], got {list(images.shape)}")


def preprocessing_in_header(described: Any) -> dict[str, Any]:
    """Return a header's preprocessing: a size, and three finite numbers as mean and as std.

    Raises:
        UserError: it says something else.
    """
    numbers = all(
        isinstance(described, dict)
        and isinstance(described.get(key), list)
        and len(described[key]) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) for v in described[key])
        for key in ("mean", "std")
    )
    if not numbers or not isinstance(described.get("size"), int) or described["size"] < 1 or not all(described["std"]):
        raise UserError(
            f"preprocessing: expected size, mean and std of three channels in the header, got {described!r:.80}"
        )
    return dict(described)


def read_preferences(preferences: Preferences, names: Sequence[str]) -> Tensor:
    """Return γ [K] or [n, K], on a GPU only if it came from there.

    Raises:
        ValueError: not such preferences; of a tensor on a GPU only the shape is looked at.
    """
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


def preferences_of_batch(preferences: Preferences, names: Sequence[str], count: int) -> Tensor:
    """Return γ [K] where all ``count`` items are known to share one, else [count, K].

    Raises:
        ValueError: as :func:`read_preferences`, or another number of them.
    """
    gamma = read_preferences(preferences, names)
    if gamma.ndim == 2 and len(gamma) != count:
        raise ValueError(f"preferences: expected one for each of {count} images (or one for all), got {len(gamma)}")
    if gamma.ndim == 2 and (len(gamma) == 1 or (not gamma.is_cuda and bool((gamma == gamma[:1]).all()))):
        return gamma[0]
    return gamma


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
