"""Which strategy for which shape on which device, and the launch configuration of every kernel.

Strategies of pareto_linear (all give the same result up to rounding):

- ``eager``: plain PyTorch on any device; the definition and the CPU path.
- ``fused``: W assembled tile by tile inside the matrix product; nothing of W's size is ever allocated.
- ``streamed``: W merged in one pass into a scratch tensor, then the library's matrix product.

``strategy="auto"`` asks :func:`choose`, the one place that knows a rule. Launch configurations are read from
``configs/*.json``: a file named after the GPU where one was tuned (``nvidia-h200.json``), else ``default.json``, whose
every entry ``python -m benchmarks.budget`` compiles for sm_86 and sm_90.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Triton has no build for this platform
    HAS_TRITON = False

STRATEGIES = ("auto", "fused", "streamed", "eager")
MAX_TASKS, MAX_RANK = 32, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fused reads all of W0 and τ once for each block of rows, streamed writes W and reads it back: at K = 8 two passes, the
# second from L2, are about even
FUSED_ROW_BLOCKS = 2


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1) and does not compile them."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of ``device``."""
    return HAS_TRITON and (device.type == "cuda" or (interpreting() and device.type == "cpu"))


def unsupported(device: torch.device, tensors: Mapping[str, Tensor | None], tasks: int, rank: int) -> Exception | None:
    """Why the kernels cannot do this: the error to raise where the user asked for them, or None if they can."""
    if not HAS_TRITON:
        return ValueError("strategy: expected 'eager' or 'auto', because triton is not installed")
    if not runs_kernels(device):
        return ValueError(
            "strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU "
            f"(TRITON_INTERPRET=1, set before the start, interprets kernels on the CPU), got device {device}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            expected = "float32, bfloat16 or float16 (float64: strategy 'eager')"
            return TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tasks > MAX_TASKS:
        return ValueError(f"task_vectors: expected K from 1 to {MAX_TASKS} (more: strategy 'eager'), got K = {tasks}")
    if rank > MAX_RANK:
        return ValueError(f"A: expected a rank from 1 to {MAX_RANK} (more: strategy 'eager'), got rank {rank}")
    return None


def resolve(
    strategy: str,
    tensors: Mapping[str, Tensor | None],
    device: torch.device,
    *,
    rows: int = 0,
    tasks: int = 0,
    rank: int = 0,
) -> str:
    """``eager``, ``fused`` or ``streamed`` for a call with these tensors, by name; the error of a wish that cannot be."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "eager" or (strategy == "auto" and device.type != "cuda"):
        return "eager"
    error = unsupported(device, tensors, tasks, rank)
    if error is None:
        return choose(device, tensors, rows=rows, rank=rank) if strategy == "auto" else strategy
    if strategy != "auto":
        raise error
    return "eager"


def choose(device: torch.device, tensors: Mapping[str, Tensor | None], *, rows: int, rank: int) -> str:
    """``fused`` or ``streamed`` for a call on a CUDA GPU that the kernels can do: a rule from counted bytes."""
    x = tensors.get("x")
    if x is None:
        # merge_weight and softmax_entropy have one kernel
        return "fused"
    block_m = config("linear", dtype=x.dtype, device=device, rows=rows, rank=rank).block_m
    return "fused" if rows <= FUSED_ROW_BLOCKS * block_m else "streamed"


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: the tile sizes it uses, warps per program, and stages of its inner loop."""

    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Entry:
    """One line of a configuration file: a Config and what it is for. The first line that fits is taken."""

    op: str
    dtype: str
    config: Config
    max_rows: int | None = None
    max_rank: int | None = None

    def fits(self, op: str, dtype: str, rows: int, rank: int) -> bool:
        """Whether this line is for that kernel, type (``float32`` or ``16-bit``), number of rows and rank."""
        return (
            self.op == op
            and self.dtype in (dtype, "any")
            and (self.max_rows is None or rows <= self.max_rows)
            and (self.max_rank is None or rank <= self.max_rank)
        )


def read_entries(text: str) -> list[Entry]:
    """The entries of a configuration file's JSON; a field that a Config or an Entry does not have is a TypeError."""
    return [Entry(**{**line, "config": Config(**line["config"])}) for line in json.loads(text)["entries"]]


def config_files() -> dict[str, str]:
    """Every shipped configuration file: name without ``.json`` -> text."""
    folder = resources.files("pmkernels") / "configs"
    return {f.name[: -len(".json")]: f.read_text() for f in folder.iterdir() if f.name.endswith(".json")}


@functools.cache
def entries(name: str) -> tuple[Entry, ...]:
    """The lines for a GPU named so: its own file first, where there is one, then the default."""
    files = config_files()
    own = read_entries(files[name]) if name in files and name != "default" else []
    return (*own, *read_entries(files["default"]))


@functools.cache
def gpu_name(index: int | None) -> str:
    """A CUDA device's name as configuration files spell it: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


def config(
    op: str,
    like: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    rows: int,
    rank: int,
) -> Config:
    """The launch configuration of ``op`` for tensors like ``like`` (or of that dtype and device)."""
    if like is not None:
        dtype, device = like.dtype, like.device
    assert device is not None
    name = gpu_name(device.index) if device.type == "cuda" else "default"
    return _lookup(name, op, "float32" if dtype == torch.float32 else "16-bit", _bucket(rows), rank)


def _bucket(rows: int) -> int:
    """Rows rounded up to a power of two: few different configurations, few compilations."""
    return 1 << max(rows - 1, 0).bit_length()


@functools.cache
def _lookup(name: str, op: str, dtype: str, rows: int, rank: int) -> Config:
    for entry in entries(name):
        if entry.fits(op, dtype, rows, rank):
            return entry.config
    raise LookupError(f"configs/{name}.json: expected an entry for {op} in {dtype} with rank {rank}, got none")


def splits(rows: int, block_m: int, programs: int) -> tuple[int, int]:
    """How many parts to cut ``rows`` into, and rows per part, where ``programs`` programs work on each part.

    Enough parts for about 256 programs, at most 16 (each is one more partial sum), at least four blocks each.
    """
    parts = max(1, min(16, 256 // max(programs, 1), rows // (4 * block_m)))
    per_part = -(-rows // parts)
    return parts, -(-per_part // block_m) * block_m


def padded_rank(rank: int) -> int:
    """The rank as a tile size: a power of two from 16, the shortest contraction of a tensor core."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How a product of tiles multiplies: float32 exactly, unless torch was told that TF32 is good enough.

    In 16-bit models only small products have float32 operands (dW against A and B): TF32 keeps more than 16 bits do.
    """
    # the newer property: it also reflects allow_tf32, which raises where both were used
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def rank_precision(dtype: torch.dtype) -> str:
    """As :func:`dot_precision`, for the products over the rank: in 16-bit models nearly exact, three TF32 products."""
    return "tf32x3" if dtype != torch.float32 else dot_precision(dtype)


def compute_type(dtype: torch.dtype) -> Any:
    """The type in which tiles are multiplied: the model's own; the interpreter would multiply bfloat16 as raw bits."""
    if interpreting() and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
