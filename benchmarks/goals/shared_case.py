"""The folded model that two groups of goals measure."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from benchmarks.common.session import Once
from benchmarks.common.towers import TINY, VIT_L
from benchmarks.goals.context import Context
from benchmarks.serving import folded, suite


@functools.lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="goals-serving-")


def _make_case(context: Context) -> folded.Case:
    name, encoder = (TINY.name, suite.TINY_ENCODER) if context.quick else (VIT_L.name, suite.ENCODERS[VIT_L.name])
    dtype = context.dtype if context.on_gpu else torch.float32
    return folded.build_case(name, encoder, Path(_folder().name), dtype, context.device)


# the folded model is one for both groups, and goes when the second is through
_case: dict[bool, Once] = {}


def shared_case(context: Context) -> Once:
    """Return the folded model, made when it is first asked for."""
    return _case.setdefault(context.quick, Once(functools.partial(_make_case, context)))
