"""Strategy ``cached``: kept merges are never out of date, are freed, and keep nothing else alive."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from support.networks import TASKS, Everything, linears, pareto
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pareto_merging as pm
from pareto_merging.model.cache import MergedWeights
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state, pareto_states
from pareto_merging.model.strategy import merged_bytes, set_strategy


@pytest.fixture
def x() -> Tensor:
    return torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(1))


def uncached(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    set_strategy(twin, "eager")
    return twin


def assert_right(model: nn.Module, x: Tensor, what: str) -> None:
    """Twice, so that the second call finds what the first one kept; forward and the gradient of λ, A, G and B."""
    twin = uncached(model)
    for call in range(2):
        torch.testing.assert_close(model(x), twin(x), msg=lambda text, n=call: f"{what}, call {n}: {text}")
    names = [name for name, p in learned_parameters(model).items() if p.requires_grad]
    if not names:
        return
    found, expected = (
        torch.autograd.grad(m(x).square().sum(), [learned_parameters(m)[name] for name in names], allow_unused=True)
        for m in (model, twin)
    )
    for name, one, two in zip(names, found, expected, strict=True):
        assert (one is None) == (two is None), f"{what}: d {name}"
        if one is not None:
            torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{what}: d {name}: {text}")


class PlainDescent(torch.optim.Optimizer):
    """Writes through ``.data``, as many published optimisers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-1e-4)


def _parts(model: nn.Module, part: str) -> list[Tensor]:
    return [
        value
        for _, m in pareto_modules(model)
        for n in m.pareto_names
        if (value := m.pareto_parameter(n).parts()[part]) is not None
    ]


def _add(part: str) -> Callable[[nn.Module, Tensor], None]:
    def change(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            for value in {id(v): v for v in _parts(model, part)}.values():
                value.add_(0.1)

    return change


def _frozen(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                module._parameters[name].mul_(1.1)


def _optimise(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module, Tensor], None]:
    def change(model: nn.Module, x: Tensor) -> None:
        optimizer = make(list(learned_parameters(model).values()))
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()

    return change


def _lbfgs(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.LBFGS(list(learned_parameters(model).values()), lr=1e-3, max_iter=3)
    values = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        torch.testing.assert_close(loss, uncached(model)(x).square().sum())
        values.append(loss)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(values) > 1


def _reload(assign: bool) -> Callable[[nn.Module, Tensor], None]:
    def change(model: nn.Module, x: Tensor) -> None:
        other = {name: value.detach().clone() * 1.1 for name, value in model.state_dict().items()}
        model.load_state_dict(other, assign=assign)

    return change


def _vector(model: nn.Module, x: Tensor) -> None:
    parameters = list(learned_parameters(model).values())
    vector = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(vector * 1.1, parameters)


def _gamma(values: list[float]) -> Callable[[nn.Module, Tensor], None]:
    return lambda model, x: pm.set_preference(model, values)


def _held_in_place(model: nn.Module, x: Tensor) -> None:
    gamma = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    pm.set_preference(model, gamma)
    model(x)
    with torch.no_grad():
        gamma.copy_(torch.tensor([0.7, 0.1, 0.2]))


def _state_gamma(model: nn.Module, x: Tensor) -> None:
    pareto_state(model).now.gamma.copy_(torch.tensor([0.7, 0.1, 0.2]))


def _foreach(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_mul_([p.detach() for p in learned_parameters(model).values()], 1.2)


def _read_and_write(model: nn.Module, x: Tensor) -> None:
    """What reads a merged tensor may write into it: what is kept must not be that."""
    with torch.no_grad():
        for _, module in pareto_modules(model):
            for name in module.pareto_names:
                if (value := getattr(module, name)) is not None:
                    value.mul_(3)


def _clamp(model: nn.Module, x: Tensor) -> None:
    pareto_state(model).now.lambda_range = (0.25, 0.3)


def _around(model: nn.Module, x: Tensor) -> None:
    with pm.preference(model, [1.0, 0.0, 0.0]):
        model(x)


def _autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


def _inference(model: nn.Module, x: Tensor) -> None:
    set_strategy(model, "cached")
    with torch.inference_mode():
        pm.set_preference(model, [0.1, 0.2, 0.7])
        model(x)


def _no_grad(model: nn.Module, x: Tensor) -> None:
    set_strategy(model, "cached")
    with torch.no_grad():
        model(x)


CHANGES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    **{part: _add(part) for part in ("lam", "A", "G", "B", "task_vectors")},
    "W0": _frozen,
    "set_lambda": lambda model, x: pm.set_lambda(model, 0.7),
    "SGD": _optimise(lambda p: torch.optim.SGD(p, lr=0.01)),
    "SGD foreach": _optimise(lambda p: torch.optim.SGD(p, lr=0.01, foreach=True)),
    "SGD fused": _optimise(lambda p: torch.optim.SGD(p, lr=0.01, fused=True)),
    "Adam": _optimise(lambda p: torch.optim.Adam(p, lr=0.01)),
    "Adam foreach": _optimise(lambda p: torch.optim.Adam(p, lr=0.01, foreach=True)),
    "Adam fused": _optimise(lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
    "AdamW fused": _optimise(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)),
    "own optimiser": _optimise(PlainDescent),
    "LBFGS": _lbfgs,
    "load_state_dict": _reload(False),
    "vector_to_parameters": _vector,
    "other preference": _gamma([0.1, 0.2, 0.7]),
    "equal values": _gamma([1 / 3, 1 / 3, 1 / 3]),
    "preference held by the caller": _held_in_place,
    "preference in place": _state_gamma,
    "foreach": _foreach,
    "written into": _read_and_write,
    "lambda_range": _clamp,
    "preference()": _around,
    "autocast between": _autocast,
    "inference mode first": _inference,
    "no_grad first": _no_grad,
    "float32": lambda model, x: model.float(),
    "half and back": lambda model, x: model.bfloat16().double(),
    "to the same": lambda model, x: model.to("cpu"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_kept_weights_follow_every_change(x: Tensor, name: str) -> None:
    model = pareto()
    set_strategy(model, "cached")
    assert_right(model, x, "before")
    CHANGES[name](model, x)
    assert_right(model, x, name)


def test_load_by_assignment_is_seen(x: Tensor) -> None:
    model = linears(torch.float64)
    set_strategy(model, "cached")
    y = torch.randn(3, 6, dtype=torch.float64)
    model(y)
    _reload(True)(model, y)
    torch.testing.assert_close(model(y), uncached(model)(y))


@pytest.mark.parametrize("core", ["outer-product", "outer-vector"])
def test_structures_without_a_core(x: Tensor, core: str) -> None:
    model = pareto(core=core)
    set_strategy(model, "cached")
    for gamma in ([0.2, 0.3, 0.5], [0.6, 0.3, 0.1]):
        pm.set_preference(model, gamma)
        assert_right(model, x, core)


@pytest.mark.parametrize("granularity", ["module", "model"])
def test_lambda_shared_by_parameters(x: Tensor, granularity: str) -> None:
    model = pareto(granularity=granularity)
    set_strategy(model, "cached")
    assert_right(model, x, "before")
    pm.set_lambda(model, 0.5)
    assert_right(model, x, granularity)


def test_preferences_per_item_and_shared_take_turns() -> None:
    model = linears(torch.float64)
    set_strategy(model, "cached")
    y = torch.randn(3, 6, dtype=torch.float64)
    rows = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])
    for gamma in (rows, rows[0], rows.flip(0), rows[2], rows):
        pm.set_preference(model, gamma)
        assert_right(model, y, str(gamma))


def test_gradient_reaches_the_preference(x: Tensor) -> None:
    model = pareto()
    twin = uncached(model)
    set_strategy(model, "cached")
    for values in ([0.2, 0.3, 0.5], [0.6, 0.3, 0.1]):
        gradients = []
        for m in (model, twin):
            gamma = torch.tensor(values, requires_grad=True)
            pm.set_preference(m, gamma)
            m(x)
            gradients.append(torch.autograd.grad(m(x).square().sum(), gamma)[0])
        assert gradients[1].abs().max() > 0
        torch.testing.assert_close(*gradients)


def test_a_backward_after_another_preference_is_of_its_own_forward(x: Tensor) -> None:
    model = pareto()
    set_strategy(model, "cached")
    parameters = list(learned_parameters(model).values())
    pm.set_preference(model, [0.2, 0.3, 0.5])
    expected = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
    first = model(x).square().sum()
    pm.set_preference(model, [0.9, 0.1, 0.0])
    second = model(x).square().sum()
    found = torch.autograd.grad(first, parameters, allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(first, parameters, allow_unused=True)
    for one, two, three in zip(expected, found, again, strict=True):
        if one is not None:
            assert torch.equal(one, two) and torch.equal(one, three)
    torch.autograd.grad(second, parameters, allow_unused=True)


def test_a_backward_after_a_write_is_an_error(x: Tensor) -> None:
    model = pareto()
    set_strategy(model, "cached")
    loss = model(x).square().sum()
    pm.set_lambda(model, 0.9)
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpointing_inside(x: Tensor) -> None:
    class Inside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.checkpointing = inner, False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointing else self.inner(x)

    net = Everything().eval().double()
    finetuned = {f"t{k}": Inside(noisy_copy(net, k + 1, 0.2)) for k in range(TASKS)}
    model = randomize(pm.parametrize(Inside(net), finetuned, rank=2, low_rank="all"))
    parameters = list(learned_parameters(model).values())
    expected = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
    model.checkpointing = True
    set_strategy(model, "cached")
    for _ in range(2):
        found = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
        for one, two in zip(expected, found, strict=True):
            torch.testing.assert_close(one, two)


def test_autocast_on_and_off_alternating() -> None:
    model = linears()
    twin = uncached(model)
    set_strategy(model, "cached")
    y = torch.randn(3, 6)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 0):
            found, expected = model(y), twin(y)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), step
        if step == 1:
            pm.set_lambda(model, 0.6)
            pm.set_lambda(twin, 0.6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_their_own(x: Tensor, how: str) -> None:
    model = pareto()
    set_strategy(model, "cached", memory_budget=10**6)
    model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    kept, other = pareto_state(model).now.cache, pareto_state(twin).now.cache
    assert other is not None and other is not kept
    assert other.budget == 10**6
    # a GRU reads its weights when it is made, nothing else may be there
    assert other.bytes < merged_bytes(twin)
    pm.set_lambda(twin, 0.9)
    assert_right(twin, x, how)
    assert_right(model, x, "the original")
    assert not torch.equal(model(x), twin(x))


def test_folded_and_merged(x: Tensor) -> None:
    model = pareto()
    set_strategy(model, "cached")
    pm.set_preference(model, [0.2, 0.3, 0.5])
    expected = model(x)
    pm.set_preference(model, [0.9, 0.1, 0.0])
    model(x)
    torch.testing.assert_close(pm.merge(model, [0.2, 0.3, 0.5])(x), expected)
    folded = pm.fold(model)
    assert pareto_state(folded).now.strategy == "cached"
    for _ in range(2):
        pm.set_preference(folded, [0.2, 0.3, 0.5])
        torch.testing.assert_close(folded(x), expected)
        pm.set_preference(folded, [1.0, 0.0, 0.0])
        torch.testing.assert_close(folded(x), uncached(folded)(x))


def test_two_models_that_share_a_module() -> None:
    first = linears(torch.float64)
    box = nn.ModuleList([first, nn.Sequential(first[0], first[3])])
    assert len(pareto_states(box)) == 1
    set_strategy(box, "cached")
    y = torch.randn(3, 6, dtype=torch.float64)
    for value in (0.1, 0.8):
        pm.set_lambda(first, value)
        twin = uncached(box)
        for module, other in zip(box, twin, strict=True):
            torch.testing.assert_close(module(y), other(y))
    assert pareto_state(box).now.cache.bytes == merged_bytes(box)


def test_threads_get_the_right_result(x: Tensor) -> None:
    model = pareto()
    expected = model(x)
    set_strategy(model, "cached")
    wrong: list[str] = []

    def work() -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    if not torch.allclose(model(x), expected):
                        wrong.append("other numbers")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled() -> None:
    model = linears()
    set_strategy(model, "cached")
    y = torch.randn(3, 6)
    model(y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for value in (0.3, 0.6):
        pm.set_lambda(model, value)
        torch.testing.assert_close(compiled(y), uncached(model)(y))
        torch.testing.assert_close(model(y), uncached(model)(y))
    pm.set_preference(model, [0.8, 0.1, 0.1])
    torch.testing.assert_close(compiled(y), uncached(model)(y))


def test_functional_call_uses_what_it_is_given() -> None:
    model = linears(torch.float64)
    set_strategy(model, "cached")
    y = torch.randn(3, 6, dtype=torch.float64)
    before = model(y)
    for name in ("0.lam", "0.weight", "0.A", "2.bias_lam"):
        given = {name: model.get_parameter(name).detach() * 1.5 if name != "0.weight" else torch.ones(8, 6).double()}
        found = torch.func.functional_call(model, given, (y,))
        torch.testing.assert_close(found, torch.func.functional_call(uncached(model), given, (y,)))
        assert not torch.allclose(found, before), name
        torch.testing.assert_close(model(y), before)


def test_max_norm_renormalises_the_merged_embedding() -> None:
    net = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5))
    model = randomize(pm.parametrize(net, {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}))
    index = torch.tensor([0, 2, 5])
    set_strategy(model, "cached")
    merged = pm.merge(model, [1 / 3, 1 / 3, 1 / 3])[0].weight.detach()
    expected = merged[index] * (0.5 / merged[index].norm(dim=-1, keepdim=True)).clamp(max=1)
    for _ in range(3):
        torch.testing.assert_close(model(index), expected)
        # not renormalised by the calls before
        torch.testing.assert_close(model[0].weight, merged)


def test_rows_of_an_in_projection_come_out_of_one_merge() -> None:
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    finetuned = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}
    model = randomize(pm.parametrize(net, finetuned, rank=2, low_rank="all")).double()
    set_strategy(model, "cached")
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    twin = uncached(model)
    for inputs in ((q, q, q), (q, k, k), (q, k, v), (q, k, q)):
        torch.testing.assert_close(model(*inputs)[0], twin(*inputs)[0])
    assert pareto_state(model).now.cache.bytes == merged_bytes(model)


# memory


def test_one_more_model_and_no_more(x: Tensor) -> None:
    model = pareto()
    set_strategy(model, "cached")
    cache = pareto_state(model).now.cache
    for gamma in ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]):
        pm.set_preference(model, gamma)
        pm.set_lambda(model, gamma[0])
        model(x)
        assert cache.bytes == merged_bytes(model)
        assert sum(k.value.numel() * k.value.element_size() for k in cache._kept.values()) == cache.bytes


@pytest.mark.parametrize("change", ["strategy", "dtype", "device", "anew"])
def test_kept_weights_are_freed(x: Tensor, change: str) -> None:
    model = pareto()
    set_strategy(model, "cached")
    model(x)
    kept = [weakref.ref(entry.value) for entry in pareto_state(model).now.cache._kept.values()]
    assert kept
    {
        "strategy": lambda: set_strategy(model, "auto"),
        "dtype": lambda: model.float(),
        "device": lambda: model.to("cpu"),
        "anew": lambda: set_strategy(model, "cached"),
    }[change]()
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    if (cache := pareto_state(model).now.cache) is not None:
        assert cache.bytes == 0


def test_weights_that_were_replaced_are_not_kept_alive() -> None:
    """load_state_dict(assign=True), as for a lazily loaded checkpoint: the old W0 and task vectors must go."""
    model = linears()
    set_strategy(model, "cached")
    y = torch.randn(3, 6)
    model(y)
    old = [weakref.ref(model[0]._parameters[name]) for name in ("weight", "task_vectors")]
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model(y)
    gc.collect()
    cache = pareto_state(model).now.cache
    assert cache.bytes == merged_bytes(model)
    assert [reference() for reference in old] == [None, None]


def test_functional_calls_do_not_pile_up() -> None:
    model = linears()
    set_strategy(model, "cached")
    y = torch.randn(3, 6)
    for _ in range(5):
        torch.func.functional_call(model, {"0.weight": torch.randn(8, 6)}, (y,))
    model(y)
    assert pareto_state(model).now.cache.bytes <= 2 * merged_bytes(model)


def test_what_does_not_fit_is_merged_every_time(x: Tensor) -> None:
    model = pareto()
    expected = model(x)
    cache = pareto_state(model).now.cache = MergedWeights(budget=merged_bytes(model) // 2)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
        assert 0 < cache.bytes <= cache.budget
    pm.set_lambda(model, 0.6)
    torch.testing.assert_close(model(x), uncached(model)(x))
    assert cache.bytes <= cache.budget


def test_in_place_writes_into_the_same_memory_and_no_backward_is_wrong(x: Tensor) -> None:
    model = pareto()
    cache = pareto_state(model).now.cache = MergedWeights(in_place=True)
    loss = model(x).square().sum()
    places = [entry.value.data_ptr() for entry in cache._kept.values()]
    pareto_state(model).now.gamma = torch.tensor([0.7, 0.2, 0.1])
    torch.testing.assert_close(model(x), uncached(model)(x))
    assert [entry.value.data_ptr() for entry in cache._kept.values()] == places
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    pareto_state(model).now.gamma.copy_(torch.tensor([0.1, 0.2, 0.7]))
    cache.refresh()
    entries = [entry.value.clone() for entry in cache._kept.values()]
    torch.testing.assert_close(model(x), uncached(model)(x))
    for before, entry in zip(entries, cache._kept.values(), strict=True):
        assert torch.equal(before, entry.value)


# arguments


# the YAML keys and the command line
