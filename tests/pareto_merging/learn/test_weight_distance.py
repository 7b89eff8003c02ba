"""The closed forms against the merged weights themselves."""

import pytest
import torch
from helpers import randomize
from learn_cases import small_model

from pareto_merging.learn.weight_distance import WeightDistance
from pareto_merging.model.fold import fold
from pareto_merging.model.learned import learned_parameters

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
