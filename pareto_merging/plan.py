"""What a run will need, counted from the architecture alone: parameters and bytes by kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pareto_merging.errors import UserError
from pareto_merging.parametrize import lambda_group, wants_low_rank
from pareto_merging.workspace import Workspace


@dataclass(frozen=True)
class PlanRow:
    """One kind of memory: how many numbers, how many bytes, and what it is."""

    kind: str
    parameters: int
    bytes: int
    note: str


def plan_run(workspace: Workspace) -> list[PlanRow]:
    """Count what the run holds, without reading a weight; activations and the library's own memory are not in it.

    Tensors that turn out equal in all copies store no task vectors, so those rows are upper bounds.
    """
    method, tasks = workspace.config.method, len(workspace.task_configs)
    model = workspace.skeleton(only_shapes=True)
    wide = torch.finfo(torch.float32).bits // 8
    narrow = torch.finfo(workspace.dtype).bits // 8
    named = list(model.named_parameters())
    frozen = sum(p.numel() for _, p in named)
    buffers = sum(b.numel() for b in model.buffers())
    # the outer products learn no core and have a column for each task
    rank, has_core = (method.rank, True) if method.core == "tensor" else (tasks, False)
    factors, cores = 0, 0
    for name, parameter in named:
        if parameter.ndim == 2 and wants_low_rank(model, name, method.low_rank):
            factors += rank * sum(parameter.shape)
            cores += rank**2 * tasks if has_core else 0
    lambdas = tasks * len({lambda_group(name, method.granularity) for name, _ in named})
    kept = factors + cores + lambdas
    learned = kept if method.learn_lambda else factors + cores
    rows = [
        ("frozen weights W0", frozen, narrow, "held once"),
        ("buffers", buffers, narrow, "batch-norm statistics and the like"),
        ("task vectors τ", tasks * frozen, narrow, f"K = {tasks}, at most"),
        ("λ", lambdas, wide, f"one vector per {method.granularity}, float32"),
        ("A and B", factors, wide, f"rank {rank}, {method.low_rank}, float32"),
        ("G", cores, wide, "float32"),
        ("Adam's moments", 2 * learned, wide, "during training"),
        ("gradients of the K tasks", (tasks + 1) * learned, wide, "during training"),
    ]
    largest = max(p.numel() for _, p in named)
    rows.append(("one layer's W(γ) and dW", 2 * largest, narrow, "workspace; a GPU holds one layer at a time"))
    strategy, budget = workspace.config.strategy, workspace.config.memory_budget
    if strategy in ("auto", "cached") or (strategy == "eager" and workspace.device.type == "cpu"):
        if strategy == "cached" and budget is not None and budget < frozen * narrow:
            raise UserError(
                f"memory_budget: expected at least {frozen * narrow} bytes (one more model) for strategy cached, got "
                f"{int(budget)}; auto keeps as much as fits"
            )
        held = frozen if budget is None else min(frozen, int(budget) // narrow)
        limit = "" if budget is None else ", up to memory_budget"
        if budget is None and strategy == "auto" and workspace.device.type == "cuda":
            limit = ", up to half of what is free"
        rows.append(("merged weights of a step", held, narrow, f"kept for its K tasks{limit}"))
    rows.append(("Pareto set file", kept, wide, "on disk"))
    rows.append(("checkpoint", kept + 2 * learned, wide, "on disk, during training"))
    rows.append(("folded file", frozen + buffers, narrow, "on disk, and what a server holds, plus A, B and G"))
    return [PlanRow(kind, count, count * size, note) for kind, count, size, note in rows]
