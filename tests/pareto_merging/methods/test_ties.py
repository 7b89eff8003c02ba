"""TIES-Merging against a hand-worked example and plain loops over the flattened vectors."""

from typing import Any

import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, conv_net, parameter_task_vectors, ties_in_loops
from torch import nn

from pareto_merging.methods import task_arithmetic, ties, weight_averaging


def test_worked_example() -> None:
    """Two weights and a bias; density 0.7 keeps two of three.

    τ       weight     bias         trimmed             kept
    task 1   3   −1    0.5           3   −1    0         3    0    0
    task 2  −2    3    1            −2    3    0         0    3    0
    task 3   4    0.5  2             4    0    2         4    0    2
    sum                              5    2    2
    mean                                                3.5   3    2
    """
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[10.0, 20.0]]))
        net.bias.fill_(30.0)
    taus = [(3.0, -1.0, 0.5), (-2.0, 3.0, 1.0), (4.0, 0.5, 2.0)]
    copies = [{"weight": torch.tensor([[10 + a, 20 + b]]), "bias": torch.tensor([30 + c])} for a, b, c in taus]
    result = ties.merge(net, copies, coefficient=1.0, density=0.7, combine="mean")
    assert result.facts["thresholds"] == [1.0, 2.0, 2.0]
    assert result.model().weight.tolist() == [[13.5, 23.0]]
    assert result.model().bias.tolist() == [32.0]
    summed = ties.merge(net, copies, coefficient=0.5, density=0.7, combine="sum").model()
    assert summed.weight.tolist() == [[13.5, 21.5]]
    assert summed.bias.tolist() == [31.0]


def test_nothing_is_elected_where_the_sum_is_zero() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    copies = [{"weight": torch.tensor([[1 + tau]])} for tau in (1.0, 1.0, -2.0)]
    assert ties.merge(net, copies, coefficient=1.0, density=1.0).model().weight.item() == 1.0


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize(("tasks", "density", "coefficient"), [(1, 0.3, 0.5), (3, 0.2, 1.0), (4, 1.0, 0.3)])
def test_against_loops(combine: Any, tasks: int, density: float, coefficient: float) -> None:
    net = conv_net()
    finetuned = [noisy_copy(net, k + 1, 0.1) for k in range(tasks)]
    model = ties.merge(net, finetuned, coefficient=coefficient, density=density, combine=combine).model()
    kept = ties_in_loops(parameter_task_vectors(net, finetuned), density)
    expected = {}
    for name, base in net.named_parameters():
        merged = base.detach().clone()
        columns = zip(*(tau.reshape(-1).tolist() for tau in kept[name]), strict=True)
        for i, column in enumerate(columns):
            agreeing = [value for value in column if value != 0]
            change = sum(agreeing) / (len(agreeing) if combine == "mean" and agreeing else 1)
            merged.view(-1)[i] += coefficient * change
        expected[name] = merged
    # buffers are averaged and take no part in the trimming
    average = weight_averaging.merge(net, finetuned).model()
    expected |= {name: average.state_dict()[name] for name in ("1.running_mean", "1.running_var")}
    assert_state(model, expected)


def test_one_copy_untrimmed_is_task_arithmetic(tiny_vit: nn.Module) -> None:
    finetuned = [noisy_copy(tiny_vit, 1)]
    expected = task_arithmetic.merge(tiny_vit, finetuned, coefficient=0.7).model()
    assert_state(ties.merge(tiny_vit, finetuned, coefficient=0.7, density=1.0).model(), dict(expected.state_dict()))


def test_errors(tiny_vit: nn.Module) -> None:
    finetuned = [noisy_copy(tiny_vit, 1)]
    with pytest.raises(ValueError, match="combine: expected mean or sum, got 'max'"):
        ties.merge(tiny_vit, finetuned, combine="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"density: expected a share of the entries in \(0, 1\], got 20"):
        ties.merge(tiny_vit, finetuned, density=20)
