"""Which strategy for which shape on which device, and the launch configuration of every kernel.

Strategies of pareto_linear (all give the same result up to rounding):

- ``eager``: plain PyTorch on any device; the definition and the CPU path.
- ``fused``: W assembled tile by tile inside the matrix product; nothing of W's size is ever allocated.
- ``streamed``: W merged in one pass into a scratch tensor, then the library's matrix product.

``strategy="auto"`` is eager off the GPU; on it :func:`choose` is the one place that knows a rule. Launch configurations
are read from ``configs/*.json``: a file named after the GPU where one was tuned (``nvidia-h200.json``), else
``default.json``, whose every entry ``python -m benchmarks.budget`` compiles for sm_86 and sm_90.
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
# up to here P and Q come with dλ from tiles of dW; their partial sums would reach the size of W at twice that, so
# larger ranks go row by row, as with a frozen λ
MAX_RANK_FROM_TILES = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fused reads all of W0 and τ once for each block of rows, streamed writes W and reads it back: at K = 8 two passes, the
# second from L2, are about even
FUSED_ROW_BLOCKS = 2


# decided when kernels are defined, so once: Triton interprets kernels on the CPU and does not compile them
INTERPRETING = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of ``device``."""
    return HAS_TRITON and (device.type == "cuda" or (INTERPRETING and device.type == "cpu"))


def unsupported(device: torch.device, tensors: Mapping[str, Tensor | None]) -> Exception | None:
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
    task_vectors, A, G = (tensors.get(name) for name in ("task_vectors", "A", "G"))
    for name, tasks in (
        ("task_vectors", 0 if task_vectors is None else task_vectors.shape[0]),
        ("G", 0 if G is None else G.shape[2]),
    ):
        if tasks > MAX_TASKS:
            return ValueError(f"{name}: expected K from 1 to {MAX_TASKS} (more: strategy 'eager'), got K = {tasks}")
    if A is not None and A.shape[1] > MAX_RANK:
        expected = f"a rank from 1 to {MAX_RANK} (more: strategy 'eager')"
        return ValueError(f"A: expected {expected}, got rank {A.shape[1]}")
    return None


def resolve(
    strategy: str,
    tensors: Mapping[str, Tensor | None],
    device: torch.device,
) -> str:
    """``eager`` for a call with these tensors, by name, that is not for the kernels, else ``strategy``; the error of a
    wish that cannot be. ``auto`` goes on as it is: the operators ask :func:`choose`, out of the compiler's sight.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "eager" or (strategy == "auto" and device.type != "cuda"):
        return "eager"
    error = unsupported(device, tensors)
    if error is None:
        return strategy
    if strategy != "auto":
        raise error
    return "eager"


def choose(strategy: str, like: Tensor, *, rows: int, rank: int, tasks: int) -> str:
    """``fused`` or ``streamed`` for pareto_linear with ``rows`` rows like ``like``: a rule from counted bytes."""
    if strategy != "auto":
        return strategy
    if rank == 0 and tasks == 0:
        # nothing to merge: streamed is the library's product and nothing else
        return "streamed"
    block_m = config("linear", like, rows=rows, rank=rank).block_m
    return "fused" if rows <= FUSED_ROW_BLOCKS * block_m else "streamed"


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: the tile sizes it uses, warps per program, and stages of its inner loop."""

    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What a launch takes besides the kernel's own arguments; a·b + c is one instruction, whatever the default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Entry:
    """One line of a configuration file: a Config and what it is for. The first line that fits is taken."""

    op: str
    dtype: str
    config: Config
    max_rows: int | None = None
    max_rank: int | None = None
    aligned: bool | None = None

    def fits(self, op: str, dtype: str, rows: int, rank: int, aligned: bool) -> bool:
        """Whether this line is for that kernel, type (``float32``, ``tf32``, ``16-bit``), rows, rank and layout."""
        return (
            self.op == op
            and self.dtype in (dtype, "any")
            and (self.max_rows is None or rows <= self.max_rows)
            and (self.max_rank is None or rank <= self.max_rank)
            and (self.aligned is None or self.aligned == aligned)
        )


def read_entries(text: str) -> list[Entry]:
    """The entries of a configuration file's JSON; a field that a Config or an Entry does not have is a TypeError."""
    return [Entry(**{**line, "config": Config(**line["config"])}) for line in json.loads(text)["entries"]]


def architectures(text: str) -> tuple[str, ...]:
    """The architectures a configuration file's JSON is for (``sm_90``), none named: any."""
    return tuple(json.loads(text).get("architectures", ()))


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
    aligned: bool = True,
) -> Config:
    """The launch configuration of ``op`` for tensors like ``like`` (or of that dtype and device).

    ``aligned``: see :func:`is_aligned`. Scattered loads take an address register pair per element and want small tiles.
    """
    if like is not None:
        dtype, device = like.dtype, like.device
    assert device is not None
    full = "float32" if dot_precision(torch.float32) == "ieee" else "tf32"
    kind = full if dtype == torch.float32 else "16-bit"
    return lookup(gpu_file(device), op, kind, _bucket(rows), rank, aligned)


def gpu_file(device: torch.device) -> str:
    """The name of the configuration file for a device, whether there is one or not: ``default`` off the GPU."""
    return gpu_name(device.index) if device.type == "cuda" else "default"


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton can load each tensor 16 bytes at a time: neighbours along a dimension that is a multiple of 16,
    every other stride and the address multiples of 16, which is what it specialises a kernel for. And all of one type:
    float32 weights beside 16-bit activations (autocast) are as hard on registers."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.dtype for tensor in given}) > 1:
        return False
    for tensor in given:
        if tensor.data_ptr() % 16:
            return False
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and (size if stride == 1 else stride) % 16:
                return False
    return True


def _bucket(rows: int) -> int:
    """Rows rounded up to a power of two: few different configurations, few compilations."""
    return 1 << max(rows - 1, 0).bit_length()


@functools.cache
def lookup(name: str, op: str, dtype: str, rows: int, rank: int, aligned: bool) -> Config:
    """The first line that fits in the GPU's own file, then in the default one."""
    for entry in entries(name):
        if entry.fits(op, dtype, rows, rank, aligned):
            return entry.config
    raise LookupError(f"configs/{name}.json: expected an entry for {op} in {dtype} with rank {rank}, got none")


def splits(rows: int, block_m: int, programs: int, most: int) -> tuple[int, int]:
    """How many parts to cut ``rows`` into, and rows per part, where ``programs`` programs work on each part.

    Enough parts for about 256 programs, at least four blocks each, at most 16 and ``most``: each is a partial sum more.
    """
    parts = max(1, min(16, most, 256 // max(programs, 1), rows // (4 * block_m)))
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
    if INTERPRETING and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
