"""AdaMerging, AdaMerging++ and AdaMerging + preference against autograd through a whole merged state dict."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from method_cases import assert_state, conv_net, entropy, image_tasks, parameter_task_vectors, state_of, ties_in_loops
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_tensors
from pareto_merging.data.sources import batch_indices
from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, TrainingError
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import adamerging, adamerging_preference, ties

IMAGES, STEPS = 7, 6


def test_presets() -> None:
    official, fusionbench = adamerging.settings(), adamerging.settings("fusionbench")
    assert official == adamerging.settings("official")
    for method in (official, fusionbench):
        assert method.learning_rate == 1e-3
        assert method.init_lambda == 0.3
        assert (method.betas, method.lambda_learning_rate) == ((0.9, 0.999), None)
        assert (method.objective, method.scalarization, method.preference) == ("entropy", "linear", "equal")
        assert (method.cosine, method.tensor_norm, method.information_maximisation) == (0, 0, 0)
        assert (method.low_rank, method.granularity, method.preprocess) == ("none", "tensor", "none")
    # two batches of 16
    assert (official.steps, official.batch_size, official.clamp_lambda) == (500, 32, True)
    assert (fusionbench.steps, fusionbench.batch_size, fusionbench.clamp_lambda) == (1000, 16, False)
    changed = adamerging.settings("official", task_wise=True, plus=True, steps=3, seed=9, learning_rate=0.1)
    assert (changed.steps, changed.seed, changed.learning_rate) == (3, 9, 0.1)
    assert (changed.granularity, changed.preprocess, changed.density) == ("model", "ties", 0.2)
    assert changed.clamp_lambda
    assert changed.batch_size == 32
    with pytest.raises(ValueError, match="preset: expected official or fusionbench, got 'paper'"):
        adamerging.settings("paper")  # type: ignore[arg-type]


def by_hand(
    net: nn.Module,
    taus: dict[str, list[Tensor]],
    tasks: dict[str, Task],
    *,
    rate: float,
    clamp: bool,
    task_wise: bool = False,
    gamma: list[float] | None = None,
    steps: int = STEPS,
    batch: int = 4,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """The merged parameters and λ after some steps of Adam written out, and λ as Adam holds it after each step."""
    count = len(tasks)
    gamma = [1 / count] * count if gamma is None else gamma
    names = list(taus)
    groups = ["model"] if task_wise else names
    dtype = next(net.parameters()).dtype
    raw = {group: torch.full((count,), 0.3, dtype=dtype) for group in groups}
    first = {group: torch.zeros(count, dtype=dtype) for group in groups}
    second = {group: torch.zeros(count, dtype=dtype) for group in groups}
    history = []

    def merged(lam: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name in names:
            used = lam["model" if task_wise else name]
            used = torch.clamp(used, 0.0, 1.0) if clamp else used
            result[name] = net.get_parameter(name).detach() + sum(used[k] * taus[name][k] for k in range(count))
        return result

    for step in range(1, steps + 1):
        lam = {group: value.clone().requires_grad_() for group, value in raw.items()}
        loss = torch.zeros(())
        for index, (weight, task) in enumerate(zip(gamma, tasks.values(), strict=True)):
            images = task.images.images[batch_indices(len(task.images), batch, step - 1, (seed, 1, index))].to(dtype)
            loss = loss + weight * entropy(task.head(torch.func.functional_call(net, merged(lam), (images,))))
        gradients = torch.autograd.grad(loss, list(lam.values()))
        for group, gradient in zip(groups, gradients, strict=True):
            first[group] = 0.9 * first[group] + 0.1 * gradient
            second[group] = 0.999 * second[group] + 0.001 * gradient**2
            m, v = first[group] / (1 - 0.9**step), second[group] / (1 - 0.999**step)
            raw[group] = raw[group] - rate * m / (v.sqrt() + 1e-8)
        history.append({group: value.clone() for group, value in raw.items()})
    used = {group: value.clamp(0, 1) if clamp else value for group, value in raw.items()}
    return merged(raw), used, history


def problem(net: nn.Module, count: int = 2) -> tuple[dict[str, nn.Module], dict[str, Task]]:
    return {f"t{k}": noisy_copy(net, k + 1, 0.1) for k in range(count)}, image_tasks(count, IMAGES)


def facts_agree(facts: dict[str, Any], expected: dict[str, Tensor], atol: float = 1e-4) -> None:
    assert list(facts["lambda"]) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(facts["lambda"][name]), value.float(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kind", ["layer-wise", "task-wise", "plus"])
@pytest.mark.parametrize("preset", ["official", "fusionbench"])
@pytest.mark.parametrize("make", ["vit", "conv"])
def test_against_plain_loops(make: str, preset: Any, kind: str, tiny_vit: nn.Module) -> None:
    net = tiny_vit if make == "vit" else conv_net()
    finetuned, tasks = problem(net)
    method = adamerging.settings(
        preset,
        task_wise=kind == "task-wise",
        plus=kind == "plus",
        steps=STEPS,
        batch_size=4,
        learning_rate=0.02,
        seed=5,
    )
    before = state_of(net), {name: state_of(other) for name, other in finetuned.items()}
    result = adamerging.merge(net, finetuned, tasks=tasks, method=method, progress=False)
    taus = parameter_task_vectors(net, list(finetuned.values()))
    if kind == "plus":
        taus = {n: t for n, t in ties_in_loops(taus, 0.2).items() if any(bool(tau.any()) for tau in t)}
    expected, lam, _ = by_hand(
        net, taus, tasks, rate=0.02, clamp=preset == "official", task_wise=kind == "task-wise", seed=5
    )
    assert_state(result.model(), expected, rtol=1e-3, atol=2e-4)
    facts_agree(result.facts, lam, 1e-3)
    assert max(abs(value - 0.3).max().item() for value in lam.values()) > 0.05, "λ hardly moved"
    # buffers are the pretrained ones, and nothing that came in was changed
    assert all(torch.equal(result.model().state_dict()[n], b) for n, b in net.named_buffers())
    after = state_of(net), {name: state_of(other) for name, other in finetuned.items()}
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert all(torch.equal(before[1][t][n], after[1][t][n]) for t in before[1] for n in before[1][t])


def clamped_problem() -> tuple[nn.Module, dict[str, nn.Module], dict[str, Task]]:
    net = conv_net()
    return net, *problem(net)


def test_the_clamp_masks_the_gradient_and_keeps_the_momentum(tmp_path: Path) -> None:
    """A learning rate that drives λ over both ends: the raw value goes on by its momentum, what is used stays."""
    net, finetuned, tasks = clamped_problem()
    # exact, for a large rate makes much of little
    for module in (net, *finetuned.values()):
        module.double()
    for k, task in enumerate(tasks.values()):
        with torch.random.fork_rng():
            torch.manual_seed(k)
            task.head = nn.Linear(8, 5, dtype=torch.float64)
    taus = parameter_task_vectors(net, list(finetuned.values()))
    steps, rate = 8, 0.3
    expected, used, history = by_hand(net, taus, tasks, rate=rate, clamp=True, steps=steps)
    raw = torch.cat(list(history[-1].values()))
    assert bool((raw > 1).any()) and bool((raw < 0).any()), "the rate is too small for the test"
    outside = torch.stack([torch.cat(list(h.values())) for h in history])
    both = ((outside[:-1] > 1) & (outside[1:] != outside[:-1])).any()
    assert bool(both), "nothing moved outside by its momentum"
    method = adamerging.settings(steps=steps, batch_size=4, learning_rate=rate, checkpoint_every=3)
    result = adamerging.merge(net, finetuned, tasks=tasks, method=method, folder=tmp_path, progress=False)
    facts_agree(result.facts, used)
    assert_state(result.model(), expected)
    saved = read_tensors(tmp_path / "checkpoint.safetensors")
    for name, value in history[-1].items():
        torch.testing.assert_close(saved[f"parameter.lam.{name}"], value, rtol=1e-6, atol=1e-6)
    # the presets differ in just that
    free = adamerging.merge(
        net, finetuned, tasks=tasks, method=method.model_copy(update={"clamp_lambda": False}), progress=False
    )
    assert max(max(row) for row in free.facts["lambda"].values()) > 1


def test_going_on_after_an_interruption_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, finetuned, tasks = clamped_problem()
    method = adamerging.settings(steps=8, batch_size=4, learning_rate=0.3, checkpoint_every=100, plus=True, density=0.5)

    def run(**how: Any) -> dict[str, Tensor]:
        merged = adamerging.merge(net, finetuned, tasks=tasks, method=method, progress=False, **how)
        return state_of(merged.model())

    whole = run()
    step = Learner.step
    monkeypatch.setattr(Learner, "step", stopping_at(5, step))
    with pytest.raises(Interrupted):
        run(folder=tmp_path)
    monkeypatch.setattr(Learner, "step", step)
    resumed = run(folder=tmp_path, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # and once more from the end: nothing is left to do
    finished = run(folder=tmp_path, resume=True)
    assert all(torch.equal(whole[name], finished[name]) for name in whole)


def stopping_at(last: int, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that Ctrl-C comes in the middle of."""

    def stop(self: Any, number: int, batch: Any) -> Any:
        outcome = step(self, number, batch)
        if number == last:
            import signal

            signal.raise_signal(signal.SIGINT)
        return outcome

    return stop


def test_other_settings_become_adamergings(tiny_vit: nn.Module) -> None:
    finetuned, tasks = problem(tiny_vit)
    pareto = MethodSettings.model_validate({"steps": 3, "batch_size": 4, "learning_rate": 0.02, "preset": "arxiv-v1"})
    ours = adamerging.merge(tiny_vit, finetuned, tasks=tasks, method=pareto, progress=False)
    plain = adamerging.settings("fusionbench", steps=3, batch_size=4, learning_rate=0.02)
    theirs = adamerging.merge(tiny_vit, finetuned, tasks=tasks, method=plain, progress=False)
    first, second = state_of(ours.model()), state_of(theirs.model())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ours.pareto is None
    assert not ours.preference_aware


def test_plus_starts_at_the_sum_of_ties() -> None:
    net = conv_net()
    finetuned, tasks = problem(net)
    method = adamerging.settings(plus=True, steps=0, density=0.4)
    start = adamerging.merge(net, finetuned, tasks=tasks, method=method, progress=False).model()
    expected = ties.merge(net, finetuned, coefficient=0.3, density=0.4, combine="sum").model()
    assert_state(start, dict(expected.named_parameters()))


def test_preference(tmp_path: Path) -> None:
    net = conv_net()
    finetuned, tasks = problem(net)
    method = adamerging.settings(steps=STEPS, batch_size=4, learning_rate=0.05)
    result = adamerging_preference.merge(net, finetuned, tasks=tasks, method=method, folder=tmp_path, progress=False)
    assert result.preference_aware
    assert result.facts == {"runs": 0, "seconds": 0.0}
    taus = parameter_task_vectors(net, list(finetuned.values()))
    models = {}
    for gamma in ([0.8, 0.2], [0.0, 1.0]):
        models[tuple(gamma)] = result.model(gamma)
        expected, _, _ = by_hand(net, taus, tasks, rate=0.05, clamp=True, gamma=gamma)
        assert_state(models[tuple(gamma)], expected, rtol=1e-3, atol=2e-4)
    assert result.facts["runs"] == 2
    assert result.facts["seconds"] > 0
    assert result.model({"t0": 0.8}) is models[0.8, 0.2], "a preference that is known costs no run"
    assert result.facts["runs"] == 2
    # the equal preference is AdaMerging
    equal = adamerging.merge(net, finetuned, tasks=tasks, method=method, progress=False)
    assert_state(result.model(), state_of(equal.model()), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-1", "0.5-0.5", "0.8-0.2"]
    # in another process: from the checkpoints, and one that is not there from the start
    again = adamerging_preference.merge(
        net, finetuned, tasks=tasks, method=method, folder=tmp_path, resume=True, progress=False
    )
    first, second = state_of(again.model([0.8, 0.2])), state_of(models[0.8, 0.2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    again.model([0.6, 0.4])
    assert (tmp_path / "0.6-0.4").is_dir()


def test_a_task_whose_predictions_are_nan(tmp_path: Path) -> None:
    net = conv_net()
    finetuned, tasks = problem(net)
    tasks["t1"].images.images[:] = torch.nan
    method = adamerging.settings(steps=2, batch_size=4)
    with pytest.raises(TrainingError, match="step 1, task t1"):
        adamerging.merge(net, finetuned, tasks=tasks, method=method, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="tasks: expected images and a head for each of t0, t1; got t0"):
        adamerging.merge(net, finetuned, tasks={"t0": tasks["t0"]}, method=method, progress=False)
