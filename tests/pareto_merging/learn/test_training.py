"""The exact gradient, its memory, the loop's guards, and runs that are stopped, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_tensors
from pareto_merging.data.heads import ZeroShotHead
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task
from pareto_merging.errors import TrainingError, UserError
from pareto_merging.learn.gradient import pareto_gradient
from pareto_merging.learn.objectives import cosine_alignment, entropy_terms, scalarize, tensor_norm
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.training import CHECKPOINT_NAME, LOG_NAME, learn_pareto_set
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import preference
from pareto_merging.model.strategy import set_strategy

# those of these tests run twice, with the eager strategy and with the kernels
with_kernels = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def method(**changes: Any) -> MethodSettings:
    return MethodSettings.model_validate(
        {"steps": 4, "batch_size": 6, "rank": 2, "checkpoint_every": 2, "seed": 3, **changes}
    )


def task_set(tasks: int, images: int = 20, dim: int = 8, seed: int = 7) -> dict[str, Task]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{k}": Task(
            TensorImages(torch.randn(images, 3, 8, 8, generator=generator)),
            ZeroShotHead(torch.randn(5, dim, generator=generator), 10.0),
        )
        for k in range(tasks)
    }


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learned_parameters(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scalarization", ["smooth-tchebycheff", "tchebycheff", "linear"])
@pytest.mark.parametrize("extra", [{}, {"cosine": 0.5, "tensor_norm": 0.3}, {"information_maximisation": 0.2}])
def test_gradient_equals_that_of_the_graph_of_all_tasks(
    tiny_vit: nn.Module, copies: Copies, scalarization: str, extra: dict[str, float]
) -> None:
    model = randomize(parametrize(tiny_vit, copies(tiny_vit, 3), rank=2)).double()
    settings = (
        method(scalarization=scalarization, tensor_norm=0.0, **extra)
        if not extra
        else method(scalarization=scalarization, **extra)
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
    _, _, flat = pareto_gradient([objective(task) for task in tasks.values()], parameters, gamma, method())
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


def test_entropy_falls_and_only_the_learned_parameters_move(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = learn_pareto_set(model, task_set(2), method(steps=30, learning_rate=1e-2), progress=False)
    first, last = result.history[0], result.history[-1]
    assert sum(last["entropy"].values()) < sum(first["entropy"].values())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert any(bool(p.any()) for name, p in learned_parameters(model).items() if name.startswith("G."))
    assert [row["step"] for row in result.history] == list(range(1, 31))


def test_settings_reach_the_training(tiny_vit: nn.Module, copies: Copies) -> None:
    def run(**changes: Any) -> dict[str, Tensor]:
        model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
        learn_pareto_set(model, task_set(2), method(**changes), progress=False)
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
    settings = method(steps=1, batch_size=20, preferences_per_step=3)
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
        settings = method(objective="weight-distance", preset=preset, steps=60, learning_rate=1e-2, preference="equal")
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
    learn_pareto_set(model, task_set(2), method(), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.ln_post.training


def test_tasks_must_be_the_models(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(ValueError, match="tasks: expected images and a head for each of t0, t1; got t0, t1, t2"):
        learn_pareto_set(model, task_set(3), method(), progress=False)
    with pytest.raises(ValueError, match="got none"):
        learn_pareto_set(model, None, method(), progress=False)
    # by name, not by position
    tasks = task_set(2)
    learn_pareto_set(model, {"t1": tasks["t1"], "t0": tasks["t0"]}, method(), progress=False)
    other = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(other, tasks, method(), progress=False)
    assert same(learned(model), learned(other))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fused", "streamed"])
def test_a_short_run_with_the_kernels(tiny_vit: nn.Module, copies: Copies, strategy: str) -> None:
    """The same run as with plain PyTorch, to rounding, and the same bits twice; no step cache behind its back."""
    runs = []
    for name in ("eager", strategy, strategy):
        model = randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2))
        set_strategy(model, name)
        result = learn_pareto_set(model, task_set(2), method(steps=3, batch_size=3), progress=False)
        assert result.steps == 3
        runs.append(learned(model))
    plain, first, second = runs
    assert same(first, second)
    for name, value in plain.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=2e-4, msg=name)
    untrained = learned(randomize(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)))
    assert not any(torch.equal(first[name], untrained[name]) for name in untrained if name.split(".")[-1] != "bias")


@with_kernels
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)

    whole = fresh()
    learn_pareto_set(whole, task_set(2), method(steps=7), folder=tmp_path / "whole", progress=False)

    class Stop(Exception):
        pass

    calls: list[int] = []

    def die_in_step_6(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise Stop

    tasks = task_set(2)
    tasks["t0"].head.register_forward_pre_hook(die_in_step_6)
    with pytest.raises(Stop):
        learn_pareto_set(fresh(), tasks, method(steps=7), folder=tmp_path / "cut", progress=False)
    resumed = fresh()
    result = learn_pareto_set(
        resumed, task_set(2), method(steps=7), folder=tmp_path / "cut", resume=True, progress=False
    )
    assert result.resumed_from == 4
    assert [row["step"] for row in result.history] == [5, 6, 7]
    assert same(learned(whole), learned(resumed))
    log = [json.loads(line) for line in (tmp_path / "cut" / LOG_NAME).read_text().splitlines()]
    assert [row["step"] for row in log if "event" not in row] == list(range(1, 8))
    assert {"event": "resumed", "step": 4, "steps": 7, "remaining": 3} in log
    again = fresh()
    done = learn_pareto_set(again, task_set(2), method(steps=7), folder=tmp_path / "cut", resume=True, progress=False)
    assert done.history == []
    assert same(learned(whole), learned(again))


def test_checkpoint_of_other_settings_is_refused(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), method(), folder=tmp_path, progress=False)
    with pytest.raises(UserError, match=r"differs in mu \(0.1, now 0.2\)"):
        learn_pareto_set(model, task_set(2), method(mu=0.2), folder=tmp_path, resume=True, progress=False)
    for other, tasks, message in (
        (parametrize(tiny_vit, copies(tiny_vit, 2), rank=3), task_set(2), r"model: rank \(2, now 3\)"),
        (parametrize(tiny_vit, copies(tiny_vit, 3), rank=2), task_set(3), "task_names"),
        (parametrize(tiny_vit, {"t0": tiny_vit, "t1": copies(tiny_vit, 2)["t1"]}, rank=2), task_set(2), "digests: t0"),
        (parametrize(tiny_vit, copies(tiny_vit, 2), rank=2), task_set(2, seed=8), "heads: t0 .*heads: t1"),
    ):
        with pytest.raises(UserError, match=message):
            learn_pareto_set(other, tasks, method(), folder=tmp_path, resume=True, progress=False)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="expected a safetensors file"):
        learn_pareto_set(model, task_set(2), method(), folder=tmp_path, resume=True, progress=False)


class Poison(nn.Module):
    """A head that turns to NaN from its n-th call on."""

    def __init__(self, head: nn.Module, call: int) -> None:
        super().__init__()
        self.head, self.call, self.calls = head, call, 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        logits = self.head(features)
        return logits * math.nan if self.calls >= self.call else logits


def test_a_nan_in_a_loss_stops_and_keeps_the_last_good_state(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path
) -> None:
    good = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(good, task_set(2), method(steps=2), progress=False)
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    tasks = task_set(2)
    tasks["t1"].head = Poison(tasks["t1"].head, 3)
    with pytest.raises(TrainingError, match="step 3, task t1, the head: its objective is nan") as caught:
        learn_pareto_set(model, tasks, method(steps=6), folder=tmp_path, progress=False)
    assert (caught.value.task, caught.value.step, caught.value.layer) == ("t1", 3, "the head")
    assert same(learned(model), learned(good))
    saved = read_tensors(tmp_path / CHECKPOINT_NAME)
    assert all(torch.equal(saved[f"parameter.{name}"], value) for name, value in learned(good).items())
    assert json.loads((tmp_path / LOG_NAME).read_text().splitlines()[-1])["event"] == "stopped"


def test_a_nan_inside_the_model_names_the_layer(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * math.inf

    model.transformer.resblocks[1].mlp.c_fc.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"step 1, task t0, layer transformer.resblocks.1.mlp.c_fc"):
        learn_pareto_set(model, task_set(2), method(), progress=False)
    broken = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with torch.no_grad():
        broken.transformer.resblocks[0].attn.in_proj_weight_lam[1] = math.nan
    with pytest.raises(TrainingError, match=r"parameter transformer.resblocks.0.attn.in_proj_weight_lam"):
        learn_pareto_set(broken, task_set(2), method(), progress=False)
    tasks = task_set(2)
    tasks["t1"].images.images[:] = math.nan
    with pytest.raises(TrainingError, match="task t1, the images"):
        learn_pareto_set(parametrize(tiny_vit, copies(tiny_vit, 2), rank=2), tasks, method(), progress=False)


def test_a_parameter_that_overflows_is_restored(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    before = learned(model)
    with pytest.raises(TrainingError, match=r"step 1, .*: the parameter is not finite after the update"):
        learn_pareto_set(model, task_set(2), method(learning_rate=1e39), progress=False)
    assert same(before, learned(model))


def test_collapse_is_watched_and_warned_about(tiny_vit: nn.Module, copies: Copies) -> None:
    class OneClass(ZeroShotHead):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features) + torch.tensor([50.0, 0, 0, 0, 0])

    tasks = task_set(2)
    tasks["t1"].head = OneClass(torch.randn(5, 8), 1.0)
    warned: list[str] = []
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    settings = method(steps=25)
    result = learn_pareto_set(model, tasks, settings, progress=False, on_warning=warned.append)
    assert "t1" in result.collapsed
    assert sum("task t1 may be collapsing" in text for text in warned) == 1
    assert result.history[0]["mean_prediction_entropy"]["t1"] < 0.1


STOPPABLE = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from pathlib import Path
    from helpers import noisy_copy
    from open_clip.transformer import VisionTransformer
    from pareto_merging.errors import Interrupted
    from pareto_merging.model.parametrize import learned_parameters, parametrize
    from pareto_merging.learn.training import learn_pareto_set
    from test_training import method, task_set
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=8, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)
    model = parametrize(vit.eval(), {{f"t{{k}}": noisy_copy(vit, k + 1) for k in range(2)}}, rank=2)
    try:
        r = learn_pareto_set(model, task_set(2), method(steps={steps}, checkpoint_every=5), folder=Path({folder!r}),
                             resume=True, progress=False)
        from safetensors.torch import save_file
        end = {{n: p.detach().clone() for n, p in learned_parameters(model).items()}}
        save_file(end, {folder!r} + "/end.safetensors")
    except Interrupted as stop:
        print("interrupted", stop.step, flush=True)
"""


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    code = textwrap.dedent(STOPPABLE).format(tests=str(here.parent), folder=str(folder), steps=steps)
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = folder / LOG_NAME
        if log.exists() and sum('"loss"' in line for line in log.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_or_interrupted_processes_resume_to_the_same_bits(tmp_path: Path, number: signal.Signals) -> None:
    steps = 120
    whole = start(tmp_path / "whole", steps)
    process = start(tmp_path / "cut", steps)
    wait_for_steps(tmp_path / "cut", 12)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert not (tmp_path / "cut" / "end.safetensors").exists(), "the signal came too late to test anything"
    if number != signal.SIGKILL:
        assert "interrupted" in out
    assert not list((tmp_path / "cut").glob("*.tmp"))
    resumed = start(tmp_path / "cut", steps)
    assert resumed.wait(timeout=300) == 0
    assert whole.wait(timeout=300) == 0
    log = [json.loads(line) for line in (tmp_path / "cut" / LOG_NAME).read_text().splitlines()]
    (event,) = [row for row in log if row.get("event") == "resumed"]
    assert 10 <= event["step"] < steps
    assert event["remaining"] == steps - event["step"]
    assert [row["step"] for row in log if "event" not in row] == list(range(1, steps + 1))
    first, second = (read_tensors(tmp_path / name / "end.safetensors") for name in ("whole", "cut"))
    assert same(first, second)


def test_training_in_another_thread_sets_no_signal_handler(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(learn_pareto_set(model, task_set(2), method(), progress=False))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 4
    before = signal.getsignal(signal.SIGINT)
    learn_pareto_set(model, task_set(2), method(), progress=False)
    assert signal.getsignal(signal.SIGINT) is before


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
        learn_pareto_set(model, tasks, method(), progress=False)
        runs.append(learned(model))
    assert same(*runs), "dropout in a head was active"
    assert heads[0][0].training


def test_a_failed_first_update_leaves_no_moments(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(TrainingError, match="not finite after the update"):
        learn_pareto_set(model, task_set(2), method(learning_rate=1e39), folder=tmp_path, progress=False)
    assert not any(name.startswith("exp_avg") for name in read_tensors(tmp_path / CHECKPOINT_NAME))


def test_an_unlearned_lambda_survives_a_resume(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    from pareto_merging.model.learned import get_lambda, set_lambda

    settings = method(learn_lambda=False)
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    set_lambda(model, 0.1)
    learn_pareto_set(model, task_set(2), settings, folder=tmp_path, progress=False)
    again = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(again, task_set(2), settings, folder=tmp_path, resume=True, progress=False)
    assert torch.equal(get_lambda(again), get_lambda(model))
    assert same(learned(again), learned(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: m.pop("step"), "expected a step from 0 to 4, got None"),
        (lambda t, m: m.update(step="9"), "expected a step from 0 to 4, got '9'"),
        (lambda t, m: m.pop("settings"), "expected settings in the header"),
        (lambda t, m: m.update(settings="[]"), "differs in settings"),
        (lambda t, m: t.pop(next(n for n in t if n.startswith("exp_avg_sq"))), "expected exp_avg_sq"),
        (lambda t, m: t[next(iter(t))].fill_(math.nan), "expected finite numbers in"),
        (lambda t, m: m.update(format="else"), "expected a training checkpoint"),
    ],
)
def test_damaged_checkpoints_are_one_clear_error(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path, damage: Callable[[Any, Any], Any], message: str
) -> None:
    from safetensors.torch import save_file

    from pareto_merging.checkpoints.safetensors import read_metadata

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), method(), folder=tmp_path, progress=False)
    path = tmp_path / CHECKPOINT_NAME
    tensors, metadata = read_tensors(path), read_metadata(path)
    del metadata["checksums"]
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        learn_pareto_set(model, task_set(2), method(), folder=tmp_path, resume=True, progress=False)


def test_a_damaged_log_does_not_stop_a_resume(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), method(), folder=tmp_path, progress=False)
    log = tmp_path / LOG_NAME
    log.write_bytes(log.read_bytes() + b'[1]\n{"step": "x"}\n{"step": 3, "a": "\xc3')
    learn_pareto_set(model, task_set(2), method(), folder=str(tmp_path), resume=True, progress=False)  # type: ignore[arg-type]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]


def test_arguments_are_checked(tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(TypeError, match="settings: expected MethodSettings, got dict"):
        learn_pareto_set(model, task_set(2), {}, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tasks: expected a Task for t0, got int"):
        learn_pareto_set(model, {"t0": 1, "t1": 2}, method(), progress=False)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got NoneType"):
        learn_pareto_set(None, task_set(2), method(), progress=False)  # type: ignore[arg-type]
    tasks = task_set(2)
    tasks["t1"].images = []  # type: ignore[assignment]
    with pytest.raises(ValueError, match="tasks: expected images for t1, got none"):
        learn_pareto_set(model, tasks, method(), progress=False)
