"""The learned parameters of a Pareto model by name, and λ as one table."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.model.parameters import CONSTANT, LOW_RANK, merged_parameters
from pareto_merging.model.state import pareto_state

Granularity: TypeAlias = Literal["tensor", "module", "block", "model"]


def lambda_group(name: str, granularity: Granularity) -> str:
    """Name the λ vector that parameter ``name`` uses: ``blocks.3.attn.weight`` -> ``blocks.3`` per block."""
    if granularity == "tensor":
        return name
    if granularity == "model":
        return "model"
    owner = name.rpartition(".")[0]
    if granularity == "module":
        return owner or name
    parts = owner.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else owner or name


def lambda_names(model: nn.Module) -> list[str]:
    """Return the names of the L λ vectors, in the order of :func:`get_lambda`."""
    return list(_lambdas(model))


def get_lambda(model: nn.Module) -> Tensor:
    """Return λ of all layers as one [L, K] tensor, a copy. Row l belongs to ``lambda_names(model)[l]``."""
    tasks = len(pareto_state(model).task_names)
    rows = list(_lambdas(model).values())
    return torch.stack([row.detach() for row in rows]) if rows else torch.empty(0, tasks, dtype=torch.float32)


def set_lambda(model: nn.Module, values: Tensor) -> None:
    """Set λ of all layers from one [L, K] tensor of finite numbers. [K] is for every layer, one number for all."""
    tasks = len(pareto_state(model).task_names)
    rows = list(_lambdas(model).values())
    try:
        values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lambda: expected a tensor of numbers, got {values!r}") from error
    if values.ndim < 2 and values.shape in ((), (tasks,)):
        values = values.expand(len(rows), tasks)
    if values.shape != (len(rows), tasks):
        raise ValueError(f"lambda: expected shape [{len(rows)}, {tasks}], got {list(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("lambda: expected finite numbers, got NaN or inf")
    with torch.no_grad():
        for row, value in zip(rows, values, strict=True):
            row.copy_(value)


def _lambdas(model: nn.Module) -> dict[str, nn.Parameter]:
    lambdas: dict[str, nn.Parameter] = {}
    for parameter in merged_parameters(model):
        if not isinstance(parameter.lam, nn.Parameter):
            continue
        group = parameter.module.pareto_groups[parameter.name]
        if lambdas.setdefault(group, parameter.lam) is not parameter.lam:
            why = "load_state_dict(assign=True) takes apart what is shared; load without it"
            raise ValueError(f"model: expected one λ vector for {group}, got several ({why})")
    return lambdas


def learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return λ, A_c, B_c, A, G and B by name, each tensor once.

    That is what is trained, and what a Pareto set file holds.

    A λ vector carries the name of its group, ``lam.<group>``; the rest the name of its parameter, ``A.<parameter>``.
    """
    learned = {f"lam.{group}": parameter for group, parameter in _lambdas(model).items()}
    seen = set(learned.values())
    for parameter in merged_parameters(model):
        for part in (*CONSTANT, *LOW_RANK):
            value = getattr(parameter, part)
            if isinstance(value, nn.Parameter) and value not in seen:
                seen.add(value)
                learned[f"{part}.{parameter.path}"] = value
    return learned
