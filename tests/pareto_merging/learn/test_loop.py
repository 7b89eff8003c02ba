"""The loop: what a run changes, what reaches it, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize
from learn_cases import learned, same, short_run, task_set
from torch import Tensor, nn

from pareto_merging.data.tasks import Task, ZeroShotHead
from pareto_merging.errors import TrainingError
from pareto_merging.learn.entropy import entropy_terms
from pareto_merging.learn.gradient import pareto_gradient, tensor_norm
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import preference
from pareto_merging.model.strategy import set_strategy

# those of these tests run twice, with the eager strategy and with the kernels
with_kernels = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def test_entropy_falls_and_only_the_learned_parameters_move(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = learn_pareto_set(model, task_set(2), short_run(steps=30, learning_rate=1e-2), progress=False)
    first, last = result.history[0], result.history[-1]
    assert sum(last["entropy"].values()) < sum(first["entropy"].values())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert any(bool(p.any()) for name, p in learned_parameters(model).items() if name.startswith("G."))
    assert [row["step"] for row in result.history] == list(range(1, 31))


def test_settings_reach_the_training(tiny_vit: nn.Module, copies: Copies) -> None:
    def run(**changes: Any) -> dict[str, Tensor]:
        model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
        learn_pareto_set(model, task_set(2), short_run(**changes), progress=False)
        return learned(model)

    plain = run()
    assert same(plain, run())
    for change in (
        {"seed": 4},
        {"mu": 0.5},
        {"cosine": 1.0},
        {"tensor_norm": 5.0},
        {"concentration": 1.0},
        {"preference": "equal"},
        {"preferences_per_step": 2},
        {"information_maximisation": 1.0},
        {"learning_rate": 1e-2},
        {"lambda_learning_rate": 1e-2},
        {"betas": (0.5, 0.9)},
        {"batch_size": 5},
        {"scalarization": "linear"},
        {"scalarization": "tchebycheff"},
        {"preset": "arxiv-v1"},
    ):
        assert not same(plain, run(**change)), change
    fixed = run(learn_lambda=False)
    assert all(torch.equal(v, torch.full_like(v, 0.3)) for name, v in fixed.items() if name.startswith("lam."))
    assert not same(plain, fixed)


def test_several_preferences_average_their_gradients(
    tiny_vit: nn.Module, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Tensor] = []

    def record(optimizer: torch.optim.Adam, *args: Any) -> None:
        used.append(torch.cat([p.grad.reshape(-1) for group in optimizer.param_groups for p in group["params"]]))

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    settings = short_run(steps=1, batch_size=20, preferences_per_step=3)
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2))
    tasks = task_set(2)
    result = learn_pareto_set(model, tasks, settings, progress=False)
    gammas = result.history[0]["gamma"]
    assert len({tuple(gamma) for gamma in gammas}) == 3
    learned_ones = learned_parameters(model)
    # the optimiser's order: λ, then the low-rank parts
    parameters = sorted(learned_ones, key=lambda name: not name.startswith("lam."))
    expected = []
    for gamma in map(torch.tensor, gammas):
        objectives = [lambda t=task: entropy_terms(t.head(model(t.images.images))) for task in tasks.values()]
        with preference(model, gamma):
            _, _, flat = pareto_gradient(
                objectives,
                [learned_ones[n] for n in parameters],
                gamma,
                settings,
                lambda g=gamma: tensor_norm(model, g),
            )
        expected.append(flat)
    torch.testing.assert_close(used[0], torch.stack(expected).mean(dim=0), rtol=1e-3, atol=1e-5)


@with_kernels
def test_data_free_training_needs_no_images_and_gets_closer(tiny_vit: nn.Module, copies: Copies) -> None:
    for preset in ("icml2025", "arxiv-v1"):
        model = parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)
        settings = short_run(
            objective="weight-distance", preset=preset, steps=60, learning_rate=1e-2, preference="equal"
        )
        result = learn_pareto_set(model, None, settings, progress=False)
        assert sum(result.history[-1]["objective"].values()) < sum(result.history[0]["objective"].values())
        assert "entropy" not in result.history[0]


def test_mode_and_random_state_are_the_callers(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    model.train()
    model.ln_post.eval()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    learn_pareto_set(model, task_set(2), short_run(), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.ln_post.training


def test_tasks_must_be_the_models(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(ValueError, match="tasks: expected images and a head for each of t0, t1; got t0, t1, t2"):
        learn_pareto_set(model, task_set(3), short_run(), progress=False)
    with pytest.raises(ValueError, match="got none"):
        learn_pareto_set(model, None, short_run(), progress=False)
    # by name, not by position
    tasks = task_set(2)
    learn_pareto_set(model, {"t1": tasks["t1"], "t0": tasks["t0"]}, short_run(), progress=False)
    other = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(other, tasks, short_run(), progress=False)
    assert same(learned(model), learned(other))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fused", "streamed"])
def test_a_short_run_with_the_kernels(tiny_vit: nn.Module, copies: Copies, strategy: str) -> None:
    """The same run as with plain PyTorch, to rounding, and the same bits twice; no step cache behind its back."""
    runs = []
    for name in ("eager", strategy, strategy):
        model = randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2))
        set_strategy(model, name)
        result = learn_pareto_set(model, task_set(2), short_run(steps=3, batch_size=3), progress=False)
        assert result.steps == 3
        runs.append(learned(model))
    plain, first, second = runs
    assert same(first, second)
    for name, value in plain.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=2e-4, msg=name)
    untrained = learned(randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)))
    assert not any(torch.equal(first[name], untrained[name]) for name in untrained if name.split(".")[-1] != "bias")


def test_a_parameter_that_overflows_is_restored(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    before = learned(model)
    with pytest.raises(TrainingError, match=r"step 1, .*: the parameter is not finite after the update"):
        learn_pareto_set(model, task_set(2), short_run(learning_rate=1e39), progress=False)
    assert same(before, learned(model))


def test_heads_are_in_eval_mode_and_integer_inputs_stay_integers(copies: Copies) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embed(tokens).mean(dim=1))

    class Ids(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(index, index + 3) % 11

    pretrained = Tokens()
    heads = [nn.Sequential(nn.Dropout(0.5), ZeroShotHead(torch.randn(5, 8), 10.0)).train() for _ in range(2)]
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = parametrize(pretrained, copies(pretrained, 2), rank=2, low_rank="all")
        tasks = {f"t{k}": Task(Ids(), heads[k]) for k in range(2)}
        learn_pareto_set(model, tasks, short_run(), progress=False)
        runs.append(learned(model))
    assert same(*runs), "dropout in a head was active"
    assert heads[0][0].training


def test_arguments_are_checked(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(TypeError, match="settings: expected MethodSettings, got dict"):
        learn_pareto_set(model, task_set(2), {}, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tasks: expected a Task for t0, got int"):
        learn_pareto_set(model, {"t0": 1, "t1": 2}, short_run(), progress=False)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got NoneType"):
        learn_pareto_set(None, task_set(2), short_run(), progress=False)  # type: ignore[arg-type]
    tasks = task_set(2)
    tasks["t1"].images = []  # type: ignore[assignment]
    with pytest.raises(ValueError, match="tasks: expected images for t1, got none"):
        learn_pareto_set(model, tasks, short_run(), progress=False)
