"""The closed forms against the merged weights themselves."""

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import small_model
from torch import nn

from pareto_merging.learn.weight_distance import WeightDistance
from pareto_merging.model.fold import fold
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize

GAMMA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("normalize", [False, True])
def test_weight_distance_is_the_distance_of_the_merged_weights(normalize: bool) -> None:
    model, plain, finetuned = small_model()
    randomize(model)
    parameters = list(learned_parameters(model).values())
    distance = WeightDistance(model, normalize).values(GAMMA)
    weights = {
        name: model.get_submodule(name.rpartition(".")[0]).pareto_merged(name.rpartition(".")[2], GAMMA)
        for name, _ in plain.named_parameters()
    }
    expected = []
    for copy in finetuned:
        square = sum((weights[name] - value).square().sum() for name, value in copy.named_parameters())
        size = sum((p - value).square().sum() for p, value in zip(plain.parameters(), copy.parameters(), strict=True))
        expected.append(square / size if normalize else square)
    torch.testing.assert_close(distance, torch.stack(expected))
    for k in range(3):
        ours = torch.autograd.grad(distance[k], parameters, retain_graph=True)
        theirs = torch.autograd.grad(expected[k], parameters, retain_graph=True)
        for name, a, b in zip(learned_parameters(model), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_weight_distance_wants_task_vectors_and_starts_at_one_when_normalised() -> None:
    model, _, _ = small_model()
    with pytest.raises(ValueError, match="expected task vectors"):
        WeightDistance(fold(model))
    for parameter in learned_parameters(model).values():
        parameter.data.zero_()
    torch.testing.assert_close(WeightDistance(model, True).values(GAMMA), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("low_rank", ["all", "none"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
def test_a_constant_term_counts_by_the_dense_definition(low_rank: str, normalize: bool, gamma: list[float]) -> None:
    """Of a convolution, a linear layer, attention and a tied matrix, with gradients of every learned tensor."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attn = nn.Conv2d(3, 4, 2), nn.MultiheadAttention(4, 2)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Net().double()
    finetuned = [noisy_copy(plain, seed) for seed in (1, 2, 3)]
    model = randomize(parametrize(plain, finetuned, rank=2, low_rank=low_rank, constant_rank=3))
    learned, g = learned_parameters(model), torch.tensor(gamma, dtype=torch.float64)
    kinds = {"lam", "A_c", "B_c"} | ({"A", "G", "B"} if low_rank == "all" else set())
    assert {name.partition(".")[0] for name in learned} == kinds and "A_c.conv.weight" in learned
    distance = WeightDistance(model, normalize).values(g)
    expected = []
    for k in range(3):
        total, size = torch.zeros(()).double(), 0.0
        for name, weight in plain.named_parameters():
            value, copies = weight.detach(), [c.get_parameter(name).detach() for c in finetuned]
            for j, other in enumerate(copies):
                value = value + learned[f"lam.{name}"][j] * (other - weight.detach())
            if f"A_c.{name}" in learned:
                value = value + (learned[f"A_c.{name}"] @ learned[f"B_c.{name}"].T).view(weight.shape)
            if f"A.{name}" in learned:
                value = value + learned[f"A.{name}"] @ (learned[f"G.{name}"] @ g) @ learned[f"B.{name}"].T
            total = total + (value - copies[k]).square().sum()
            size += float((copies[k] - weight.detach()).square().sum())
        expected.append(total / size if normalize else total)
    torch.testing.assert_close(distance, torch.stack(expected))
    for k in range(3):
        ours = torch.autograd.grad(distance[k], list(learned.values()), retain_graph=True)
        theirs = torch.autograd.grad(expected[k], list(learned.values()), retain_graph=True)
        for name, a, b in zip(learned, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")
