"""What the layers of a Pareto model share: what it is, and how it is computed now."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import Computation, ParetoState, pareto_state, set_preference
from pareto_merging.model.strategy import set_strategy

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_what_a_model_is_and_how_it_is_computed_are_two_objects(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    state = pareto_state(model)
    before = copy.deepcopy((state.task_names, state.settings, state.digests, state.core))
    set_preference(model, [0.3, 0.7])
    set_strategy(model, "cached")
    assert (state.task_names, state.settings, state.digests, state.core) == before
    assert state.now.gamma.tolist() == pytest.approx([0.3, 0.7])
    assert (state.now.strategy, state.now.kernel_strategy) == ("cached", "auto")


def test_a_copy_has_no_scratch_and_no_graph() -> None:
    gamma = torch.tensor([0.5, 0.5], requires_grad=True)
    state = ParetoState(("a", "b"), Computation(gamma * 1.0, vectors={1: gamma}, factors={1: gamma}))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert (other.now.vectors, other.now.factors) == (None, None)
        assert not other.now.gamma.requires_grad
        assert torch.equal(other.now.gamma, gamma)


def test_a_setting_of_the_computation_is_no_attribute_of_the_state() -> None:
    state = ParetoState(("a",), Computation(torch.ones(1)))
    with pytest.raises(AttributeError):
        state.gamma = torch.ones(1)  # type: ignore[attr-defined]
