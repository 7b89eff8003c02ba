"""Pareto Merging, Pareto Merging++ and the data-free form against plain loops with autograd and Adam written out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, entropy, image_tasks, parameter_task_vectors, state_of, ties_in_loops
from torch import Tensor, nn

from pareto_merging.data.sources import TensorImages, batch_indices
from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import data_free, pareto
from pareto_merging.model.files import load_pareto_set, save_pareto_set
from pareto_merging.model.learned import get_lambda, learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.preferences import sample_dirichlet

STEPS, BATCH, RANK, SEED, RATE = 6, 4, 2, 3, 0.03


def mlp_problem(count: int = 3) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Task]]:
    """In float64, so that the agreement is exact but for the order of sums."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
        heads = [nn.Linear(4, 3).double() for _ in range(count)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(9, 6, generator=generator) for _ in range(count)]
    finetuned = {f"t{k}": noisy_copy(net, k + 1, 0.2) for k in range(count)}
    tasks = {name: Task(TensorImages(x), head) for name, x, head in zip(finetuned, images, heads, strict=True)}
    return net, finetuned, tasks


def method(**changes: Any) -> MethodSettings:
    values = {"steps": STEPS, "batch_size": BATCH, "rank": RANK, "seed": SEED, "learning_rate": RATE, "low_rank": "all"}
    return MethodSettings.model_validate({**values, **changes})


def merged(
    net: nn.Module, taus: dict[str, list[Tensor]], learned: dict[str, Tensor], gamma: Tensor
) -> dict[str, Tensor]:
    """W0 + Σ_k λ_k τ_k + A·(Σ_k γ_k G[:, :, k])·Bᵀ of every parameter."""
    result = {}
    for name, base in net.named_parameters():
        value = base.detach()
        for k, tau in enumerate(taus[name]):
            value = value + learned[f"lam.{name}"][k] * tau if f"lam.{name}" in learned else value
        if f"A.{name}" in learned:
            core = sum(gamma[k] * learned[f"G.{name}"][:, :, k] for k in range(len(gamma)))
            value = value + learned[f"A.{name}"] @ core @ learned[f"B.{name}"].t()
        result[name] = value
    return result


def personal_norm(learned: dict[str, Tensor], gamma: Tensor) -> Tensor:
    """‖A·C·Bᵀ‖ of all layers together; 0, without a gradient, while G is 0."""
    total = torch.zeros((), dtype=torch.float64)
    for key in learned:
        if key.startswith("G."):
            name = key.removeprefix("G.")
            core = sum(gamma[k] * learned[key][:, :, k] for k in range(len(gamma)))
            total = total + (learned[f"A.{name}"] @ core @ learned[f"B.{name}"].t()).square().sum()
    return total.sqrt() if float(total.detach()) > 0 else total.detach()


def by_hand(
    net: nn.Module,
    finetuned: dict[str, nn.Module],
    settings: MethodSettings,
    taus: dict[str, list[Tensor]],
    objectives: Callable[[int, dict[str, Tensor]], list[Tensor]],
) -> dict[str, Tensor]:
    """λ, A, G and B after all steps; A and B start as those of a fresh model do."""
    fresh = parametrize(net, finetuned, rank=RANK, low_rank="all", seed=settings.seed, preprocess=settings.preprocess)
    learned = {name: p.detach().clone() for name, p in learned_parameters(fresh).items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learned.items()}
    count = len(finetuned)
    for step in range(1, settings.steps_for(count) + 1):
        rng = np.random.default_rng([settings.seed, 2, step])
        gamma = sample_dirichlet(settings.concentration, count, rng).double()
        if settings.gamma is not None:
            gamma = torch.tensor(settings.gamma).double()
        variables = {name: p.clone().requires_grad_() for name, p in learned.items()}
        values = objectives(step, merged(net, taus, variables, gamma))
        # the smooth Tchebycheff scalarisation from its definition
        loss = settings.mu * torch.log(sum(torch.exp(g * s / settings.mu) for g, s in zip(gamma, values, strict=True)))
        loss = loss + settings.tensor_norm * personal_norm(variables, gamma)
        gradients = torch.autograd.grad(loss, list(variables.values()), allow_unused=True)
        for (name, p), gradient in zip(learned.items(), gradients, strict=True):
            gradient = torch.zeros_like(p) if gradient is None else gradient
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.999 * moments[name][1] + 0.001 * gradient**2
            moments[name] = m, v
            learned[name] = p - settings.learning_rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return learned


def entropies(net: nn.Module, tasks: dict[str, Task]) -> Callable[[int, dict[str, Tensor]], list[Tensor]]:
    def objectives(step: int, weights: dict[str, Tensor]) -> list[Tensor]:
        values = []
        for index, task in enumerate(tasks.values()):
            chosen = batch_indices(len(task.images), BATCH, step - 1, (SEED, 1, index))
            x = task.images.images[chosen].double()
            values.append(entropy(task.head(torch.func.functional_call(net, weights, (x,)))))
        return values

    return objectives


def assert_learned(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = learned_parameters(model)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].detach(), value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("preprocess", ["none", "ties"])
@pytest.mark.parametrize(
    "changes", [{}, {"preference": "fixed", "gamma": (0.5, 0.3, 0.2), "mu": 0.3, "tensor_norm": 0.0}]
)
def test_against_plain_loops(changes: dict[str, Any], preprocess: str) -> None:
    net, finetuned, tasks = mlp_problem()
    settings = method(preprocess=preprocess, concentration=1.0, **changes)
    before = state_of(net), [state_of(other) for other in finetuned.values()]
    result = pareto.merge(net, finetuned, tasks=tasks, method=settings, progress=False)
    taus = parameter_task_vectors(net, list(finetuned.values()))
    taus = ties_in_loops(taus, 0.2) if preprocess == "ties" else taus
    expected = by_hand(net, finetuned, settings, taus, entropies(net, tasks))
    assert all(bool(value.any()) for name, value in expected.items() if name.startswith("G."))
    assert_learned(result.pareto, expected)
    for gamma in ([0.6, 0.3, 0.1], [0.0, 0.0, 1.0]):
        assert_state(result.model(gamma), merged(net, taus, expected, torch.tensor(gamma, dtype=torch.float64)))
    lam = {name.removeprefix("lam."): value.tolist() for name, value in expected.items() if name.startswith("lam.")}
    assert list(result.facts["lambda"]) == list(lam)
    assert get_lambda(result.pareto).tolist() == list(result.facts["lambda"].values())
    assert result.preference_aware
    after = state_of(net), [state_of(other) for other in finetuned.values()]
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before[1], after[1], strict=True) for n in a)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("preprocess", ["none", "ties"])
def test_data_free_against_explicit_distances(normalize: bool, preprocess: str) -> None:
    """S_k = ‖W(γ) − W_k‖² with W_k = W0 + τ_k, over ‖τ_k‖² where normalised; no task is given."""
    net, finetuned, _ = mlp_problem()
    settings = method(
        objective="weight-distance", normalize_distance=normalize, preprocess=preprocess, concentration=1.0
    )
    result = data_free.merge(net, finetuned, method=settings, progress=False)
    taus = parameter_task_vectors(net, list(finetuned.values()))
    taus = ties_in_loops(taus, 0.2) if preprocess == "ties" else taus

    def distances(step: int, weights: dict[str, Tensor]) -> list[Tensor]:
        values = []
        for k in range(3):
            square = sum((weights[n] - base.detach() - taus[n][k]).square().sum() for n, base in net.named_parameters())
            values.append(square / sum(tau[k].square().sum() for tau in taus.values()) if normalize else square)
        return values

    assert_learned(result.pareto, by_hand(net, finetuned, settings, taus, distances))


def test_data_free_brings_each_corner_near_its_model() -> None:
    """At a one-hot preference the merged model is nearer to that task's than the start is."""
    net, finetuned, _ = mlp_problem()
    result = data_free.merge(
        net, finetuned, method=data_free.settings(steps=300, rank=4, low_rank="all", learning_rate=0.01), progress=False
    )

    def distance(model: nn.Module, name: str) -> float:
        pairs = zip(model.parameters(), finetuned[name].parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    for name in finetuned:
        ours = distance(result.model({name: 1}), name)
        others = [distance(result.model({other: 1}), name) for other in finetuned if other != name]
        assert ours < min(others)
        assert ours < distance(net, name)
    assert data_free.settings(objective="entropy").objective == "weight-distance"


def test_several_preferences_average_and_the_other_settings_reach_the_model(tiny_vit: nn.Module) -> None:
    finetuned = {f"t{k}": noisy_copy(tiny_vit, k + 1) for k in range(2)}
    tasks = image_tasks(2)

    def learned(**changes: Any) -> dict[str, Tensor]:
        settings = MethodSettings.model_validate({"steps": 2, "batch_size": 2, "rank": 2, **changes})
        result = pareto.merge(tiny_vit, finetuned, tasks=tasks, method=settings, progress=False)
        return {name: p.detach() for name, p in learned_parameters(result.pareto).items()}

    first = learned()
    assert first["A.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 2)
    assert not any("out_proj" in name for name in learned(low_rank="in-projection") if name.startswith("A."))
    assert [name for name in learned(granularity="model") if name.startswith("lam.")] == ["lam.model"]
    for change in ({"preferences_per_step": 2}, {"init_lambda": 0.4}, {"seed": 1}, {"preprocess": "dare"}):
        other = learned(**change)
        assert any(not torch.equal(first[name], other[name]) for name in first if name in other), change
    only = pareto.merge(
        tiny_vit,
        finetuned,
        tasks=tasks,
        method=MethodSettings.model_validate({"steps": 1, "batch_size": 2, "low_rank": "none"}),
        progress=False,
    )
    assert not only.preference_aware


def test_a_preprocessing_of_ones_own_and_its_file(tiny_vit: nn.Module, tmp_path: Path) -> None:
    finetuned = {f"t{k}": noisy_copy(tiny_vit, k + 1) for k in range(2)}
    settings = MethodSettings.model_validate({"steps": 2, "batch_size": 2, "rank": 2, "preprocess": "ties"})

    def double(name: str, taus: Tensor) -> Tensor:
        return 2 * taus

    result = pareto.merge(tiny_vit, finetuned, tasks=image_tasks(2), method=settings, preprocess=double, progress=False)
    save_pareto_set(result.pareto, tmp_path / "set.safetensors")
    loaded = load_pareto_set(tmp_path / "set.safetensors", tiny_vit, finetuned, preprocess=double)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), result.pareto(x))


def test_a_run_with_a_folder_goes_on_where_it_stopped(tmp_path: Path) -> None:
    net, finetuned, tasks = mlp_problem()
    for preprocess in ("none", "ties", "dare"):
        for core in ("tensor", "outer-product"):
            settings = method(preprocess=preprocess, core=core)
            folder = tmp_path / f"{preprocess}-{core}"
            whole = pareto.merge(net, finetuned, tasks=tasks, method=settings, folder=folder, progress=False)
            again = pareto.merge(
                net, finetuned, tasks=tasks, method=settings, folder=folder, resume=True, progress=False
            )
            first, second = state_of(whole.model()), state_of(again.model())
            assert all(torch.equal(first[name], second[name]) for name in first)
    other = method(preprocess="ties", density=0.5)
    with pytest.raises(ValueError, match=r"differs in density \(0.2, now 0.5\)"):
        pareto.merge(
            net, finetuned, tasks=tasks, method=other, folder=tmp_path / "ties-tensor", resume=True, progress=False
        )


def test_a_preprocessing_by_name_takes_the_place_of_the_settings() -> None:
    net = nn.Linear(6, 4)
    copies = [noisy_copy(net, 1), noisy_copy(net, 2)]
    settings = {"objective": "weight-distance", "steps": 1, "low_rank": "none"}
    plain = MethodSettings.model_validate({**settings, "preprocess": "none"})
    ties = MethodSettings.model_validate({**settings, "preprocess": "ties"})
    by_name = pareto.merge(net, copies, tasks=None, method=plain, preprocess="ties", progress=False)
    by_settings = pareto.merge(net, copies, tasks=None, method=ties, progress=False)
    assert torch.equal(by_name.model().weight, by_settings.model().weight)
