"""What a step cannot take less than: its products, attention and merge, counted."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.common.towers import RANK
from benchmarks.training.models import Case
from pmkernels import costs


def products(
    skeleton: nn.Module, shape: Sequence[int], width: int
) -> tuple[list[tuple[int, int, int, bool]], float, float]:
    """Return every product of one forward, then the operations and numbers moved of all attention. A product is rows,
    out, in and whether its input needs a gradient. They are counted by a run of the model without memory."""
    counted: list[tuple[int, int, int, bool]] = []
    attention: list[int] = []

    def hook(name: str, module: Any, args: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            counted.append((output.numel() // output.shape[1], output.shape[1], module.weight[0].numel(), False))
            return
        rows = args[0].numel() // args[0].shape[-1]
        if isinstance(module, nn.MultiheadAttention):
            counted.extend([(rows, 3 * width, width, True), (rows, width, width, True)])
        else:
            counted.append((rows, module.out_features, module.in_features, True))
        if isinstance(module, nn.MultiheadAttention) or name.endswith("qkv"):
            attention.append(rows)

    kinds = (nn.Linear, nn.MultiheadAttention, nn.Conv2d)
    modules = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(functools.partial(hook, name)) for name, module in modules]
    try:
        dtype = next(skeleton.parameters()).dtype
        # with gradients wanted, attention takes the ordinary path
        skeleton(torch.empty(*shape, device="meta", dtype=dtype))
    finally:
        for handle in handles:
            handle.remove()
    operations = sum(4.0 * rows * (rows // shape[0]) * width for rows in attention)
    return counted, operations, sum(4.0 * rows * width for rows in attention)


def bound_ms(case: Case, rates: Mapping[str, float], dtype: torch.dtype) -> float:
    """Return a step's bound in ms: merge, products and attention, one after the other."""
    kind = "float32" if dtype == torch.float32 else "16-bit"
    wide, copy = rates["float32"], rates["copy"]
    gpu = costs.Rates(
        rates["bfloat16"], wide, wide, copy, cache=copy, cache_bytes=0.0, multiprocessors=1, measured=True
    )
    counted, operations, numbers = products(case.skeleton, case.images[0].shape, case.tower.width)
    seconds = 0.0
    size = 4 if kind == "float32" else 2
    for rows, n, d, inner in counted:
        problem = costs.Problem(rows, n, d, case.tasks, RANK, kind)
        seconds += costs.bound("merge", problem).seconds(gpu, kind)
        each = [costs.bound("forward", problem, cached=True), costs.bound("weight_grad", problem)]
        each += [costs.bound("dx", problem, cached=True)] if inner else []
        seconds += case.tasks * sum(bound.seconds(gpu, kind) for bound in each)
    # backward: twice the operations and the bytes of the forward
    seconds += 3 * case.tasks * costs.Bound(operations, numbers * size).seconds(gpu, kind)
    return 1e3 * seconds
