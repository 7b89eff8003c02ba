"""A merged parameter and its parts."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from support.networks import (
    GAMMAS,
    Tied,
    build,
)
from torch import nn

import pmkernels
from pareto_merging.model.attention import ParetoAttention
from pareto_merging.model.cores import preference_core
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.learned import lambda_names, learned_parameters
from pareto_merging.model.linear import ParetoLinear
from pareto_merging.model.parameters import merged_parameters, part_name
from pareto_merging.model.parametrize import parametrize
from pmkernels import reference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_every_part_is_registered_under_its_name(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    for _, module in pareto_modules(model):
        assert isinstance(module, ParetoModule)
        for name in module.pareto_names:
            parts = module.pareto_parameter(name).parts()
            assert parts["task_vectors"] is not None
            merged = pmkernels.reference.merge_weight(
                module._parameters[name], gamma=None if parts["A"] is None else module.pareto.now.gamma, **parts
            )
            torch.testing.assert_close(module.pareto_merged(name), merged)
    assert part_name("weight", "lam") == "lam"
    assert isinstance(model.transformer.resblocks[0].attn, ParetoAttention)
    assert isinstance(model.transformer.resblocks[0].mlp.c_fc, ParetoLinear)


def test_weights_and_task_vectors_are_held_once(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)
    size = sum(p.numel() for p in tiny_vit.parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    frozen = sum(storages.values()) // 4 - sum(p.numel() for p in learned_parameters(model).values())
    assert frozen == (1 + 3) * size


def test_tied_weights_stay_tied(copies: Copies) -> None:
    pretrained, x, _ = build("tied")
    model = randomize(parametrize(pretrained, copies(pretrained, 3), low_rank="none"))
    assert lambda_names(model) == ["embed.weight", "inner.weight", "inner.bias"]
    for changed in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert changed.embed._parameters["weight"] is changed.out._parameters["weight"]
        assert changed.embed.task_vectors is changed.out.task_vectors
        assert changed.embed.lam is changed.out.lam
        torch.testing.assert_close(changed(x), model(x))
    plain = merge(model, GAMMAS[0])
    assert plain.embed.weight is plain.out.weight
    folded = fold(model)
    assert folded.embed.weight is folded.out.weight


def test_merged_parameters_of_a_model(tiny_vit: nn.Module, copies: Copies) -> None:
    """Each tensor once, under its path, with what is stored; as used, λ is clamped and the core is there."""
    model = parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)
    randomize(model)
    listed = {parameter.path: parameter for parameter in merged_parameters(model)}
    assert len({id(parameter.weight) for parameter in listed.values()}) == len(listed)
    for path, parameter in listed.items():
        owner, _, attribute = path.rpartition(".")
        assert parameter.module is model.get_submodule(owner)
        assert parameter.name == attribute
        assert parameter.weight is parameter.module._parameters[attribute]
        for part, value in parameter.parts().items():
            assert value is parameter.module._parameters.get(part_name(attribute, part))
    with_low_rank = [parameter for parameter in listed.values() if parameter.A is not None]
    assert len(with_low_rank) == 4
    gamma = torch.tensor([0.2, 0.3, 0.5])
    for parameter in listed.values():
        used = parameter.used_parts(gamma)
        assert used["lam"] is parameter.lam
        expected = reference.merge_weight(parameter.weight, gamma=None if used["A"] is None else gamma, **used)
        torch.testing.assert_close(parameter.module.pareto_merged(parameter.name, gamma), expected)
    model.pareto.now.lambda_range = (0.0, 0.1)
    assert all(float(parameter.used_parts()["lam"].detach().max()) < 0.101 for parameter in listed.values())


def test_a_tied_parameter_comes_once(copies: Copies) -> None:
    net = Tied()
    model = parametrize(net, copies(net, 2), low_rank="none")
    assert [parameter.path for parameter in merged_parameters(model)] == ["embed.weight", "inner.weight", "inner.bias"]


@pytest.mark.parametrize("core", ["outer-product", "outer-vector"])
def test_a_structure_without_a_core_has_one_as_it_is_used(core: str, tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), core=core)
    gamma = torch.tensor([0.4, 0.6])
    terms = [parameter.low_rank(gamma) for parameter in merged_parameters(model) if parameter.A is not None]
    assert terms and all(torch.equal(term.G, preference_core(core, gamma)) for term in terms)
    assert all(parameter.G is None for parameter in merged_parameters(model))
