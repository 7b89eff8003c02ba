"""A preference per item: the same expectation as Σ γ_k S_k, and models that cannot take one."""

import math
import re
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import learned, same, task_set
from torch import Tensor, nn

from pareto_merging.learn.learner import Learner
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.per_item import LEAST_PARTS, item_preferences, why_not_per_item
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.parametrize import parametrize


def settings(**changes: Any) -> MethodSettings:
    given = {"preference": "per-item", "scalarization": "linear", "tensor_norm": 0.0, "rank": 2, "steps": 3}
    return MethodSettings.model_validate({"batch_size": 8, "concentration": 0.3, **given, **changes})


def moment(a: float, b: float, power: int) -> float:
    """E x^power for x ~ Beta(a, b)."""
    return math.prod((a + r) / (a + b + r) for r in range(power))


# S_1 and S_2 as polynomials in γ_1: coefficients of 1, γ_1, γ_1², γ_1³
POLYNOMIALS = ([0.7, -0.4, 1.9, -0.8], [0.2, 1.3, -0.6, 0.5])


def at(coefficients: list[float], x: Tensor) -> Tensor:
    return sum(c * x**power for power, c in enumerate(coefficients))


@pytest.mark.parametrize("p", [0.1, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_mean_over_images_expects_the_linear_scalarisation(p: float, in_parts: bool) -> None:
    first, second = POLYNOMIALS
    # E Σ γ_k S_k(γ) over Dir(p, p): γ_1 ~ Beta(p, p)
    exact = sum(c * moment(p, p, power + 1) for power, c in enumerate(first))
    exact += sum(c * (moment(p, p, power) - moment(p, p, power + 1)) for power, c in enumerate(second))
    # (1/K) Σ_k E S_k(γ) over Dir(p·1 + e_k)
    per_item = sum(c * moment(p + 1, p, power) for power, c in enumerate(first)) / 2
    per_item += sum(c * moment(p, p + 1, power) for power, c in enumerate(second)) / 2
    assert per_item == pytest.approx(exact, rel=1e-12)
    # and so the sampler, within five standard errors
    sampling = settings(concentration=p, batch_size=2000 if not in_parts else 8).sampling
    drawn = [item_preferences(sampling, 2, step, in_parts=in_parts) for step in range(1, 4 if not in_parts else 1500)]
    gammas = torch.cat(drawn, dim=1).double()
    values = (at(first, gammas[0, :, 0]) + at(second, gammas[1, :, 0])) / 2
    assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(len(values))
    # the mean of each task's own: (p + 1) / (2p + 1)
    for task in range(2):
        own = gammas[task, :, task]
        assert abs(float(own.mean()) - moment(p + 1, p, 1)) < 5 * float(own.std()) / math.sqrt(len(own))


def test_preferences_are_a_function_of_seed_and_step() -> None:
    sampling = settings().sampling
    one = item_preferences(sampling, 3, 5, in_parts=False)
    assert one.shape == (3, 8, 3) and one.dtype == torch.float32
    torch.testing.assert_close(one.sum(dim=-1), torch.ones(3, 8))
    assert bool((one >= 0).all())
    assert torch.equal(one, item_preferences(sampling, 3, 5, in_parts=False))
    assert not torch.equal(one, item_preferences(sampling, 3, 6, in_parts=False))
    assert not torch.equal(one, item_preferences(settings(seed=1).sampling, 3, 5, in_parts=False))
    assert len({tuple(row) for row in one.flatten(0, 1).tolist()}) == 24, "each image has its own"
    counts = {
        n: item_preferences(settings(preferences_per_step=n).sampling, 3, 1, in_parts=True).shape for n in (1, 6, 99)
    }
    assert counts == {1: (3, LEAST_PARTS, 3), 6: (3, 6, 3), 99: (3, 8, 3)}
    assert item_preferences(settings(batch_size=2).sampling, 3, 1, in_parts=True).shape == (3, 2, 3)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(192, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x.flatten(1))))


class Whole(Plain):
    """Reads a merged matrix as one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x.flatten(1))) @ self.out.weight.t()


class Reversed(Plain):
    """Takes items in another order inside: no shape tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0)).flip(0)


class Joined(Plain):
    """Puts the items of a batch into one row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(dim=0, keepdim=True)


def pareto(kind: type[nn.Module], tasks: int = 2, **how: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind()
    copies = {f"t{k}": noisy_copy(net, k + 1) for k in range(tasks)}
    return parametrize(net, copies, **{"rank": 2, "low_rank": "all", **how})


WHY = [
    (Plain, None),
    (Whole, "Linear.weight is one merged tensor, so expected one preference for the whole batch"),
    (Reversed, "items at preferences of their own differ by"),
    (Joined, r"expected features \[2, 8\] of two items, got \[1, 8\]"),
]


@pytest.mark.parametrize(("kind", "message"), WHY)
@pytest.mark.parametrize("images", [1, 5])
def test_why_not(kind: type[nn.Module], message: str | None, images: int) -> None:
    """At the start G is zero, and no preference changes anything: that must not hide it."""
    for moved in (False, True):
        model = pareto(kind)
        if moved:
            randomize(model)
        before, gamma = learned(model), model.pareto.now.gamma
        why = why_not_per_item(model, torch.randn(images, 3, 8, 8))
        if message is None:
            assert why is None
        else:
            assert why is not None and re.search(message, why), why
        assert same(learned(model), before) and model.pareto.now.gamma is gamma


def test_models_without_a_term_that_knows_a_preference_take_any() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert why_not_per_item(pareto(Whole, low_rank="none", constant_rank=2), images) is None
    assert why_not_per_item(pareto(Whole, tasks=1), images) is not None
    assert why_not_per_item(pareto(Plain, tasks=1), images) is None


def test_a_model_that_cannot_is_learned_in_parts_and_says_so() -> None:
    said: list[str] = []
    model, before = pareto(Whole), learned(pareto(Whole))
    result = learn_pareto_set(model, task_set(2), settings(), progress=False, on_warning=said.append)
    assert result.steps == 3 and not same(learned(model), before)
    (warning,) = [text for text in said if text.startswith("preference:")]
    assert warning.startswith(
        "preference: going on with 4 preferences per task and step instead of one per item, because the model takes "
        "one at a time: Linear.weight is one merged tensor"
    )
    assert len(result.history[0]["gamma"]) == 2, "of each task the mean"
    said.clear()
    learn_pareto_set(pareto(Plain), task_set(2), settings(), progress=False, on_warning=said.append)
    assert not any(text.startswith("preference:") for text in said)
    with pytest.raises(ValueError, match="tasks_at_once: expected one for a model that takes no preference per item"):
        learn_pareto_set(pareto(Whole), task_set(2), settings(), progress=False, tasks_at_once="all")


def test_small_parts_are_not_taken_for_collapse() -> None:
    """The mean prediction of two images cannot have the entropy of that of eight."""
    learner = Learner(pareto(Whole), task_set(2), settings())
    assert learner.why_in_parts is not None and learner.images_together == 2
    assert Learner(pareto(Plain), task_set(2), settings()).images_together == 8


def test_runs_have_the_same_bits() -> None:
    for kind in (Plain, Whole):
        results = []
        for _ in range(2):
            model = pareto(kind, constant_rank=2)
            learn_pareto_set(model, task_set(2), settings(), progress=False, on_warning=lambda text: None)
            results.append(learned(model))
        assert same(*results)
