"""Merging tensor by tensor: weight averaging, task arithmetic (with a preference), individual and pretrained models."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, conv_net, parameter_task_vectors, state_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pareto_merging.methods import (
    dare,
    individual,
    pretrained,
    task_arithmetic,
    task_arithmetic_preference,
    ties,
    weight_averaging,
)
from pareto_merging.methods.interface import Merged
from pareto_merging.model import pieces

GAMMA = [0.2, 0.5, 0.3]
WEIGHT_ONLY: dict[str, Callable[..., Merged]] = {
    "averaging": weight_averaging.merge,
    "task arithmetic": task_arithmetic.merge,
    "ties": ties.merge,
    "ties mean": lambda net, copies: ties.merge(net, copies, combine="mean", coefficient=1.0),
    "dare": dare.merge,
    "task arithmetic + preference": task_arithmetic_preference.merge,
    "individual": individual.merge,
    "pretrained": pretrained.merge,
}


def copies_of(net: nn.Module, count: int = 3) -> list[nn.Module]:
    return [noisy_copy(net, k + 1, 0.1) for k in range(count)]


def test_weight_averaging(tiny_vit: nn.Module) -> None:
    for net in (tiny_vit, conv_net()):
        finetuned = copies_of(net)
        states = [state_of(other) for other in finetuned]
        result = weight_averaging.merge(net, finetuned)
        expected = {
            name: sum(state[name].double() for state in states) / 3
            for name, value in net.state_dict().items()
            if value.is_floating_point()
        }
        assert_state(result.model(), expected)
        assert not result.preference_aware
        assert result.task_names == ("task_1", "task_2", "task_3")
        assert result.model() is result.model(GAMMA)


@pytest.mark.parametrize("coefficient", [0.3, 0.0, -0.4])
def test_task_arithmetic(coefficient: float, tiny_vit: nn.Module) -> None:
    finetuned = copies_of(tiny_vit)
    model = task_arithmetic.merge(tiny_vit, finetuned, coefficient=coefficient).model()
    taus = parameter_task_vectors(tiny_vit, finetuned)
    assert_state(model, {n: p + coefficient * sum(taus[n]) for n, p in tiny_vit.named_parameters()})
    assert type(model) is type(tiny_vit)


def test_task_arithmetic_with_a_preference(tiny_vit: nn.Module) -> None:
    for net in (tiny_vit, conv_net()):
        finetuned = {f"t{k}": other for k, other in enumerate(copies_of(net))}
        result = task_arithmetic_preference.merge(net, finetuned)
        assert result.preference_aware
        for name, other in finetuned.items():
            expected = {n: v for n, v in state_of(other).items() if v.is_floating_point()}
            assert_state(result.model({name: 1}), expected)
        average = state_of(weight_averaging.merge(net, finetuned).model())
        assert_state(result.model(), average)
        taus = parameter_task_vectors(net, list(finetuned.values()))
        half = task_arithmetic_preference.merge(net, finetuned, coefficient=1.5).model(GAMMA)
        expected = {
            n: p + 1.5 * sum(g * tau for g, tau in zip(GAMMA, taus[n], strict=True)) for n, p in net.named_parameters()
        }
        assert_state(half, expected)
        # at λ = K·c the equal preference is task arithmetic with c
        arithmetic = state_of(task_arithmetic.merge(net, finetuned, coefficient=0.4).model())
        assert_state(task_arithmetic_preference.merge(net, finetuned, coefficient=1.2).model(), arithmetic)
        with pytest.raises(ValueError, match="preference: expected a sum of 1"):
            result.model([0.5, 0.2, 0.2])
        with pytest.raises(ValueError, match=r"expected shape \[3\]"):
            result.model([[0.2, 0.5, 0.3]])


def test_individual_is_each_fine_tuned_model_bit_by_bit() -> None:
    net = conv_net()
    finetuned = {f"t{k}": other for k, other in enumerate(copies_of(net))}
    for k, other in enumerate(finetuned.values()):
        # what no difference to the pretrained model gives back in float32
        with torch.no_grad():
            other[0].weight.mul_(1e-6)
            other[1].num_batches_tracked.fill_(10 + k)
    result = individual.merge(net, finetuned)
    wanted = {"t0": [1.0, 0.0, 0.0], "t1": [0.3, 0.4, 0.3], "t2": [0.25, 0.25, 0.5]}
    for name, gamma in wanted.items():
        model = result.model(gamma)
        assert type(model) is type(net)
        for key, value in finetuned[name].state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        shared = {t.data_ptr() for t in finetuned[name].state_dict().values()}
        assert not shared & {t.data_ptr() for t in model.state_dict().values()}
    # the first of several
    first = individual.merge(net, finetuned).model([0.4, 0.4, 0.2])
    assert torch.equal(first[0].weight, finetuned["t0"][0].weight)
    with torch.no_grad():
        finetuned["t1"][5].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"finetuned: expected finite numbers in 5.bias of t1, got NaN or inf"):
        result.model({"t1": 1})


def test_pretrained_is_a_copy(tiny_vit: nn.Module) -> None:
    model = pretrained.merge(tiny_vit, copies_of(tiny_vit)).model(GAMMA)
    for name, value in tiny_vit.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert model.state_dict()[name].data_ptr() != value.data_ptr()


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    finetuned = [noisy_copy(net, 1), noisy_copy(net, 2)]
    once = [{k: v for k, v in other.state_dict().items() if k != "2.weight"} for other in finetuned]
    for name, merge in WEIGHT_ONLY.items():
        for given in (finetuned, once):
            model = merge(net, given).model()
            assert model[2].weight is model[0].weight, name
    average = weight_averaging.merge(net, once).model()
    torch.testing.assert_close(average[0].weight, (finetuned[0][0].weight + finetuned[1][0].weight) / 2)
    torch.testing.assert_close(average[1].running_var, (finetuned[0][1].running_var + finetuned[1][1].running_var) / 2)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_variances_stay_positive(name: str) -> None:
    """Fine-tuned variances far below the pretrained: with coefficients whose sum is over 1 they would go below 0."""
    net = conv_net()
    finetuned = copies_of(net)
    for other in finetuned:
        other[1].running_var.mul_(0.01)
    model = WEIGHT_ONLY[name](net, finetuned).model()
    assert bool((model[1].running_var > 0).all())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(model(x)).all())


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("size", [1, 50])
def test_pieces_change_nothing(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net()
    finetuned = copies_of(net)
    expected = state_of(WEIGHT_ONLY[name](net, finetuned).model())
    monkeypatch.setattr(pieces, "CHUNK", size)
    for key, value in state_of(WEIGHT_ONLY[name](net, finetuned).model()).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_types(name: str, dtype: torch.dtype) -> None:
    """Merged in float32 and rounded once: as near as the rounding of the exact result."""
    net = conv_net().to(dtype)
    finetuned = copies_of(net)
    model = WEIGHT_ONLY[name](net, finetuned).model()
    assert [t.dtype for t in model.state_dict().values()] == [t.dtype for t in net.state_dict().values()]
    wide = WEIGHT_ONLY[name](copy.deepcopy(net).double(), [copy.deepcopy(m).double() for m in finetuned]).model()
    for key, value in wide.state_dict().items():
        found = model.state_dict()[key]
        if value.is_floating_point():
            rtol = torch.finfo(dtype).eps
            torch.testing.assert_close(
                found.double(), value, rtol=max(rtol, 1e-9), atol=1e-6, msg=lambda t, k=key: k + t
            )


def test_transposed_parameters_are_merged_too() -> None:
    net = nn.Linear(3, 4)
    net.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t())
    finetuned = copies_of(net)
    model = weight_averaging.merge(net, finetuned).model()
    torch.testing.assert_close(model.weight, sum(other.weight for other in finetuned) / 3)


@pytest.mark.parametrize("name", [name for name in WEIGHT_ONLY if name != "pretrained"])
def test_errors(name: str) -> None:
    merge, net = WEIGHT_ONLY[name], conv_net()
    good = copies_of(net, 2)
    with pytest.raises(ValueError, match=r"t1 lacks 5\.bias"):
        merge(net, {"t1": {k: v for k, v in net.state_dict().items() if k != "5.bias"}})
    with pytest.raises(ValueError, match=r"task_2 has 5.bias of shape \[9\], expected \[8\]"):
        merge(net, [good[0], {**good[1].state_dict(), "5.bias": torch.zeros(9)}])
    with pytest.raises(ValueError, match="at least one fine-tuned copy"):
        merge(net, [])
    with pytest.raises(TypeError, match="got a single one"):
        merge(net, good[0])
    for key in ("5.bias", "1.running_mean"):
        state = state_of(good[1])
        state[key][1] = torch.inf
        with pytest.raises(ValueError, match=r"finetuned: expected finite numbers in .*task_2"):
            merge(net, [good[0], state]).model([0.0, 1.0])


def test_a_result_that_overflows_is_an_error() -> None:
    net = nn.Linear(2, 2).half()
    finetuned = [noisy_copy(net, k + 1, 1e4) for k in range(3)]
    with pytest.raises(ValueError, match="expected finite numbers in the merged weight, got NaN or inf"):
        task_arithmetic.merge(net, finetuned, coefficient=100.0)


class LiveStorage(TorchDispatchMode):
    """The bytes of all storages made under it that are still alive, at most and now."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_memory_beside_the_models_is_less_than_the_largest_tensor(name: str, dtype: torch.dtype) -> None:
    """Eight copies; the largest tensor as large as in ViT-B/32's feed-forward layers."""
    net = nn.Sequential(nn.Linear(1536, 1536), nn.Linear(1536, 300)).to(dtype)
    # the copies share what they differ in, so that the test is small; nothing looks at that
    finetuned = [noisy_copy(net, k + 1) for k in range(2)] * 4
    largest = 1536 * 1536 * dtype.itemsize
    gc.collect()
    with LiveStorage() as mode:
        result = WEIGHT_ONLY[name](net, finetuned).model()
    size = sum(t.untyped_storage().nbytes() for t in result.state_dict().values())
    assert mode.peak - size < largest, f"{(mode.peak - size) / largest:.2f} of the largest tensor"
    assert mode.now >= size, "the result itself is counted"
