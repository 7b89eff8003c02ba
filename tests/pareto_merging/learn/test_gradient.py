"""A step's gradient: against plain autograd on weights put together by the definition, and what a captured graph is."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import short_run, small_model, task_set
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pareto_merging as pm
from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.learn import gradient
from pareto_merging.learn.entropy import entropy_terms
from pareto_merging.learn.gradient import (
    Execution,
    GradientOfStep,
    TasksAtOnce,
    cosine_alignment,
    low_rank_square,
    pareto_gradient,
    tensor_norm,
)
from pareto_merging.learn.objectives import OBJECTIVES, Objective, ObjectiveKind, TaskTerms
from pareto_merging.learn.scalarize import scalarize
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.layer import pareto_modules
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import pareto_state, preference
from pareto_merging.model.strategy import set_strategy

Copies: TypeAlias = Callable[[nn.Module, int], dict[str, nn.Module]]

TASKS = 3
# float32 numbers, in which a model holds its preference
GAMMA = torch.tensor([0.25, 0.5, 0.25])
S = torch.tensor([1.2, 0.4, 0.9], dtype=torch.float64)
DOUBLE_GAMMA = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


class Blocks(nn.Module):
    """Convolution, batch norm, attention with q, k and v apart, GRU, layer norm, linear; and one layer never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.bn = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList(
            [
                nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
                nn.GRU(4, 5, batch_first=True),
                nn.ModuleDict({"norm": nn.LayerNorm(5), "fc": nn.Linear(5, 6), "unused": nn.Linear(4, 4)}),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.bn(self.stem(x)).flatten(2).mT
        kv = x.flatten(2).mT[:, :5]
        h, _ = self.blocks[0](q, kv, kv, need_weights=False)
        h, _ = self.blocks[1](q + h)
        last = self.blocks[2]
        return last["fc"](last["norm"](h)).mean(dim=1)


class Tower(nn.Module):
    """Convolution, attention, layer norm and linear, as an encoder has them: each image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).flatten(2).mT
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.fc(torch.tanh(self.norm(h))).mean(dim=1)


class WholeMatrix(nn.Module):
    """Its matrix is read as one tensor, which is that of one preference."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 4)
        self.proj = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x.flatten(1))) @ self.proj


class NoVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 7, bias=False), nn.Linear(7, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


class OnlyVectors(nn.Module):
    """Task vectors on a norm alone; the copies below leave everything else as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(192), nn.Linear(192, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.flatten(1)))


class TiedVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 6), nn.Linear(6, 6)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


def plain(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval().to(dtype)


def finetuned_copies(net: nn.Module) -> dict[str, nn.Module]:
    found = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(TASKS)}
    if isinstance(net, OnlyVectors):
        for module in found.values():
            module.out.load_state_dict(net.out.state_dict())
    return found


def pareto(kind: type[nn.Module] = Blocks, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    net = plain(kind, dtype)
    return randomize(pm.parametrize(net, finetuned_copies(net), **{"rank": 2, "low_rank": "all", **settings}))


def heads(dtype: torch.dtype = torch.float64, seed: int = 5) -> list[nn.Module]:
    """Of 4, 5 and 6 classes; a zero-shot head would answer in float32."""
    found: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    for k in range(TASKS):
        head = nn.Linear(6, 4 + k)
        for parameter in head.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
        found.append(head.to(dtype))
    return found


def images(dtype: torch.dtype = torch.float64, rows: int = 4, seed: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows + k, 3, 8, 8, generator=generator).to(dtype) for k in range(TASKS)]


def method(**changes: Any) -> MethodSettings:
    return MethodSettings.model_validate({"steps": 4, "batch_size": 4, "rank": 2, "seed": 3, **changes})


def step_of(
    model: nn.Module,
    own: Sequence[nn.Module] | None,
    learned: dict[str, nn.Parameter],
    settings: MethodSettings,
    *,
    on_warning: Callable[[str], None] | None = None,
    **execution: Any,
) -> GradientOfStep:
    """The gradient with these heads; the images are given at each call."""
    tasks = {f"t{k}": Task([], head) for k, head in enumerate(own or ())}  # type: ignore[arg-type]
    return GradientOfStep(model, tasks, learned, settings, Execution(**execution), on_warning=on_warning)


def merged_by_definition(model: nn.Module, gamma: Tensor) -> dict[str, Tensor]:
    """W0 + Σ λ_k τ_k + A·C·Bᵀ of every merged parameter in float64, differentiable."""
    found, state = {}, pareto_state(model)
    gamma = gamma.double()
    for prefix, module in pareto_modules(model):
        for name in module.pareto_names:
            parts = module.pareto_parameter(name).parts()
            lam, tau, A, G, B = (parts[p] if parts[p] is None else parts[p].double() for p in
                                 ("lam", "task_vectors", "A", "G", "B"))  # fmt: skip
            value = module._parameters[name].detach().double()
            if parts["A_c"] is not None:
                value = value + (parts["A_c"].double() @ parts["B_c"].double().mT).view(value.shape)
            if lam is not None:
                if state.now.lambda_range is not None:
                    lam = lam.clamp(*state.now.lambda_range)
                for k in range(TASKS):
                    value = value + lam[k] * tau[k]
            if A is not None:
                if state.core == "tensor":
                    value = value + A @ sum(gamma[k] * G[:, :, k] for k in range(TASKS)) @ B.mT
                elif state.core == "outer-product":
                    value = value + torch.outer(A @ gamma, B @ gamma)
                else:
                    value = value + torch.outer(A @ gamma, B[:, 0])
            found[f"{prefix}.{name}" if prefix else name] = value
    return found


def low_rank_norm(model: nn.Module, gamma: Tensor) -> Tensor:
    """‖A·C·Bᵀ‖_F over all layers, from the matrices themselves."""
    if not any(module.pareto_parameter(name).A is not None for _, module in pareto_modules(model) for name in
               module.pareto_names):  # fmt: skip
        return torch.zeros(()).double()
    with_it = merged_by_definition(model, gamma)
    none = merged_by_definition(model, torch.zeros(TASKS))
    return torch.stack([(with_it[name] - none[name]).square().sum() for name in with_it]).sum().sqrt()


def expected(
    model: nn.Module,
    net: nn.Module,
    batch: Sequence[Tensor],
    gamma: Tensor,
    settings: MethodSettings,
    learned: dict[str, nn.Parameter],
    seed: int = 5,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [P] in float64 by plain autograd over one graph of all tasks."""
    merged = merged_by_definition(model, gamma)
    # tied parameters under every name
    wide, values = copy.deepcopy(net).double(), []
    for head, x in zip(heads(seed=seed), batch, strict=True):
        logits = head(torch.func.functional_call(wide, merged, (x.double(),), tie_weights=False))
        p = torch.softmax(logits, dim=-1)
        value = -(p * p.log()).sum(dim=-1).mean()
        if settings.information_maximisation:
            mean = p.mean(dim=0)
            bonus = torch.log(torch.tensor(float(logits.shape[-1]), dtype=torch.float64)) + (mean * mean.log()).sum()
            value = value + settings.information_maximisation * bonus
        values.append(value)
    S, gamma = torch.stack(values), gamma.double()
    loss = scalarize(S, gamma, settings.scalarization, settings.mu)
    loss = loss - settings.cosine * cosine_alignment(S, gamma)
    if settings.tensor_norm:
        loss = loss + settings.tensor_norm * low_rank_norm(model, gamma)
    gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    return loss.detach(), torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1).double()
            for g, p in zip(gradients, learned.values(), strict=True)
        ]
    )


def by_name(flat: Tensor, learned: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    parts = flat.split([p.numel() for p in learned.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(learned.items(), parts, strict=True)}


def assert_gradient(found: Tensor, wanted: Tensor, learned: dict[str, nn.Parameter], **tolerance: float) -> None:
    assert wanted.abs().max() > 0
    one, two = by_name(found.double(), learned), by_name(wanted, learned)
    for name in learned:
        torch.testing.assert_close(one[name], two[name], msg=lambda text, n=name: f"d {n}: {text}", **tolerance)


CASES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "tensor": (Blocks, {}, {}),
    "module": (Blocks, {"granularity": "module"}, {}),
    "block": (Blocks, {"granularity": "block"}, {}),
    "model": (Blocks, {"granularity": "model"}, {}),
    "model, clamped": (Blocks, {"granularity": "model"}, {"clamp_lambda": True}),
    "no low rank": (Blocks, {"low_rank": "none"}, {"tensor_norm": 0.0}),
    "no low rank, but a norm": (Blocks, {"low_rank": "none", "granularity": "block"}, {"tensor_norm": 0.5}),
    "attention": (Blocks, {"low_rank": "attention"}, {}),
    "in-projection": (Blocks, {"low_rank": "in-projection"}, {}),
    "outer-product": (Blocks, {"core": "outer-product"}, {}),
    "outer-vector": (Blocks, {"core": "outer-vector"}, {}),
    "frozen λ": (Blocks, {"granularity": "block"}, {"learn_lambda": False}),
    "clamped λ": (Blocks, {}, {"clamp_lambda": True}),
    "clamped shared λ": (Blocks, {"granularity": "block"}, {"clamp_lambda": True}),
    "everything": (Blocks, {}, {"cosine": 0.4, "tensor_norm": 0.7, "information_maximisation": 0.3}),
    "linear": (Blocks, {}, {"scalarization": "linear", "tensor_norm": 0.0}),
    "tchebycheff": (Blocks, {}, {"scalarization": "tchebycheff"}),
    "no vectors": (NoVectors, {}, {}),
    "no vectors, one λ": (NoVectors, {"granularity": "model"}, {}),
    "only vectors": (OnlyVectors, {"low_rank": "none"}, {}),
    "only vectors and low rank": (OnlyVectors, {}, {}),
    "tied vectors": (TiedVectors, {}, {}),
    "tied vectors, one λ": (TiedVectors, {"granularity": "model"}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("strategy", "at_once"), [("auto", "one"), ("auto", "all"), ("cached", "one")])
def test_every_gradient_is_that_of_plain_autograd(case: str, strategy: str, at_once: TasksAtOnce) -> None:
    kind, model_settings, changes = CASES[case]
    settings = method(**changes)
    model, net = pareto(kind, **model_settings), plain(kind, torch.float64)
    set_strategy(model, strategy)
    with torch.no_grad():
        for name, p in learned_parameters(model).items():
            if name.startswith("lam.") and settings.clamp_lambda:
                p.copy_(torch.tensor([-0.2, 0.4, 1.3])[torch.randperm(3)])
    learned = {n: p for n, p in learned_parameters(model).items() if settings.learn_lambda or not n.startswith("lam.")}
    for name, p in learned_parameters(model).items():
        p.requires_grad_(name in learned)
    state = pareto_state(model)
    state.now.lambda_range = (0.0, 1.0) if settings.clamp_lambda else None
    step = step_of(model, heads(), learned, settings, tasks_at_once=at_once)
    for number, gamma in enumerate((GAMMA, torch.tensor([1.0, 0.0, 0.0]), GAMMA)):
        batch = images(seed=number)
        before = state.now.gamma, state.now.cache
        found = step(batch, gamma)
        assert (
            state.now.gamma is before[0]
            and state.now.cache is before[1]
            and state.now.vectors is None
            and state.now.factors is None
        )
        loss, gradient = expected(model, net, batch, gamma, settings, learned)
        torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
        assert_gradient(found.gradient, gradient, learned, rtol=1e-7, atol=1e-9)
        if settings.clamp_lambda:
            for name, value in by_name(found.gradient, learned).items():
                if name.startswith("lam."):
                    outside = (learned[name] < 0) | (learned[name] > 1)
                    assert outside.any() and not value[outside].any(), name
        with torch.no_grad():
            for p in learned.values():
                p.sub_(0.01 * torch.sign(p))


def test_all_tasks_at_once_want_one_shape_and_features_of_each_image() -> None:
    model, settings = pareto(), method()
    learned = learned_parameters(model)
    for p in learned.values():
        p.requires_grad_()
    step = step_of(model, heads(), learned, settings, tasks_at_once="all")
    batch = images()
    # as many images of each task as it has
    uneven = [batch[0][:1], batch[1], batch[2][:3]]
    torch.testing.assert_close(
        step(uneven, GAMMA).gradient, step_of(model, heads(), learned, settings)(uneven, GAMMA).gradient
    )
    with pytest.raises(ValueError, match=r"tasks_at_once: expected images of one shape and type for 'all', got \[3, 8"):
        step([batch[0], batch[1][..., :4], batch[2]], GAMMA)
    with pytest.raises(ValueError, match="tasks_at_once: expected one or all, got 'two'"):
        step_of(model, heads(), learned, settings, tasks_at_once="two")  # type: ignore[arg-type]

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(192, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1)).mean(dim=0, keepdim=True)

    model = pareto(Mean)
    learned = learned_parameters(model)
    step = step_of(model, heads(), learned, settings, tasks_at_once="all")
    with pytest.raises(
        ValueError, match=r"tasks_at_once: expected a model of \[15, \*\] features for 'all', got \[1, 6\]"
    ):
        step(batch, GAMMA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_low_precision_is_as_good_as_the_plain_form(dtype: torch.dtype, granularity: str) -> None:
    """Against float64, at most twice the error that autograd makes through each vector's own merge."""
    model, net = pareto(TiedVectors, dtype, granularity=granularity), plain(TiedVectors, dtype)
    settings, learned = method(cosine=0.2), learned_parameters(model)
    batch, own = images(dtype), heads(dtype)
    _, wanted = expected(model, net, batch, GAMMA, settings, learned)
    with preference(model, GAMMA):
        objectives = [lambda x=x, h=h: entropy_terms(h(model(x))) for x, h in zip(batch, own, strict=True)]
        direct = pareto_gradient(
            objectives, list(learned.values()), GAMMA, settings, lambda: tensor_norm(model, GAMMA)
        ).gradient
    found = step_of(model, own, learned, settings)(batch, GAMMA).gradient
    assert found.dtype == torch.float32
    one, two, three = (by_name(flat.double(), learned) for flat in (found, direct, wanted))
    for name in learned:
        error = (two[name] - three[name]).norm()
        floor = torch.finfo(dtype).eps * wanted.norm()
        assert (one[name] - three[name]).norm() <= 2 * error + floor, name


def test_vectors_of_another_dtype_go_their_own_way() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(192, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x.flatten(1)).double()))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Two()
    net.b.double()
    model = randomize(pm.parametrize(net, finetuned_copies(net), rank=2, low_rank="all"))
    learned, settings = learned_parameters(model), method()
    batch = images(torch.float32)
    found = step_of(model, heads(), learned, settings)(batch, GAMMA).gradient
    merged = merged_by_definition(model, GAMMA)
    values = []
    for head, x in zip(heads(), batch, strict=True):
        x = x.double().flatten(1)
        hidden = torch.tanh(x @ merged["a.weight"].mT + merged["a.bias"])
        values.append(entropy_terms(head(hidden @ merged["b.weight"].mT + merged["b.bias"])).objective)
    loss = scalarize(torch.stack(values), GAMMA.double(), "smooth-tchebycheff", 0.1)
    loss = loss + settings.tensor_norm * low_rank_norm(model, GAMMA)
    gradients = torch.autograd.grad(loss, list(learned.values()))
    wanted = torch.cat([g.reshape(-1).double() for g in gradients])
    assert_gradient(found, wanted, learned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", ["tensor", "block", "clamped λ", "outer-product", "no low rank", "tied vectors"])
def test_data_free_is_the_distance_of_the_weights(case: str, normalize: bool) -> None:
    kind, model_settings, changes = CASES[case]
    settings = method(objective="weight-distance", normalize_distance=normalize, **changes)
    model = pareto(kind, **model_settings)
    learned, state = learned_parameters(model), pareto_state(model)
    state.now.lambda_range = (0.0, 1.0) if settings.clamp_lambda else None
    step = step_of(model, None, learned, settings)
    merged = merged_by_definition(model, GAMMA)
    S, scale, seen = [torch.zeros(()).double()] * TASKS, [0.0] * TASKS, set()
    for prefix, module in pareto_modules(model):
        for name in module.pareto_names:
            tau, weight = module.pareto_parameter(name).task_vectors, module._parameters[name]
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            for k in range(TASKS):
                value = merged[f"{prefix}.{name}" if prefix else name]
                S[k] = S[k] + (value - weight.detach() - tau[k]).square().sum()
                scale[k] += float(tau[k].square().sum())
    values = torch.stack([s / (w if normalize else 1.0) for s, w in zip(S, scale, strict=True)])
    loss = scalarize(values, GAMMA.double(), settings.scalarization, settings.mu)
    if settings.tensor_norm:
        loss = loss + settings.tensor_norm * low_rank_norm(model, GAMMA)
    gradients = torch.autograd.grad(loss, list(learned.values()))
    found = step([], GAMMA)
    torch.testing.assert_close(found.terms[:, 0].double(), values.detach())
    torch.testing.assert_close(found.loss.double(), loss.detach())
    assert_gradient(found.gradient, torch.cat([g.reshape(-1) for g in gradients]), learned)
    assert pareto_state(model).now.vectors is None


def test_a_folded_model_learns_its_low_rank_terms() -> None:
    model = pm.fold(pareto())
    learned, settings = learned_parameters(model), method()
    assert learned and not any(name.startswith("lam.") for name in learned)
    net = pm.merge(model, [1.0, 0.0, 0.0])
    found = step_of(model, heads(), learned, settings)(images(), GAMMA)
    loss, gradient = expected(model, net, images(), GAMMA, settings, learned)
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=1e-6)
    assert_gradient(found.gradient, gradient, learned, rtol=1e-7, atol=1e-9)


def test_under_autocast_only_the_model_is_in_16_bits() -> None:
    """Not the sums over tasks, nor what becomes of dL: against float64, at most twice the error of the plain form."""
    model, net = pareto(dtype=torch.float32), plain(Blocks, torch.float32)
    settings, learned = method(), learned_parameters(model)
    batch, own = images(torch.float32), heads(torch.float32)
    _, wanted = expected(model, net, batch, GAMMA, settings, learned)

    def forward(x: Tensor, head: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return entropy_terms(head(model(x)))

    with preference(model, GAMMA):
        objectives = [lambda x=x, h=h: forward(x, h) for x, h in zip(batch, own, strict=True)]
        direct = pareto_gradient(
            objectives, list(learned.values()), GAMMA, settings, lambda: tensor_norm(model, GAMMA)
        ).gradient
    with torch.autocast("cpu", torch.bfloat16):
        found = step_of(model, own, learned, settings)(batch, GAMMA).gradient
    assert found.dtype == torch.float32
    error = (direct - wanted).norm()
    assert 0 < (found - wanted).norm() <= 2 * error


def test_norm_of_a_double_preference_on_a_single_precision_model() -> None:
    model = pareto(dtype=torch.float32)
    torch.testing.assert_close(tensor_norm(model, GAMMA.double()).float(), tensor_norm(model, GAMMA))


def test_the_budget_changes_nothing_about_the_gradient() -> None:
    found = {}
    for budget in (None, 0, 300, 900, 10**6):
        model = pareto()
        set_strategy(model, "auto", memory_budget=budget)
        step = step_of(model, heads(), learned_parameters(model), method())
        step(images(), torch.tensor([0.2, 0.2, 0.6]))
        pm.set_lambda(model, 0.35)
        found[budget] = step(images(seed=2), GAMMA).gradient
        assert budget is None or step.cache.bytes <= budget
        torch.testing.assert_close(found[budget], found[None])


def test_wishes_about_the_cache() -> None:
    model = pareto(dtype=torch.float32)

    def cache(strategy: str, wanted: bool | None = None, budget: int | None = None) -> Any:
        set_strategy(model, strategy, memory_budget=budget)
        return step_of(model, heads(), learned_parameters(model), method(), cache=wanted).cache

    assert cache("auto").budget is None
    assert cache("auto", budget=123).budget == 123
    assert cache("cached") is not None and cache("eager") is not None
    assert cache("fused") is None and cache("streamed") is None
    assert all(cache(strategy, wanted=False) is None for strategy in ("auto", "cached", "eager", "fused"))
    assert all(cache(strategy, wanted=True) is not None for strategy in ("auto", "cached", "eager", "fused"))


def test_no_cache_gives_the_same() -> None:
    results = []
    for wanted in (False, True):
        model = pareto()
        step = step_of(model, heads(), learned_parameters(model), method(), cache=wanted)
        results.append(step(images(), GAMMA).gradient)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kernels", ["fused", "streamed"])
def test_strategies_of_the_kernels(kernels: str) -> None:
    results = []
    for strategy in ("eager", kernels):
        model = pareto(TiedVectors, torch.float32)
        set_strategy(model, strategy)
        learned = learned_parameters(model)
        results.append(step_of(model, heads(torch.float32), learned, method())(images(torch.float32), GAMMA))
    torch.testing.assert_close(results[0].gradient, results[1].gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0].terms, results[1].terms, rtol=1e-4, atol=1e-5)


def test_same_inputs_give_the_same_bits_and_no_tensor_of_the_caller_changes() -> None:
    model = pareto()
    learned = learned_parameters(model)
    step = step_of(model, heads(), learned, method())
    batch, gamma = images(), GAMMA.clone()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (step(batch, gamma).gradient.clone() for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(gamma, GAMMA) and all(torch.equal(a, b) for a, b in zip(batch, images(), strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["model", "head", "second task"])
@pytest.mark.parametrize("strategy", ["auto", "cached"])
def test_an_exception_leaves_the_model_as_it_was(where: str, strategy: str) -> None:
    class Broken(RuntimeError):
        pass

    model, own, calls = pareto(), heads(), itertools.count()
    set_strategy(model, strategy)
    pm.set_preference(model, [0.1, 0.2, 0.7])
    learned, state = learned_parameters(model), pareto_state(model)
    step = step_of(model, own, learned, method())
    before, output = (state.now.gamma, state.now.cache, state.now.strategy), model(images()[0])

    def fail(*_: Any) -> None:
        if next(calls) == (1 if where == "second task" else 0):
            raise Broken

    target = own[0] if where == "head" else model.blocks[1]
    handle = target.register_forward_hook(fail)
    with pytest.raises(Broken):
        step(images(), GAMMA)
    handle.remove()
    assert (
        (state.now.gamma, state.now.cache, state.now.strategy) == before
        and state.now.vectors is None
        and state.now.factors is None
    )
    assert torch.equal(model(images()[0]), output)
    fresh = step_of(model, own, learned, method())
    torch.testing.assert_close(step(images(), GAMMA).gradient, fresh(images(), GAMMA).gradient)


def test_gradient_checkpointing_inside_the_model() -> None:
    """The backward computes forwards again: it must find the vectors, and the preference, of the first time."""

    class Saving(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.saving = inner, False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.saving else self.inner(x)

    net = Saving(plain(TiedVectors, torch.float64))
    model = randomize(pm.parametrize(net, finetuned_copies(net), rank=2, low_rank="all"))
    results = []
    for model.saving in (False, True):
        step = step_of(model, heads(), learned_parameters(model), method())
        results.append(step(images(), GAMMA).gradient)
    torch.testing.assert_close(*results)


def test_gradient_checkpointing_of_a_vision_transformer(tiny_vit: nn.Module) -> None:
    """open_clip's own switch."""
    model = randomize(pm.parametrize(tiny_vit, finetuned_copies(tiny_vit), rank=2))
    generator = torch.Generator().manual_seed(0)
    own = [ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0) for _ in range(TASKS)]
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        step = step_of(model, own, learned_parameters(model), method())
        results.append(step(images(torch.float32), GAMMA).gradient)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("at_once", ["one", "all"])
def test_gradient_checkpointing_with_a_preference_per_item(tiny_vit: nn.Module, at_once: TasksAtOnce) -> None:
    """The forwards that the backward runs again have the preferences of the first time."""
    model = randomize(pm.parametrize(tiny_vit, finetuned_copies(tiny_vit), rank=2))
    generator = torch.Generator().manual_seed(0)
    own = [ZeroShotHead(torch.randn(5, 8, generator=generator), 10.0) for _ in range(TASKS)]
    batch = [x[:4] for x in images(torch.float32)]
    gammas = torch.randn(TASKS, 4, TASKS, generator=generator).softmax(dim=-1)
    settings, results = method(preference="per-item", scalarization="linear", tensor_norm=0.0), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        step = step_of(model, own, learned_parameters(model), settings, tasks_at_once=at_once)
        results.append(step(batch, gammas).gradient)
    torch.testing.assert_close(*results)


def test_compiled_models() -> None:
    model = pareto(TiedVectors, torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    own, batch = heads(torch.float32), images(torch.float32)
    results = [step_of(m, own, learned_parameters(model), method())(batch, GAMMA).gradient for m in (model, compiled)]
    torch.testing.assert_close(*results)
    assert pareto_state(model).now.vectors is None


def test_arguments_are_checked() -> None:
    model = pareto()
    with pytest.raises(TypeError, match="cache: expected True, False or None, got 'off'"):
        step_of(model, heads(), learned_parameters(model), method(), cache="off")  # type: ignore[arg-type]
    elsewhere = [heads()[0], heads()[1].to("meta"), heads()[2]]
    with pytest.raises(ValueError, match=r"tasks: expected the head of t1 on cpu, .* got weight on meta"):
        step_of(model, elsewhere, learned_parameters(model), method())
    for value, message in (("maybe", "expected auto, on or off, got 'maybe'"), ("on", "expected auto or off without")):
        with pytest.raises(ValueError, match=f"cuda_graphs: {message}"):
            step_of(model, heads(), learned_parameters(model), method(), cuda_graphs=value)


@pytest.mark.parametrize("scalarization", ["smooth-tchebycheff", "tchebycheff", "linear"])
@pytest.mark.parametrize("extra", [{}, {"cosine": 0.5, "tensor_norm": 0.3}, {"information_maximisation": 0.2}])
def test_gradient_equals_that_of_the_graph_of_all_tasks(
    tiny_vit: nn.Module,
    copies: Copies,
    scalarization: str,
    extra: dict[str, float],
) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)).double()
    settings = (
        short_run(scalarization=scalarization, tensor_norm=0.0, **extra)
        if not extra
        else short_run(scalarization=scalarization, **extra)
    )
    tasks = task_set(3)
    batches = [task.images.images[:6].double() for task in tasks.values()]
    heads = [task.head.double() for task in tasks.values()]
    gamma = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    parameters = list(learned_parameters(model).values())
    with preference(model, gamma):
        values = torch.stack(
            [
                entropy_terms(head(model(x)), settings.information_maximisation).objective
                for x, head in zip(batches, heads, strict=True)
            ]
        )
        used = gamma.to(values)
        loss = scalarize(values, used, settings.scalarization, settings.mu)
        loss = loss - settings.cosine * cosine_alignment(values, used)
        loss = loss + settings.tensor_norm * tensor_norm(model, gamma)
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
        value, _, ours = pareto_gradient(
            [
                lambda x=x, head=head: entropy_terms(head(model(x)), settings.information_maximisation)
                for x, head in zip(batches, heads, strict=True)
            ],
            parameters,
            gamma,
            settings,
            lambda: tensor_norm(model, gamma),
        )
    assert value == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def held_bytes(model: nn.Module, tasks: dict[str, Task]) -> tuple[int, int]:
    """Peak bytes of activations saved for backward on the whole model, and the bytes of the K small gradients."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    own |= {t.untyped_storage().data_ptr() for task in tasks.values() for t in task.head.buffers()}
    own |= {task.images.images.untyped_storage().data_ptr() for task in tasks.values()}
    alive: dict[int, Any] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            # a saved output held with its graph would be a cycle of the test's own making
            self.tensor = tensor.detach()
            self.storage = tensor.untyped_storage()
            nonlocal peak
            if self.storage.data_ptr() not in own:
                alive[id(self)] = self.storage
                # several nodes may save one storage
                peak = max(peak, sum({s.data_ptr(): s.nbytes() for s in alive.values()}.values()))

        def __del__(self) -> None:
            alive.pop(id(self), None)

    parameters = list(learned_parameters(model).values())
    gradients = 0

    def objective(task: Task) -> Any:
        def run() -> Any:
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                return entropy_terms(task.head(model(task.images.images[:6])))

        return run

    gamma = torch.full((len(tasks),), 1 / len(tasks))
    _, _, flat = pareto_gradient([objective(task) for task in tasks.values()], parameters, gamma, short_run())
    gradients = len(tasks) * flat.numel() * flat.element_size()
    assert not alive, "activations outlive the step"
    return peak, gradients


def test_activation_memory_is_that_of_one_task(tiny_vit: nn.Module, copies: Copies) -> None:
    sizes = {}
    for tasks in (2, 8):
        model = randomize(parametrize(tiny_vit, copies(tiny_vit, tasks), rank=2))
        sizes[tasks] = held_bytes(model, task_set(tasks))
    activations = {tasks: size[0] for tasks, size in sizes.items()}
    # what a layer keeps beside its input is r×r and K numbers, so K = 8 may add those
    assert activations[8] <= 1.02 * activations[2]
    gradients = {tasks: size[1] for tasks, size in sizes.items()}
    assert gradients[8] > gradients[2], "the K small gradients, listed apart, do grow"
    # the all-at-once graph for comparison: it holds every task's activations together
    assert activations[2] > 0


# a rehearsal of the captured graph, without a GPU


class Rehearsal:
    """What a GPU does with a graph: while it is captured nothing is computed, a replay computes all of it.

    Whatever the capture wrote to lasting tensors is undone behind autograd's back, as if it had only been recorded, and
    its results are poisoned; a replay runs the Python again and writes into those very results.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: GradientOfStep) -> None:
        self.step, self.capturing, self.captures, self.replays, self.warm_ups = step, False, 0, 0, 0
        self.fail: Callable[[], None] = lambda: None
        rehearsal = self

        class Graph:
            outputs: Any = None

            def replay(self) -> None:
                rehearsal.replays += 1
                rehearsal.capturing = True
                try:
                    fresh = step._compute()
                finally:
                    rehearsal.capturing = False
                assert step._outputs is not None
                for old, new in zip(step._outputs, fresh, strict=True):
                    with torch.no_grad():
                        old.copy_(new)

        def capture(function: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
            # once more for real, as on a GPU
            function()
            kept = [] if step.cache is None else [e.value for e in step.cache._kept.values()]
            kept += [] if step.gathered is None else step.gathered.factors._stacked
            vectors = None if step.gathered is None else step.gathered.vectors
            lasting = [*kept, *([] if vectors is None else [vectors.leaf])]
            before = [t.detach().clone() for t in lasting]
            rehearsal.captures += 1
            rehearsal.capturing = True
            try:
                outcome = function()
                for value in outcome:
                    value.data.fill_(torch.nan)
                rehearsal.fail()
            finally:
                rehearsal.capturing = False
                for tensor, value in zip(lasting, before, strict=True):
                    tensor.data.copy_(value)
            return Graph(), outcome

        def warm_up(function: Callable[[], Any], device: torch.device) -> Any:
            rehearsal.warm_ups += 1
            return function()

        monkeypatch.setattr(gradient, "capture", capture)
        monkeypatch.setattr(gradient, "warm_up", warm_up)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: rehearsal.capturing)
        step.graphs = "auto"


def moved(model: nn.Module, number: int) -> None:
    """As an optimiser step would."""
    optimizer = torch.optim.SGD([*learned_parameters(model).values()], lr=0.01)
    generator = torch.Generator().manual_seed(number)
    for p in learned_parameters(model).values():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()
    optimizer.zero_grad()


def gammas(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(TASKS, generator=generator).softmax(0) for _ in range(count)]


@pytest.mark.parametrize("objective", ["entropy", "weight-distance"])
@pytest.mark.parametrize("cache", [True, False])
def test_replays_are_right_at_every_step(monkeypatch: pytest.MonkeyPatch, objective: str, cache: bool) -> None:
    model = pareto()
    learned, settings = learned_parameters(model), method(objective=objective)
    own = heads() if objective == "entropy" else None
    step = step_of(model, own, learned, settings, cache=cache)
    rehearsal = Rehearsal(monkeypatch, step)
    # the sizes of the batches change after the third step, and back
    for number, gamma in enumerate(gammas(8)):
        batch = [] if own is None else images(rows=4 if number < 3 or number > 5 else 2, seed=number)
        given = [x.clone() for x in batch]
        found = step(batch, gamma)
        for x in batch:
            # the caller's memory is the caller's again
            x.fill_(torch.nan)
        wanted = step_of(model, own, learned, settings, cache=False)(given, gamma)
        for name, one, two in zip(found._fields, found, wanted, strict=True):
            torch.testing.assert_close(one, two, msg=lambda text, n=name, i=number: f"{n}, step {i}: {text}")
        moved(model, number)
    assert rehearsal.captures == rehearsal.warm_ups == (1 if own is None else 3)
    assert rehearsal.replays == (7 if own is None else 5)


def test_a_graph_goes_on_after_other_preferences_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between replays the model is used by itself, as an evaluation in the middle of a run would."""
    model = pareto()
    learned, settings = learned_parameters(model), method()
    step = step_of(model, heads(), learned, settings)
    Rehearsal(monkeypatch, step)
    for number, gamma in enumerate(gammas(4)):
        with preference(model, [1.0, 0.0, 0.0]):
            model(images()[0])
        found = step(images(seed=number), gamma)
        wanted = step_of(model, heads(), learned, settings, cache=False)(images(seed=number), gamma)
        torch.testing.assert_close(found.gradient, wanted.gradient)
        moved(model, number)


@pytest.mark.parametrize("cache", [True, False])
def test_a_capture_that_fails_is_said_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, cache: bool) -> None:
    """The merges recorded by the failed capture were never computed: none may count as done."""
    model = pareto()
    learned, settings, said = learned_parameters(model), method(), []
    step = step_of(model, heads(), learned, settings, cache=cache, on_warning=said.append)
    rehearsal = Rehearsal(monkeypatch, step)

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    rehearsal.fail = fail
    for number, gamma in enumerate(gammas(4)):
        found = step(images(seed=number), gamma)
        wanted = step_of(model, heads(), learned, settings, cache=False)(images(seed=number), gamma)
        for name, one, two in zip(found._fields, found, wanted, strict=True):
            torch.testing.assert_close(one, two, msg=lambda text, n=name, i=number: f"{n}, step {i}: {text}")
        moved(model, number)
    assert rehearsal.captures == 1 and rehearsal.replays == 0
    assert len(said) == 1
    assert said[0].startswith("cuda_graphs: going on without") and "\n" not in said[0]
    assert pareto_state(model).now.vectors is None


def test_a_failed_capture_is_an_error_where_graphs_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pareto()
    step = step_of(model, heads(), learned_parameters(model), method())
    rehearsal = Rehearsal(monkeypatch, step)
    step.graphs = "on"
    before = pareto_state(model).now.gamma
    gamma = gammas(1)[0]
    step(images(), gamma)
    moved(model, 0)

    def fail() -> None:
        raise RuntimeError("not while capturing")

    rehearsal.fail = fail
    with pytest.raises(RuntimeError, match="not while capturing"):
        step(images(), gamma)
    assert pareto_state(model).now.gamma is before and pareto_state(model).now.vectors is None
    # tried again, with a model that can be captured now
    rehearsal.fail = lambda: None
    found = step(images(), gamma)
    wanted = step_of(model, heads(), learned_parameters(model), method(), cache=False)(images(), gamma)
    torch.testing.assert_close(found.gradient, wanted.gradient)


class Wanted(Objective):
    """Half the squared distance of the logits to what is wanted of each image."""

    has_targets = True

    def terms(self, task: int, logits: Tensor, targets: Tensor | None) -> TaskTerms:
        assert targets is not None
        return TaskTerms((logits - targets).square().sum(dim=-1).mean() / 2)


@pytest.mark.parametrize("at_once", ["one", "all"])
def test_a_replay_sees_the_targets_of_its_own_step(monkeypatch: pytest.MonkeyPatch, at_once: TasksAtOnce) -> None:
    monkeypatch.setitem(OBJECTIVES, "wanted", ObjectiveKind("wanted", lambda model, tasks, settings: Wanted()))
    model, own = pareto(), heads()
    learned, settings = learned_parameters(model), method(objective="wanted")
    step = step_of(model, own, learned, settings, tasks_at_once=at_once)
    rehearsal = Rehearsal(monkeypatch, step)
    for number, gamma in enumerate(gammas(5)):
        batch = images(seed=number)
        generator = torch.Generator().manual_seed(number)
        targets = [torch.randn(len(x), 4 + k, generator=generator).double() for k, x in enumerate(batch)]
        given = [x.clone() for x in targets]
        found = step(batch, gamma, targets)
        for x in targets:
            x.fill_(torch.nan)
        wanted = step_of(model, own, learned, settings, cache=False)(batch, gamma, given)
        torch.testing.assert_close(found.terms, wanted.terms)
        torch.testing.assert_close(found.gradient, wanted.gradient)
        with torch.no_grad(), preference(model, gamma):
            by_hand = [
                (head(model(x)) - t).square().sum(dim=-1).mean() / 2
                for head, x, t in zip(own, batch, given, strict=True)
            ]
        torch.testing.assert_close(found.terms[:, 0], torch.stack(by_hand))
        moved(model, number)
    assert (rehearsal.captures, rehearsal.replays) == (1, 4)


@pytest.mark.parametrize("at_once", ["one", "all"])
def test_a_replay_sees_the_preferences_of_its_own_items(monkeypatch: pytest.MonkeyPatch, at_once: TasksAtOnce) -> None:
    model, own, settings = pareto(Tower, constant_rank=2), heads(), per_item()
    learned, net = learned_parameters(model), plain(Tower, torch.float64)
    step = step_of(model, own, learned, settings, tasks_at_once=at_once)
    rehearsal = Rehearsal(monkeypatch, step)
    for number in range(4):
        batch, gamma, targets = every_image(net, torch.float64), item_gammas(3, number), item_targets(3, number)
        kept = gamma.clone()
        found = step(batch, gamma, targets)
        gamma.fill_(torch.nan)
        wanted = step_of(model, own, learned, settings, cache=False)(batch, kept, targets)
        torch.testing.assert_close(found.terms, wanted.terms)
        torch.testing.assert_close(found.gradient, wanted.gradient)
        moved(model, number)
    assert (rehearsal.captures, rehearsal.replays) == (1, 3)


def test_cosine_is_that_of_one_over_gamma_and_survives_extremes() -> None:
    expected = torch.cosine_similarity(S, 1 / DOUBLE_GAMMA, dim=0)
    torch.testing.assert_close(cosine_alignment(S, DOUBLE_GAMMA), expected)
    for gamma in ([1.0, 0.0, 0.0], [1 - 1e-38, 1e-38, 0.0], [0.5, 0.5, 1e-45]):
        values = S.float().requires_grad_()
        cosine = cosine_alignment(values, torch.tensor(gamma))
        (grad,) = torch.autograd.grad(cosine, values)
        assert math.isfinite(float(cosine))
        assert bool(torch.isfinite(grad).all())


def test_low_rank_square() -> None:
    generator = torch.Generator().manual_seed(0)
    A, C, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 3), (5, 3)))
    torch.testing.assert_close(low_rank_square(A, C, B), (A @ C @ B.T).square().sum())


def test_tensor_norm_and_its_gradient_at_zero() -> None:
    model, _, _ = small_model()
    parameters = [p for n, p in learned_parameters(model).items() if not n.startswith("lam.")]
    norm = tensor_norm(model, DOUBLE_GAMMA)
    assert float(norm) == 0
    assert all(not bool(g.any()) for g in torch.autograd.grad(norm, parameters))
    randomize(model)
    total = 0.0
    for layer in (model[0], model[2]):
        core = sum(g * layer.G[:, :, k] for k, g in enumerate(DOUBLE_GAMMA))
        total += (layer.A @ core @ layer.B.T).square().sum()
    torch.testing.assert_close(tensor_norm(model, DOUBLE_GAMMA), total.sqrt())
    ours = torch.autograd.grad(tensor_norm(model, DOUBLE_GAMMA), parameters)
    theirs = torch.autograd.grad(total.sqrt(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert float(tensor_norm(nn.Linear(2, 2), DOUBLE_GAMMA)) == 0


# a preference per item


def per_item(**changes: Any) -> MethodSettings:
    given = {"objective": "distillation", "scalarization": "linear", "preference": "per-item", "temperature": 3.0}
    return method(**{**given, "tensor_norm": 0.4, **changes})


def item_gammas(count: int, seed: int = 0) -> Tensor:
    """Of each task [count, K], float32; the first are at corners."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(TASKS, count, TASKS, generator=generator).mul(4).softmax(dim=-1)
    found[0, 0], found[-1, -1] = torch.eye(TASKS)[1], torch.eye(TASKS)[0]
    return found


def item_targets(rows: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(rows, 4 + k, generator=generator).half() for k in range(TASKS)]


def kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL of one image, from the definition."""
    q, p = torch.softmax(teacher.to(logits) / temperature, 0), torch.softmax(logits / temperature, 0)
    return temperature**2 * sum(q[c] * (q[c].log() - p[c].log()) for c in range(len(q)))


def expected_per_item(
    model: nn.Module,
    net: nn.Module,
    batch: Sequence[Tensor],
    gammas: Tensor,
    targets: Sequence[Tensor],
    settings: MethodSettings,
    learned: dict[str, nn.Parameter],
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient [P]: every image through weights of its own, put together by the definition, in one graph."""
    like, values, squares = copy.deepcopy(net).to(dtype), [], []
    for head, x, own, wanted in zip(heads(dtype), batch, gammas, targets, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(x)):
            gamma = part_of(own, i, len(x))
            merged = {name: value.to(dtype) for name, value in merged_by_definition(model, gamma).items()}
            features = torch.func.functional_call(like, merged, (x[i : i + 1].to(dtype),), tie_weights=False)
            total = total + kl(head(features)[0].to(torch.promote_types(dtype, torch.float32)), wanted[i],
                               settings.temperature).double()  # fmt: skip
        values.append(total / len(x))
        squares += [low_rank_norm(model, gamma).square() for gamma in own]
    loss = torch.stack(values).mean()
    if settings.tensor_norm:
        loss = loss + settings.tensor_norm * torch.stack(squares).mean().sqrt()
    gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).reshape(-1).double()
        for g, p in zip(gradients, learned.values(), strict=True)
    ]
    return loss.detach(), torch.cat(flat)


def part_of(own: Tensor, image: int, images: int) -> Tensor:
    """The preference of an image where each of several is that of one part: of n images at n·j/parts begins part j."""
    return next(own[j] for j in range(len(own)) if image < images * (j + 1) // len(own))


def every_image(net: nn.Module, dtype: torch.dtype, rows: int = 3) -> list[Tensor]:
    return [x[:rows] for x in images(dtype, rows=rows)]


PER_ITEM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant": ({"constant_rank": 2}, {}),
    "one λ for all": ({"constant_rank": 1, "granularity": "model"}, {}),
    "no constant": ({}, {"tensor_norm": 0.0}),
    "no low rank": ({"constant_rank": 2, "low_rank": "none"}, {"tensor_norm": 0.0}),
    "frozen λ": ({"constant_rank": 2}, {"learn_lambda": False}),
    "clamped λ": ({"constant_rank": 2}, {"clamp_lambda": True}),
}


@pytest.mark.parametrize("case", PER_ITEM)
@pytest.mark.parametrize(("at_once", "cache"), [("one", True), ("one", False), ("all", True)])
def test_per_item_every_gradient_is_that_of_plain_autograd(case: str, at_once: TasksAtOnce, cache: bool) -> None:
    model_settings, changes = PER_ITEM[case]
    settings, net = per_item(**changes), plain(Tower, torch.float64)
    model = pareto(Tower, **model_settings)
    learned = {n: p for n, p in learned_parameters(model).items() if settings.learn_lambda or not n.startswith("lam.")}
    parts = {name.partition(".")[0] for name in learned}
    wanted_parts = {"lam", "A_c", "B_c", "A", "G", "B"}
    assert parts <= wanted_parts and (case != "constant" or parts == wanted_parts)
    for name, p in learned_parameters(model).items():
        p.requires_grad_(name in learned)
        if settings.clamp_lambda and name.startswith("lam."):
            p.data.copy_(torch.tensor([-0.2, 0.4, 1.3]))
    pareto_state(model).now.lambda_range = (0.0, 1.0) if settings.clamp_lambda else None
    step = step_of(model, heads(), learned, settings, tasks_at_once=at_once, cache=cache)
    for number in range(2):
        batch, targets, gammas = every_image(net, torch.float64), item_targets(3, number), item_gammas(3, number)
        found = step(batch, gammas, targets)
        loss, gradient = expected_per_item(model, net, batch, gammas, targets, settings, learned)
        torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
        assert_gradient(found.gradient, gradient, learned, rtol=1e-6, atol=1e-8)
        again = step(batch, gammas, targets)
        assert torch.equal(again.gradient, found.gradient) and torch.equal(again.loss, found.loss)
        state = pareto_state(model)
        assert state.now.gamma.ndim == 1 and state.now.vectors is None and state.now.factors is None
        with torch.no_grad():
            for p in learned.values():
                p.sub_(0.01 * torch.sign(p))


def low_rank_of(name: str, module: nn.Module) -> bool:
    return name in ("proj", "fc.weight")


def test_in_parts_the_gradient_is_exact_too() -> None:
    """A model that takes one preference at a time: four images in three parts, of 1, 1 and 2."""
    settings, net = per_item(), plain(WholeMatrix, torch.float64)
    model = pareto(WholeMatrix, low_rank=low_rank_of, constant_rank=2)
    learned = learned_parameters(model)
    assert "A.proj" in learned and "A_c.proj" in learned
    step = step_of(model, heads(), learned, settings)
    batch, targets = every_image(net, torch.float64, rows=4), item_targets(4)
    with pytest.raises(ValueError, match="proj is one merged tensor"):
        step(batch, item_gammas(4), targets)
    step.take_parts()
    gammas = item_gammas(3)
    found = step(batch, gammas, targets)
    loss, gradient = expected_per_item(model, net, batch, gammas, targets, settings, learned)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
    assert_gradient(found.gradient, gradient, learned, rtol=1e-6, atol=1e-8)
    assert torch.equal(step(batch, gammas, targets).gradient, found.gradient)
    # fewer images than parts
    few = [x[:2] for x in batch], [t[:2] for t in targets]
    assert bool(torch.isfinite(step(few[0], gammas, few[1]).gradient).all())
    with pytest.raises(ValueError, match="tasks_at_once: expected one for a model that takes no preference per item"):
        step_of(model, heads(), learned, settings, tasks_at_once="all").take_parts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", ["one", "all"])
def test_per_item_low_precision_is_as_good_as_the_plain_form(dtype: torch.dtype, at_once: TasksAtOnce) -> None:
    """Against float64, at most twice the error of plain PyTorch in that precision, of every kind of tensor."""
    model, net, settings = pareto(Tower, dtype, constant_rank=2), plain(Tower, dtype), per_item(tensor_norm=0.0)
    learned = learned_parameters(model)
    batch, targets, gammas = every_image(net, dtype), item_targets(3), item_gammas(3)
    _, wanted = expected_per_item(model, net, batch, gammas, targets, settings, learned)
    _, direct = expected_per_item(model, net, batch, gammas, targets, settings, learned, dtype)
    step = step_of(model, heads(dtype), learned, settings, tasks_at_once=at_once)
    found = step(batch, gammas, targets).gradient
    assert found.dtype == torch.float32
    one, two, three = (by_name(flat.double(), learned) for flat in (found, direct, wanted))
    for kind in ("lam", "A_c", "B_c", "A", "G", "B"):
        names = [name for name in learned if name.partition(".")[0] == kind]
        error = torch.cat([(two[name] - three[name]).flatten() for name in names]).norm()
        ours = torch.cat([(one[name] - three[name]).flatten() for name in names]).norm()
        floor = torch.finfo(dtype).eps * torch.cat([three[name].flatten() for name in names]).norm()
        assert ours <= 2 * error + floor, f"d {kind}: {float(ours)} against {float(error)}"


@pytest.mark.parametrize("kernels", ["fused", "streamed"])
def test_per_item_strategies_of_the_kernels(kernels: str) -> None:
    results, settings = [], per_item()
    for strategy in ("eager", kernels):
        model = pareto(Tower, torch.float32, constant_rank=2)
        set_strategy(model, strategy)
        learned = learned_parameters(model)
        batch = every_image(plain(Tower, torch.float32), torch.float32)
        results.append(step_of(model, heads(torch.float32), learned, settings)(batch, item_gammas(3), item_targets(3)))
    one, two = (by_name(result.gradient, learned) for result in results)
    for name in learned:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"d {n}: {t}")
    torch.testing.assert_close(results[0].terms, results[1].terms, rtol=1e-4, atol=1e-5)


def test_one_preference_for_a_step_and_a_constant_term() -> None:
    """The published sampler with the constant term: one L for all rows, and A_c beside it."""
    model, net = pareto(Tower, constant_rank=2), plain(Tower, torch.float64)
    settings, learned = method(), learned_parameters(model)
    for at_once in ("one", "all"):
        found = step_of(model, heads(), learned, settings, tasks_at_once=at_once)(images(), GAMMA)
        loss, gradient = expected(model, net, images(), GAMMA, settings, learned)
        torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
        assert_gradient(found.gradient, gradient, learned, rtol=1e-7, atol=1e-9)


def test_per_item_norm_is_the_root_of_the_mean_square() -> None:
    model = pareto(Tower)
    gammas = item_gammas(3).double()
    squares = [low_rank_norm(model, gamma).square() for gamma in gammas.flatten(0, 1)]
    torch.testing.assert_close(tensor_norm(model, gammas), torch.stack(squares).mean().sqrt(), rtol=1e-6, atol=1e-8)
