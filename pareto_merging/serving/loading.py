"""How an engine's model is loaded: in its file's type, then in the served one."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.safetensors import read_shapes
from pareto_merging.model.files import load_folded
from pareto_merging.model.parameters import LEARNED, part_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type that a caller names, None for the file's own.

    Raises:
        ValueError: no model is served in it.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and named not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"dtype: expected one of {names}, got {dtype}")
    return named


def load_model(
    path: Path, header: Mapping[str, Any], plain: nn.Module | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.dtype]:
    """Load a folded file's model to be served, and return it with its type.

    Args:
        plain: a module to load into, which is copied; None: built as the header describes. dtype: None: the file's.
    """
    stored = _stored_dtype(path, header)
    plain = encoders.build(header["encoder"]) if plain is None else copy.deepcopy(plain)
    # in the file's own type: loading into another one would round
    model = load_folded(path, plain.to(stored))
    return model.to(device, dtype or stored).requires_grad_(False).eval(), dtype or stored


def _stored_dtype(path: Path, header: Mapping[str, Any]) -> torch.dtype:
    """Return the type of most of a folded file's weights but the learned ones."""
    learned = {
        f"model.{module}.{part_name(name, part)}" if module else f"model.{part_name(name, part)}"
        for module, entry in header["layers"].items()
        for name in entry["low_rank"]
        for part in LEARNED
    }
    numbers: dict[torch.dtype, int] = {}
    for name, (shape, kind) in read_shapes(path).items():
        if name.startswith("model.") and name not in learned and kind in _STORED:
            numbers[_STORED[kind]] = numbers.get(_STORED[kind], 0) + math.prod(shape)
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)
