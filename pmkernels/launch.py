"""The arithmetic of a launch: parts of a product, precisions, and which tensors are aligned."""

from typing import Any

import torch
from torch import Tensor

from pmkernels.configs import Config

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    # Triton has no build for this platform
    HAS_TRITON = False

# decided when kernels are defined, so once: Triton interprets kernels on the CPU and does not compile them
INTERPRETING = HAS_TRITON and bool(triton.knobs.runtime.interpret)

MAX_TASKS, MAX_RANK = 32, 64
# up to here P and Q come with dλ from tiles of dW; their partial sums would reach the size of W at twice that, so
# larger ranks go row by row, as with a frozen λ
MAX_RANK_FROM_TILES = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# programs on a multiprocessor at a time that splitting aims for
PROGRAMS_EACH, MAX_SPLITS = 2, 16


def bucket(rows: int) -> int:
    """Round rows up to a power of two: few different configurations, few compilations."""
    return 1 << max(rows - 1, 0).bit_length()


def is_aligned(*tensors: Tensor | None) -> bool:
    """Say whether Triton can load each tensor 16 bytes at a time.

    It can where neighbours lie along a dimension that is a multiple of 16 and every other stride and the address are
    multiples of 16, which is what it specialises a kernel for. And all of one type: float32 weights beside 16-bit
    activations (autocast) are as hard on registers.
    """
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


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Return the strides of a tensor, zeros where there is none."""
    return (0,) * dimensions if tensor is None else tensor.stride()


def splits(rows: int, block_m: int, programs: int, most: int) -> tuple[int, int]:
    """Cut ``rows`` into parts of ``programs`` programs; return how many, and rows per part.

    Enough parts for about 256 programs, at least four blocks each, at most 16 and ``most``: each is a partial sum more.
    """
    parts = max(1, min(16, most, 256 // max(programs, 1), rows // (4 * block_m)))
    per_part = -(-rows // parts)
    return parts, -(-per_part // block_m) * block_m


def splits_of_d(config: Config, multiprocessors: int, rows: int, n: int, d: int, tiles: int) -> tuple[int, int]:
    """Cut D into parts for a y of ``tiles`` tiles; return their number and columns.

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
    """Cut M into parts for a dW of ``tiles`` tiles; return their number and rows.

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
    """Say whether partial sums of P and Q from tiles stay below dW [n, d]."""
    return rank <= MAX_RANK_FROM_TILES and -(-rank // 16) * 16 < min(n, d)


def padded_rank(rank: int) -> int:
    """Return the rank as a tile size: a power of two, at least 16."""
    return max(16, 1 << max(rank - 1, 0).bit_length())


def precision_kind(dtype: torch.dtype) -> str:
    """Name how tiles of that type are multiplied: ``16-bit``, ``tf32`` or ``float32``."""
    if dtype != torch.float32:
        return "16-bit"
    return "float32" if dot_precision(torch.float32) == "ieee" else "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """Name how tiles multiply: float32 exactly, unless torch was told that TF32 is good enough.

    In 16-bit models only small products have float32 operands (dW against A and B): TF32 keeps more than 16 bits do.
    """
    # the newer property: it also reflects allow_tf32, which raises where both were used
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def rank_precision(dtype: torch.dtype) -> str:
    """Name how products over the rank multiply: in 16-bit models nearly exact, three TF32 products."""
    return "tf32x3" if dtype != torch.float32 else dot_precision(dtype)


def precisions(dtype: torch.dtype) -> dict[str, Any]:
    """Return a kernel's constants for products of a model's tiles, and over the rank."""
    return {"COMPUTE": compute_type(dtype), "PRECISION": dot_precision(dtype), "RANK_PRECISION": rank_precision(dtype)}


def compute_type(dtype: torch.dtype) -> Any:
    """Return the type in which tiles are multiplied: the model's own."""
    # the interpreter would multiply bfloat16 as raw bits
    if INTERPRETING and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
