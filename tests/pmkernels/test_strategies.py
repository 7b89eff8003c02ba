"""Which strategy is taken, and the table: a user's own is added by ``register`` alone, and ``auto`` takes it too."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import check_linear, exactly, gradients, linear_arguments
from torch import Tensor, nn

import pareto_merging
import pmkernels
from pmkernels import configs, costs, dispatch, launch, products, reference, strategies
from pmkernels.configs import Configs
from pmkernels.strategies import Case, Strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = {"n": 3072, "d": 1024, "rank": 16, "tasks": 8}
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
    x = torch.zeros(1, dtype=torch.bfloat16)
    with dispatch.using(Configs(runs=True)):
        for rows, taken in ((3, True), (9, False)):
            for dtype in (torch.float32, torch.float64):
                dummy.clear()
                check_linear(linear_arguments((rows,), 20, 18, dtype=dtype), strategy="auto")
                assert bool(dummy) == (taken and dtype != torch.float64), (rows, dtype)
        assert strategies.choose("forward", "auto", x, rows=8, **LAYER) == "dummy"
        assert strategies.choose("forward", "auto", x, rows=8224, **LAYER) == "streamed"


def test_auto_asks_with_the_whole_case_and_takes_no_interpreted_kernel(
    dummy: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Case] = []

    def frozen_in_float32(case: Case) -> Exception | None:
        asked.append(case)
        return None if case.dtypes["weight"] == torch.float32 else TypeError("weight: expected float32")

    changed = dataclasses.replace(strategies.TABLE["dummy"], supports=frozen_in_float32)
    monkeypatch.setitem(strategies.TABLE, "dummy", changed)
    values = linear_arguments((9,), 20, 18)
    check_linear(values, strategy="auto")
    assert set(dummy) == {"forward", "dx", "weight_grad"}, "dear, but kernels are interpreted here"
    parts = {name: value for name, value in values.items() if name not in ("x", "bias")}
    pmkernels.merge_weight(**parts).sum().backward()
    assert {case.operation for case in asked} == {None, "forward", "dx", "weight_grad", "merge"}
    assert all({*parts} <= {*case.dtypes} and not case.asked for case in asked)
    assert all((case.tasks, case.rank) == (3, 2) for case in asked)


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
    taken = "expected a name other than auto, cached, fused, streamed, eager, dummy, got"
    for name in ("dummy", "cached", "auto", ""):
        with pytest.raises(ValueError, match=f"{taken} '{name}'"):
            strategies.register(dataclasses.replace(strategies.TABLE["dummy"], name=name))
    for name in ("eager", "unknown"):
        with pytest.raises(ValueError, match=f"expected one of those registered .dummy., got '{name}'"):
            strategies.unregister(name)
    with pytest.raises(ValueError, match="expected one of auto, fused, streamed, eager, dummy, got 'fast'"):
        pmkernels.softmax_entropy(torch.zeros(2, 3), strategy="fast")


def test_it_is_gone_when_it_is_taken_out() -> None:
    assert strategies.names() == pmkernels.STRATEGIES
    with pytest.raises(ValueError, match="strategy: expected one of auto, fused, streamed, eager, got 'dummy'"):
        pmkernels.pareto_linear(torch.zeros(2, 3), torch.zeros(4, 3), strategy="dummy")


def test_auto_is_eager_off_the_gpu_and_where_the_kernels_cannot() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert strategies.resolve("auto", {"x": x}, CPU) == "eager"
    with dispatch.using(Configs(runs=True)):
        assert strategies.resolve("auto", {"x": x}, CUDA) == "auto"
        # what the kernels cannot do is done all the same
        assert strategies.resolve("auto", {"x": x.double()}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "task_vectors": torch.zeros(33, 2, 2)}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "G": torch.zeros(2, 2, 33)}, CUDA) == "eager"
        assert strategies.resolve("auto", {"x": x, "A": torch.zeros(2, 65)}, CUDA) == "eager"
        both = {"A": torch.zeros(2, 33), "A_c": torch.zeros(2, 31)}
        assert strategies.resolve("auto", {"x": x, **both}, CUDA) == "auto"
        assert strategies.resolve("auto", {"x": x, **both, "A_c": torch.zeros(2, 32)}, CUDA) == "eager"


def test_auto_is_a_matter_of_rows() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    for operation in ("forward", "dx", "weight_grad"):
        assert strategies.choose(operation, "auto", x, rows=8, **LAYER) == "fused"
        assert strategies.choose(operation, "auto", x, rows=8224, **LAYER) == "streamed"
        assert strategies.choose(operation, "fused", x, rows=8224, **LAYER) == "fused"
        assert strategies.choose(operation, "streamed", x, rows=8, **LAYER) == "streamed"
        choices = [strategies.choose(operation, "auto", x, rows=2**i, **LAYER) for i in range(15)]
        assert choices == sorted(choices), "one crossing"
    # nothing to merge: the library's product and nothing else
    for rank, per_row in ((0, False), (16, True)):
        folded = {**LAYER, "tasks": 0, "rank": rank}
        assert strategies.choose("forward", "auto", x, rows=8, per_row=per_row, **folded) == "streamed"
    # but a constant term is merged, whatever γ is
    problem = costs.Problem(rows=8, **{**LAYER, "tasks": 0, "rank": 48}, per_row=True, constant=32)
    assert [one.name for one in costs.streamed("forward", problem)] == ["merge", "product"]
    assert [one.name for one in costs.streamed("forward", dataclasses.replace(problem, constant=0))] == ["product"]


def test_a_float16_weight_gradient_is_never_in_memory() -> None:
    """Gradients of a mean over a batch lie below what float16 can hold."""
    x = torch.zeros(1, dtype=torch.float16)
    for strategy in ("auto", "streamed", "fused"):
        assert strategies.choose("weight_grad", strategy, x, rows=8224, **LAYER) == "fused"


def test_measured_choices_and_rates_come_before_counted_ones() -> None:
    line = {"op": "forward", "dtype": "16-bit", **LAYER}
    text = json.loads(configs.config_files()["default"]) | {
        "rates": {"memory": 1e12},
        "strategies": [{**line, "rows": 64, "best": "streamed"}, {**line, "rows": 4096, "best": "fused"}],
    }
    files = {"default": configs.config_files()["default"], "tuned": json.dumps(text)}
    x = torch.zeros(1, dtype=torch.bfloat16)
    with dispatch.using(Configs(files, file="tuned")):
        assert strategies.choose("forward", "auto", x, rows=100, **LAYER) == "streamed"
        assert strategies.choose("forward", "auto", x, rows=8224, **LAYER) == "fused"
        # another layer was not measured
        assert strategies.choose("forward", "auto", x, rows=8224, **{**LAYER, "n": 1024}) == "streamed"
        assert dispatch.rates("tuned", CPU).memory == 1e12
        assert dispatch.rates("tuned", CPU).measured
        assert not dispatch.rates("default", CPU).measured


def test_what_auto_stands_for_is_a_strategy_that_there_is(dummy: Calls) -> None:
    with pytest.raises(ValueError, match="auto: expected one of auto, fused, streamed, eager, dummy, got 'bogus'"):
        Configs(auto="bogus")
    given = Configs(auto="dummy")
    with dispatch.using(given):
        assert strategies.resolve("auto", {"x": torch.zeros(1)}, CPU) == "dummy"
        gone = strategies.TABLE.pop("dummy")
        with pytest.raises(ValueError, match="strategy: expected one of auto, fused, streamed, eager, got 'dummy'"):
            strategies.resolve("auto", {"x": torch.zeros(1)}, CPU)
        strategies.TABLE["dummy"] = gone


def test_a_wish_that_cannot_be_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"strategy: expected one of auto, fused, streamed, eager, got 'fast'"):
        strategies.resolve("fast", {"x": x}, CPU)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto' for tensors that are not on a CUDA GPU"):
        pmkernels.pareto_linear(torch.zeros(2, 3), torch.zeros(4, 3), strategy="fused")
    with pytest.raises(ValueError, match=r"strategy: expected 'eager' or 'auto' .*got device cpu"):
        pmkernels.merge_weight(torch.zeros(4, 3), strategy="streamed")
    with pytest.raises(ValueError, match="strategy: expected 'eager' or 'auto'"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        pmkernels.softmax_entropy(torch.zeros(4, 3), strategy="fused")
