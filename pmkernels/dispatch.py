"""Which strategy for which shape on which device, and the launch configuration of every kernel.

Strategies of pareto_linear (all give the same result up to rounding):

- ``eager``: plain PyTorch on any device; the definition and the CPU path.
- ``fused``: W assembled tile by tile inside the matrix product; nothing of W's size is ever allocated.
- ``streamed``: W merged in one pass into a scratch tensor, then the library's matrix product.

``strategy="auto"`` is eager off the GPU; on it :func:`choose` is the one place that knows a rule. Launch configurations
are read from ``configs/*.json``: a file named after the GPU where one was tuned by ``python -m benchmarks.tune``
(``nvidia-h200.json``: launches, rates and fastest strategies as measured), else one for its architecture
(``sm_90.json``), else ``default.json``. ``python -m benchmarks.budget`` compiles every entry without a GPU.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from pmkernels import costs

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


def choose(
    operation: str,
    strategy: str,
    like: Tensor,
    *,
    rows: int,
    n: int,
    d: int,
    rank: int,
    tasks: int,
    per_row: bool = False,
) -> str:
    """``fused`` or ``streamed`` for one operation (of :data:`pmkernels.costs.OPERATIONS`) of a layer [n, d].

    ``strategy`` other than ``auto`` is what it is. Otherwise what was measured on this GPU at the nearest number of
    rows, where a tuned configuration file has this layer, else the cheaper by :mod:`pmkernels.costs`.
    """
    if operation == "weight_grad" and like.dtype == torch.float16:
        # a dW of 16 bits would underflow
        return "fused"
    if strategy != "auto":
        return strategy
    kind = precision_kind(like.dtype)
    problem = costs.Problem(rows=rows, n=n, d=d, tasks=tasks, rank=rank, kind=kind, per_row=per_row)
    return _cheapest(gpu_file(like.device), like.device, operation, problem)


@functools.lru_cache(maxsize=4096)
def _cheapest(name: str, device: torch.device, operation: str, problem: costs.Problem) -> str:
    if operation in ("forward", "dx") and not problem.tasks and (problem.per_row or not problem.rank):
        # nothing to merge: streamed is the library's product and nothing else
        return "streamed"
    measured = [
        choice
        for choice in measured_choices(name)
        if (choice.op, choice.dtype, choice.n, choice.d, choice.tasks, choice.rank)
        == (operation, problem.kind, problem.n, problem.d, problem.tasks, problem.rank)
    ]
    if measured and not problem.per_row:
        return min(measured, key=lambda c: abs(math.log2(c.rows) - math.log2(max(problem.rows, 1)))).best
    gpu = rates(name, device)
    return min(("streamed", "fused"), key=lambda s: predicted_seconds(name, gpu, operation, s, problem))


def predicted_seconds(
    name: str, gpu: costs.Rates, operation: str, strategy: str, problem: costs.Problem, *, cached: bool = False
) -> float:
    """Predict the seconds of an operation on a GPU, with the tiles of a configuration file."""
    kernels = predicted_passes(name, gpu, operation, strategy, problem, cached=cached)
    return costs.seconds(kernels, gpu, problem.kind)


def predicted_passes(
    name: str, gpu: costs.Rates, operation: str, strategy: str, problem: costs.Problem, *, cached: bool = False
) -> list[costs.Pass]:
    """List the kernels of an operation as :mod:`pmkernels.costs` counts them, with a configuration file's tiles."""
    op, rows = operation if operation in ("weight_grad", "preference") else "linear", _bucket(problem.rows)
    if operation == "weight_grad" and strategy == "streamed":
        # the library forms dW, and what tiles are is a matter of its reduction
        op, rows = "merge_grad", _bucket(0)
    config = lookup(name, op, problem.kind, rows, problem.rank, True)
    n, d = (problem.d, problem.n) if operation == "dx" else (problem.n, problem.d)
    if operation == "weight_grad":
        tiles = -(-n // config.block_n) * -(-d // config.block_d)
        splits, _ = splits_of_rows(config, gpu.multiprocessors, problem.rows, n, d, tiles, problem.rank)
    else:
        tiles = -(-problem.rows // config.block_m) * -(-n // config.block_n)
        splits, _ = splits_of_d(config, gpu.multiprocessors, problem.rows, n, d, tiles)
    return costs.passes(
        operation,
        strategy,
        problem,
        block_m=config.block_m,
        block_n=config.block_n,
        block_d=config.block_d,
        splits=splits,
        cached=cached,
        cache_bytes=gpu.cache_bytes,
    )


@functools.cache
def rates(name: str, device: torch.device) -> costs.Rates:
    """The rates of a device: measured ones of its configuration file, known ones by name, or an estimate."""
    known = costs.GPUS.get(gpu_name(device.index) if device.type == "cuda" else "nvidia-h200")
    if known is None:
        properties = torch.cuda.get_device_properties(device)
        known = costs.estimate(properties.multi_processor_count, (properties.major, properties.minor))
    text = config_files().get(name)
    return known if text is None else replace(known, **read_rates(text))


@dataclass(frozen=True)
class Choice:
    """The fastest strategy as measured for one operation of one layer at that many rows."""

    op: str
    dtype: str
    n: int
    d: int
    tasks: int
    rank: int
    rows: int
    best: str


def read_rates(text: str) -> dict[str, Any]:
    """The measured rates in a configuration file's JSON: fields of :class:`pmkernels.costs.Rates`."""
    found: dict[str, Any] = json.loads(text).get("rates", {})
    return {**found, "measured": True} if found else {}


@functools.cache
def measured_choices(name: str) -> tuple[Choice, ...]:
    """What a configuration file says was measured to be fastest."""
    text = config_files().get(name)
    return () if text is None else tuple(Choice(**line) for line in json.loads(text).get("strategies", ()))


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: the tile sizes it uses, warps per program, and stages of its inner loop."""

    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    num_warps: int = 4
    num_stages: int = 2
    # task vectors loaded at a time: see weight_tile
    unroll: int = 1
    # parts that D (linear) or M (weight_grad) is cut into; 0: by the rules below
    splits: int = 0

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
    """The lines of a configuration file, then those of the files of its architectures, then the default ones."""
    files = config_files()
    names = [name, *(architectures(files[name]) if name in files else ()), "default"]
    return tuple(entry for n in dict.fromkeys(names) if n in files for entry in read_entries(files[n]))


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
    assert dtype is not None
    return lookup(gpu_file(device), op, precision_kind(dtype), _bucket(rows), rank, aligned)


def precision_kind(dtype: torch.dtype) -> str:
    """How tiles of that type are multiplied: ``16-bit``, ``tf32`` or ``float32``."""
    if dtype != torch.float32:
        return "16-bit"
    return "float32" if dot_precision(torch.float32) == "ieee" else "tf32"


@functools.cache
def gpu_file(device: torch.device) -> str:
    """The configuration file of a device: its GPU's own, that of its architecture, or ``default``."""
    if device.type != "cuda":
        return "default"
    files = config_files()
    major, minor = torch.cuda.get_device_capability(device)
    return next((name for name in (gpu_name(device.index), f"sm_{major}{minor}") if name in files), "default")


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


# programs on a multiprocessor at a time that splitting aims for
PROGRAMS_EACH, MAX_SPLITS = 2, 16


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an H200's off the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def splits_of_d(config: Config, multiprocessors: int, rows: int, n: int, d: int, tiles: int) -> tuple[int, int]:
    """How many parts to cut D into for y [rows, n] made of ``tiles`` tiles, and columns per part.

    Enough to fill the GPU, two blocks each or more; each part is a partial y in float32, all of them together at most
    half of a weight.
    """
    blocks = -(-d // config.block_d)
    wanted = config.splits or PROGRAMS_EACH * multiprocessors // max(tiles, 1)
    parts = max(1, min(wanted, blocks // 2, MAX_SPLITS, d // (2 * max(rows, 1))))
    per_part = max(-(-blocks // parts), 1) * config.block_d
    return max(-(-d // per_part), 1), per_part


def splits_of_rows(
    config: Config, multiprocessors: int, rows: int, n: int, d: int, tiles: int, rank: int
) -> tuple[int, int]:
    """How many parts to cut M into for a dW of ``tiles`` tiles, and rows per part.

    Only where the tiles leave multiprocessors idle, eight blocks of rows each or more. Every part reads the task
    vectors again, if from L2; its partial sums of P and Q stay, all together, below half of a weight.
    """
    idle = multiprocessors // max(tiles, 1)
    each = rank * (n * -(-d // config.block_d) + d * -(-n // config.block_n))
    most = n * d // (2 * each) if each else MAX_SPLITS
    parts = max(1, min(config.splits or idle, MAX_SPLITS, most, rows // (8 * config.block_m)))
    per_part = max(-(-rows // (parts * config.block_m)), 1) * config.block_m
    return max(-(-rows // per_part), 1), per_part


def from_tiles(rank: int, n: int, d: int) -> bool:
    """Whether P and Q come with dλ from tiles of dW: their partial sums must stay smaller than that weight [n, d]."""
    return rank <= MAX_RANK_FROM_TILES and -(-rank // 16) * 16 < min(n, d)


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
