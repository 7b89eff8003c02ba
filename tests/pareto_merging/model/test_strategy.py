"""The strategy and memory budget of a running model."""

from typing import Any

import pytest
from support.networks import linears, pareto
from torch import nn

from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.state import pareto_state
from pareto_merging.model.strategy import merged_bytes, set_strategy, strategy_names


def test_every_strategy_by_name() -> None:
    assert set(strategy_names()) == {"auto", "cached", "eager", "fused", "streamed"}
    model = linears()
    for strategy in strategy_names():
        set_strategy(model, strategy)
        assert (pareto_state(model).now.cache is not None) == (strategy == "cached")
        assert pareto_state(model).now.kernel_strategy != "cached"


@pytest.mark.parametrize(
    ("strategy", "budget", "error", "message"),
    [
        ("quick", None, ValueError, "strategy: expected one of auto, .*cached, got 'quick'"),
        (None, None, ValueError, "strategy: expected one of"),
        ("cached", "1 GiB", TypeError, "memory_budget: expected a number of bytes or None, got '1 GiB'"),
        ("auto", 1.5, TypeError, "memory_budget: expected a number of bytes or None, got 1.5"),
        ("auto", True, TypeError, "memory_budget: expected a number of bytes or None, got True"),
        ("auto", -1, ValueError, "memory_budget: expected at least 0 bytes, got -1"),
        ("cached", 10, ValueError, "memory_budget: expected at least .* bytes .*, got 10"),
        ("auto", 2**70, ValueError, "memory_budget: expected at most the .* GiB of cpu, got"),
        ("fused", 10**6, ValueError, "memory_budget: expected None for strategy 'fused'"),
        ("eager", 0, ValueError, "memory_budget: expected None for strategy 'eager'"),
    ],
)
def test_a_wrong_setting_changes_nothing(strategy: Any, budget: Any, error: type[Exception], message: str) -> None:
    model = linears()
    set_strategy(model, "cached", memory_budget=merged_bytes(model))
    cache = pareto_state(model).now.cache
    with pytest.raises(error, match=message) as caught:
        set_strategy(model, strategy, memory_budget=budget)
    assert "\n" not in str(caught.value)
    state = pareto_state(model)
    assert (state.now.strategy, state.now.memory_budget) == ("cached", merged_bytes(model))
    assert state.now.cache is cache


def test_a_plain_model_has_no_strategy() -> None:
    with pytest.raises(ValueError, match="model: expected a Pareto model, got Linear"):
        set_strategy(nn.Linear(2, 2), "cached")


def test_tied_weights_count_once() -> None:
    model = pareto()
    tensors = {id(m._parameters[n]): m._parameters[n] for _, m in pareto_modules(model) for n in m.pareto_names}
    assert model.embed._parameters["weight"] is model.out._parameters["weight"]
    assert merged_bytes(model) == sum(t.numel() for t in tensors.values()) * 8
