"""The table of strategies: a user's own is added by ``register`` alone, computes, and can be what ``auto`` takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import check_linear, exactly, gradients, linear_arguments
from torch import Tensor, nn

import pareto_merging
import pmkernels
from pmkernels import costs, dispatch, products, reference, strategies
from pmkernels.configs import Configs
from pmkernels.strategies import Case, Strategy

CPU = torch.device("cpu")
# what a dummy has computed, by operation
Calls = list[str]


def noted(calls: Calls, operation: str, function: Any) -> Any:
    def compute(*arguments: Any, **options: Any) -> Any:
        calls.append(operation)
        return function(*arguments, **options)

    return compute


def few_rows(operation: str, problem: costs.Problem, file: str, rates: costs.Rates) -> list[costs.Pass] | None:
    """Cheaper than anything up to eight rows, dearer than anything above."""
    return [costs.Pass("dummy", launches=0 if problem.rows <= 8 else 10**6)]


def no_float64(case: Case) -> Exception | None:
    if torch.float64 in case.dtypes.values():
        return TypeError("x: expected anything but float64 for strategy 'dummy', got torch.float64")
    return None


@pytest.fixture
def dummy() -> Iterator[Calls]:
    """A strategy of a user's own: what it has computed."""
    calls: Calls = []
    strategies.register(
        Strategy(
            "dummy",
            supports=no_float64,
            forward=noted(calls, "forward", products.forward),
            dx=noted(calls, "dx", products.dx),
            weight_grad=noted(calls, "weight_grad", products.weight_gradients),
            merge=noted(calls, "merge", products.merge),
            cost=few_rows,
        )
    )
    yield calls
    strategies.unregister("dummy")


@pytest.mark.parametrize("gamma_lead", [(), (3, 1), (3, 5)], ids=["shared", "per item", "per row"])
def test_a_strategy_of_ones_own_computes_forward_and_backward(gamma_lead: tuple[int, ...], dummy: Calls) -> None:
    values = linear_arguments((3, 5), 20, 18, gamma_lead=gamma_lead)
    check_linear(values, strategy="dummy")
    assert set(dummy) == {"forward", "dx", "weight_grad"}
    dummy.clear()
    # with λ frozen the low-rank gradients go row by row, and with a W(γ) that is there nothing is put together
    check_linear({**values, "lam": values["lam"].detach()}, strategy="dummy")
    assert set(dummy) == {"forward", "dx"}


def test_it_merges_and_reduces(dummy: Calls) -> None:
    values = {name: v for name, v in linear_arguments((2,), 20, 18).items() if name not in ("x", "bias")}
    exact, upstream = exactly(values), torch.randn(20, 18)
    merged, truth = pmkernels.merge_weight(**values, strategy="dummy"), reference.merge_weight(**exact)
    assert dummy == ["merge"]
    torch.testing.assert_close(merged.double(), truth, atol=1e-5, rtol=1e-5)
    found, wanted = gradients(merged, upstream, values), gradients(truth, upstream.double(), exact)
    assert found.keys() == {"lam", "A", "G", "B", "gamma"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_auto_takes_it_where_it_is_cheapest_and_supports_the_case(dummy: Calls) -> None:
    for rows, taken in ((3, True), (9, False)):
        for dtype in (torch.float32, torch.float64):
            dummy.clear()
            check_linear(linear_arguments((rows,), 20, 18, dtype=dtype), strategy="auto")
            assert bool(dummy) == (taken and dtype != torch.float64), (rows, dtype)
    x = torch.zeros(1, dtype=torch.bfloat16)
    layer = {"n": 3072, "d": 1024, "rank": 16, "tasks": 8}
    with dispatch.using(Configs(runs=True)):
        assert strategies.choose("forward", "auto", x, rows=8, **layer) == "dummy"
        assert strategies.choose("forward", "auto", x, rows=8224, **layer) == "streamed"


def test_what_has_one_kernel_is_computed_as_auto_does(dummy: Calls) -> None:
    logits = torch.randn(3, 5)
    assert torch.equal(pmkernels.softmax_entropy(logits, strategy="dummy"), pmkernels.softmax_entropy(logits))
    with pytest.raises(TypeError, match="expected anything but float64 for strategy 'dummy'"):
        pmkernels.merge_weight(torch.zeros(2, 3, dtype=torch.float64), strategy="dummy")
    assert not dummy


def test_a_model_accepts_it(dummy: Calls) -> None:
    pretrained = nn.Linear(18, 20)
    layer = pareto_merging.ParetoLinear.from_linears(pretrained, [nn.Linear(18, 20) for _ in range(3)], rank=2)
    x = torch.randn(4, 18)
    with torch.no_grad():
        expected: Tensor = layer(x)
        pareto_merging.set_strategy(layer, "dummy")
        dummy.clear()
        torch.testing.assert_close(layer(x), expected)
    assert dummy[-1] == "forward"


def test_names_are_those_of_the_table(dummy: Calls) -> None:
    assert pmkernels.STRATEGIES == ("auto", "fused", "streamed", "eager")
    assert strategies.names() == (*pmkernels.STRATEGIES, "dummy")
    with pytest.raises(ValueError, match="expected a name other than auto, fused, streamed, eager, dummy, got 'dummy'"):
        strategies.register(strategies.TABLE["dummy"])
    with pytest.raises(ValueError, match="expected one of auto, fused, streamed, eager, dummy, got 'fast'"):
        pmkernels.softmax_entropy(torch.zeros(2, 3), strategy="fast")


def test_it_is_gone_when_it_is_taken_out() -> None:
    assert strategies.names() == pmkernels.STRATEGIES
    with pytest.raises(ValueError, match="strategy: expected one of auto, fused, streamed, eager, got 'dummy'"):
        pmkernels.pareto_linear(torch.zeros(2, 3), torch.zeros(4, 3), strategy="dummy")
