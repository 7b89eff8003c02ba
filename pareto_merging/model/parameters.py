"""The merged and the learned parameters of a Pareto model."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pareto_merging.model.layer import LEARNED, pareto_modules, part_name
from pareto_merging.model.state import pareto_state

Granularity: TypeAlias = Literal["tensor", "module", "block", "model"]


def lambda_group(name: str, granularity: Granularity) -> str:
    """The name of the λ vector that parameter ``name`` uses: ``blocks.3.attn.weight`` -> ``blocks.3`` per block."""
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
    """The names of the L λ vectors of a Pareto model, in the order of :func:`get_lambda`."""
    return list(_lambdas(model))


def get_lambda(model: nn.Module) -> Tensor:
    """λ of all layers as one [L, K] tensor (a copy), row l belonging to ``lambda_names(model)[l]``."""
    tasks = len(pareto_state(model).task_names)
    rows = list(_lambdas(model).values())
    return torch.stack([row.detach() for row in rows]) if rows else torch.empty(0, tasks, dtype=torch.float32)


def set_lambda(model: nn.Module, values: Tensor) -> None:
    """Set λ of all layers from one [L, K] tensor (or [K] for every layer, or a number for all); finite values."""
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
    found: dict[str, nn.Parameter] = {}
    for _, module in pareto_modules(model):
        for name, group in module.pareto_groups.items():
            parameter = module._parameters[part_name(name, "lam")]
            assert parameter is not None
            if found.setdefault(group, parameter) is not parameter:
                raise ValueError(
                    f"model: expected one λ vector for {group}, got several (load_state_dict(assign=True) takes apart "
                    "what is shared; load without it)"
                )
    return found


def learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """λ, A, G and B of a Pareto model by name, each tensor once: what is trained, and what a Pareto set file holds.

    A λ vector carries the name of its group, ``lam.<group>``; the rest the name of its parameter, ``A.<parameter>``.
    """
    found: dict[str, nn.Parameter] = {f"lam.{group}": parameter for group, parameter in _lambdas(model).items()}
    seen = {id(parameter) for parameter in found.values()}
    for prefix, module in pareto_modules(model):
        for name in module.pareto_names:
            for part in LEARNED:
                parameter = module._parameters.get(part_name(name, part))
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{part}.{prefix}.{name}" if prefix else f"{part}.{name}"] = parameter
    return found
