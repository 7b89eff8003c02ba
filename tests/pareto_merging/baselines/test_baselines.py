"""The baselines against plain loops."""

from __future__ import annotations

import pytest
import torch
from helpers import noisy_copy
from torch import nn

from pareto_merging.baselines import adamerging, task_arithmetic, weight_averaging
from pareto_merging.config import MethodSettings
from pareto_merging.data.heads import ZeroShotHead
from pareto_merging.data.sources import TensorImages
from pareto_merging.objectives import entropy_terms
from pareto_merging.training import MergingTask


def test_weight_averaging_and_task_arithmetic(tiny_vit: nn.Module) -> None:
    finetuned = {f"t{k}": noisy_copy(tiny_vit, k) for k in range(3)}
    average = weight_averaging.merge(tiny_vit, finetuned)
    arithmetic = task_arithmetic.merge(tiny_vit, finetuned, coefficient=0.4)
    assert type(average) is type(arithmetic) is type(tiny_vit)
    weights = [dict(copy.named_parameters()) for copy in finetuned.values()]
    for name, base in tiny_vit.named_parameters():
        torch.testing.assert_close(average.get_parameter(name), sum(w[name] for w in weights) / 3)
        expected = base + 0.4 * sum(w[name] - base for w in weights)
        torch.testing.assert_close(arithmetic.get_parameter(name), expected)
    with pytest.raises(ValueError, match="t1 lacks proj"):
        weight_averaging.merge(tiny_vit, {"t1": {k: v for k, v in tiny_vit.state_dict().items() if k != "proj"}})


def test_buffers_and_tied_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    finetuned = [noisy_copy(net, 1), noisy_copy(net, 2)]
    average = weight_averaging.merge(net, finetuned)
    assert average[2].weight is average[0].weight
    torch.testing.assert_close(average[0].weight, (finetuned[0][0].weight + finetuned[1][0].weight) / 2)
    torch.testing.assert_close(average[1].running_var, (finetuned[0][1].running_var + finetuned[1][1].running_var) / 2)


def test_adamerging_is_entropy_minimisation_over_lambda(tiny_vit: nn.Module) -> None:
    """Against the equation with autograd through the whole merged state dict, and Adam on one λ per tensor and task."""
    finetuned = {f"t{k}": noisy_copy(tiny_vit, k + 1) for k in range(2)}
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(6, 3, 8, 8, generator=generator) for name in finetuned}
    tasks = {
        name: MergingTask(TensorImages(x), ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0))
        for name, x in images.items()
    }
    # batches of the whole split, so that their order does not matter
    method = MethodSettings.model_validate({"steps": 4, "batch_size": 6, "learning_rate": 1e-2})
    merged = adamerging.merge(tiny_vit, finetuned, tasks=tasks, method=method, progress=False)

    base = {name: p.detach() for name, p in tiny_vit.named_parameters()}
    taus = [{n: p.detach() - base[n] for n, p in copy.named_parameters()} for copy in finetuned.values()]
    lambdas = {name: torch.full((2,), 0.3, requires_grad=True) for name in base}
    optimizer = torch.optim.Adam(lambdas.values(), lr=1e-2)

    def state() -> dict[str, torch.Tensor]:
        return {n: base[n] + lambdas[n][0] * taus[0][n] + lambdas[n][1] * taus[1][n] for n in base}

    for _ in range(4):
        loss = sum(
            entropy_terms(task.head(torch.func.functional_call(tiny_vit, state(), (images[name],)))).objective
            for name, task in tasks.items()
        )
        optimizer.zero_grad()
        (loss / 2).backward()
        optimizer.step()
    for name, value in state().items():
        torch.testing.assert_close(merged.get_parameter(name), value, rtol=1e-3, atol=1e-5)
