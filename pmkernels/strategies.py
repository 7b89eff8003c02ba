"""Which strategy for which shape on which device.

Strategies of pareto_linear (all give the same result up to rounding):

- ``eager``: plain PyTorch on any device; the definition and the CPU path.
- ``fused``: W assembled tile by tile inside the matrix product; nothing of W's size is ever allocated.
- ``streamed``: W merged in one pass into a scratch tensor, then the library's matrix product.

``strategy="auto"`` is eager off the GPU; on it :func:`choose` is the one place that knows a rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pmkernels import costs, dispatch, launch
from pmkernels.configs import Configs

STRATEGIES = ("auto", "fused", "streamed", "eager")


def unsupported(device: torch.device, tensors: Mapping[str, Tensor | None]) -> Exception | None:
    """Return the error to raise where a user asks for kernels that cannot do this, or None if they can."""
    if not launch.HAS_TRITON:
        return ValueError("strategy: expected 'eager' or 'auto', because triton is not installed")
    if not dispatch.runs_kernels(device):
        return ValueError(
            "strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU "
            f"(TRITON_INTERPRET=1, set before the start, interprets kernels on the CPU), got device {device}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in launch.DTYPES:
            expected = "float32, bfloat16 or float16 (float64: strategy 'eager')"
            return TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    task_vectors, A, G = (tensors.get(name) for name in ("task_vectors", "A", "G"))
    for name, tasks in (
        ("task_vectors", 0 if task_vectors is None else task_vectors.shape[0]),
        ("G", 0 if G is None else G.shape[2]),
    ):
        if tasks > launch.MAX_TASKS:
            return ValueError(
                f"{name}: expected K from 1 to {launch.MAX_TASKS} (more: strategy 'eager'), got K = {tasks}"
            )
    if A is not None and A.shape[1] > launch.MAX_RANK:
        expected = f"a rank from 1 to {launch.MAX_RANK} (more: strategy 'eager')"
        return ValueError(f"A: expected {expected}, got rank {A.shape[1]}")
    return None


def resolve(
    strategy: str,
    tensors: Mapping[str, Tensor | None],
    device: torch.device,
) -> str:
    """Return ``eager`` for a call with these tensors, by name, that is not for the kernels, else ``strategy``.

    Raises the error of a wish that cannot be. ``auto`` goes on as it is: the operators ask :func:`choose`, out of the
    compiler's sight.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    meant = dispatch.in_force().auto
    if strategy == "eager" or (strategy == "auto" and meant is None and not dispatch.as_on_a_gpu(device)):
        return "eager"
    error = unsupported(device, tensors)
    if error is None:
        return strategy if strategy != "auto" or meant is None else meant
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
    """Return ``fused`` or ``streamed`` for one operation (of :data:`pmkernels.costs.OPERATIONS`) of a layer [n, d].

    ``strategy`` other than ``auto`` is what it is. Otherwise what was measured on this GPU at the nearest number of
    rows, where a tuned configuration file has this layer, else the cheaper by :mod:`pmkernels.costs`.
    """
    if operation == "weight_grad" and like.dtype == torch.float16:
        # a dW of 16 bits would underflow
        return "fused"
    if strategy != "auto":
        return strategy
    kind = launch.precision_kind(like.dtype)
    problem = costs.Problem(rows=rows, n=n, d=d, tasks=tasks, rank=rank, kind=kind, per_row=per_row)
    return _cheapest(dispatch.in_force(), dispatch.gpu_file(like.device), like.device, operation, problem)


@functools.lru_cache(maxsize=4096)
def _cheapest(configs: Configs, name: str, device: torch.device, operation: str, problem: costs.Problem) -> str:
    if operation in ("forward", "dx") and not problem.tasks and (problem.per_row or not problem.rank):
        # nothing to merge: streamed is the library's product and nothing else
        return "streamed"
    measured = [
        choice
        for choice in configs.choices(name)
        if (choice.op, choice.dtype, choice.n, choice.d, choice.tasks, choice.rank)
        == (operation, problem.kind, problem.n, problem.d, problem.tasks, problem.rank)
    ]
    if measured and not problem.per_row:
        return min(measured, key=lambda c: abs(math.log2(c.rows) - math.log2(max(problem.rows, 1)))).best
    gpu = dispatch.rates(name, device)
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
    op, rows = operation if operation in ("weight_grad", "preference") else "linear", launch.bucket(problem.rows)
    if operation == "weight_grad" and strategy == "streamed":
        # the library forms dW, and what tiles are is a matter of its reduction
        op, rows = "merge_grad", launch.bucket(0)
    config = dispatch.lookup(name, op, problem.kind, rows, problem.rank, True)
    n, d = (problem.d, problem.n) if operation == "dx" else (problem.n, problem.d)
    if operation == "weight_grad":
        tiles = -(-n // config.block_n) * -(-d // config.block_d)
        splits, _ = launch.splits_of_rows(config, gpu.multiprocessors, problem.rows, n, d, tiles, problem.rank)
    else:
        tiles = -(-problem.rows // config.block_m) * -(-n // config.block_n)
        splits, _ = launch.splits_of_d(config, gpu.multiprocessors, problem.rows, n, d, tiles)
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
