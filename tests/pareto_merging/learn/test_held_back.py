"""Images held back: how they are split off, the state that is kept, and runs that are stopped on the way."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import learned, same, task_set
from torch import Tensor, nn

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import Task
from pareto_merging.errors import Interrupted, UserError
from pareto_merging.learn import loop
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME, save_checkpoint
from pareto_merging.learn.held_back import BestState, split
from pareto_merging.learn.learner import Learner
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import preference


def settings(**changes: Any) -> MethodSettings:
    given = {"objective": "distillation", "scalarization": "linear", "preference": "per-item", "rank": 2, "steps": 12}
    given |= {"low_rank": "all", "constant_rank": 2, "held_back": 0.25, "checkpoint_every": 2, "batch_size": 5}
    return MethodSettings.model_validate({**given, "learning_rate": 0.03, "tensor_norm": 0.0, **changes})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(192, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x.flatten(1))))


def parts() -> tuple[nn.Module, dict[str, nn.Module]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    copies = {f"t{k}": noisy_copy(net, k + 1, 0.3) for k in range(2)}
    return parametrize(net, copies, rank=2, low_rank="all", constant_rank=2), copies


@pytest.mark.parametrize(
    ("images", "share", "held"),
    [(20, 0.25, 5), (16, 0.2, 3), (3, 0.2, 1), (2, 0.5, 1), (2, 0.01, 1), (1, 0.5, 0), (7, 0.5, 4), (9, 0.0, 0)],
)
def test_sizes(images: int, share: float, held: int) -> None:
    teacher = torch.arange(images, dtype=torch.float32)[:, None]
    task = Task(TensorImages(teacher.clone()), nn.Identity(), teacher)
    learn, kept = split({"a": task, "b": task}, share, seed=3)
    assert set(learn) == {"a", "b"} and (set(kept) == {"a", "b"} if held else not kept)
    for name in ("a", "b"):
        parts = [learn[name], *([kept[name]] if held else [])]
        numbers = [[int(part.images[i][0]) for i in range(len(part.images))] for part in parts]
        assert [len(part) for part in numbers] == [images - held, *([held] if held else [])]
        assert sorted(itertools.chain(*numbers)) == list(range(images)), "each on one side"
        for part, own in zip(parts, numbers, strict=True):
            assert part.teacher.flatten().tolist() == own, "teachers go with their images"


def test_a_split_is_a_function_of_the_seed_and_the_task() -> None:
    def held(seed: int) -> list[list[int]]:
        _, kept = split(task_set(2, images=40), 0.25, seed)
        return [kept[name].images.indices for name in ("t0", "t1")]

    assert held(0) == held(0) != held(1)
    assert held(0)[0] != held(0)[1]
    module = nn.Identity()
    _, kept = split({"a": Task(TensorImages(torch.randn(8, 4)), module, module)}, 0.5, 0)
    assert kept["a"].teacher is module


def agreement(model: nn.Module, tasks: dict[str, Task], copies: dict[str, nn.Module]) -> float:
    """In plain loops: of the equal preference and each task's own, the share of images of the same class."""
    scores = []
    for k, (name, task) in enumerate(tasks.items()):
        for gamma in ([0.5, 0.5], [float(k == 0), float(k == 1)]):
            with preference(model, gamma), torch.no_grad():
                pairs = [
                    (task.head(model(task.images[i][0][None])), task.head(copies[name](task.images[i][0][None])))
                    for i in range(len(task.images))
                ]
            scores.append(100 * sum(int(a.argmax() == b.argmax()) for a, b in pairs) / len(pairs))
    return sum(scores) / len(scores)


def test_the_agreement_is_that_of_plain_loops() -> None:
    model, copies = parts()
    randomize(model)
    tasks, loss = task_set(2, images=30), settings().loss
    for teachers in (copies, {n: tasks[n].head(copies[n](tasks[n].images.images)).detach() for n in copies}):
        given = {name: Task(task.images, task.head, teachers[name]) for name, task in tasks.items()}
        best = BestState(model, given, loss)
        best.look(3)
        assert best.score == pytest.approx(agreement(model, tasks, copies), abs=1e-4) and best.looks == {3: best.score}
    features = BestState(
        model, given := {"t0": Task(tasks["t0"].images, teacher=copies["t0"])}, settings(objective="features").loss
    )
    features.look(0)
    cosines = []
    for gamma in ([0.5, 0.5], [1.0, 0.0]):
        with preference(model, gamma), torch.no_grad():
            images = given["t0"].images.images
            cosines.append(100 * float(torch.cosine_similarity(model(images), copies["t0"](images)).mean()))
    assert features.score == pytest.approx(sum(cosines) / 2, abs=1e-3)


def test_a_teacher_with_dropout_is_asked_in_eval_mode() -> None:
    model, copies = parts()
    tasks, noisy = task_set(2), nn.Sequential(copies["t0"], nn.Dropout(0.9)).train()
    best = BestState(model, {"t0": Task(tasks["t0"].images, tasks["t0"].head, noisy)}, settings().loss)
    best.look(0)
    best.look(1)
    assert best.looks[0] == best.looks[1] and noisy.training


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([5.0, 7.0, 7.0, 6.0], 1),
        ([-80.0, -90.0], 0),
        ([math.nan, -3.0, math.nan], 1),
        ([math.nan], 0),
        ([3.0, math.nan], 0),
    ],
)
def test_the_first_of_the_best_is_kept(monkeypatch: pytest.MonkeyPatch, scores: list[float], step: int) -> None:
    """Also where a cosine is negative, or nothing is a number."""
    model, _ = parts()
    best, states = BestState(model, {}, settings().loss), []
    for number, score in enumerate(scores):
        monkeypatch.setattr(best, "_agreement", lambda score=score: score)
        randomize(model, seed=number)
        states.append(learned(model))
        best.look(number)
    best.put_back()
    assert best.step == step and same(learned(model), states[step])


def test_without_an_image_nothing_is_said_to_agree() -> None:
    best = BestState(parts()[0], {}, settings().loss)
    best.look(0)
    assert best.score == 0.0


def run(folder: Path | None, resume: bool = False, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    model, copies = parts()
    how: dict[str, Any] = {"folder": folder, "resume": resume, "progress": False, "finetuned": copies}
    outcome = learn_pareto_set(model, task_set(2), settings(**changes), **how, on_warning=lambda text: None)
    return learned(model), outcome


def test_the_state_of_best_agreement_is_what_a_run_leaves(tmp_path: Path) -> None:
    """Rates at which it is soon ruined: the last state is not the best."""
    states: dict[int, dict[str, Tensor]] = {}
    look = BestState.look

    def remember(self: BestState, step: int) -> None:
        look(self, step)
        states[step] = learned(self.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestState, "look", remember)
        end, outcome = run(tmp_path, learning_rate=0.5)
    chosen = outcome.chosen
    assert list(chosen["looks"]) == [0, *range(1, 13)]
    assert chosen["agreement"] == max(chosen["looks"].values()) == chosen["looks"][chosen["step"]]
    assert same(end, states[chosen["step"]])
    log = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert {"event": "chosen", **json.loads(json.dumps(chosen))} in log
    (about,) = [row for row in log if row.get("event") == "teachers"]
    assert about["tasks"]["t0"]["images"] == 20 and about["step"] == 0
    assert json.loads(read_metadata(tmp_path / CHECKPOINT_NAME)["best"])["step"] == chosen["step"]
    # at a tenth of the rate the best is another, and not the beginning
    assert run(None, learning_rate=0.01)[1].chosen["step"] > 0


def test_no_image_of_those_held_back_is_learned_from() -> None:
    seen: list[Tensor] = []
    model, copies = parts()
    tasks = task_set(2, images=8)
    handle = model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if torch.is_grad_enabled() else None
    )
    learn_pareto_set(model, tasks, settings(steps=6), finetuned=copies, progress=False, on_warning=lambda text: None)
    handle.remove()
    _, held = split(tasks, 0.25, seed=0)
    images = torch.cat(seen)
    for task in held.values():
        for image, _ in (task.images[i] for i in range(len(task.images))):
            assert not bool((images == image).flatten(1).all(dim=1).any())
    assert len(images) == 6 * 2 * 5


class Stop(Exception):
    pass


@pytest.mark.parametrize(("saved", "steps"), [(2, 12), (12, 12), (8, 23)])
def test_a_run_killed_on_the_way_goes_on_to_the_same_bits(tmp_path: Path, saved: int, steps: int) -> None:
    """Also what was best before, and the steps that were looked at: with 23 steps not all are."""
    whole, expected = run(None, steps=steps, learning_rate=0.3)

    def stop_after(learner: Learner, folder: Path, step: int, best: Any) -> None:
        save_checkpoint(learner, folder, step, best)
        if step == saved:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop_after)
        with pytest.raises(Stop):
            run(tmp_path, steps=steps, learning_rate=0.3)
    end, outcome = run(tmp_path, resume=True, steps=steps, learning_rate=0.3)
    assert outcome.resumed_from == saved
    assert same(end, whole) and outcome.chosen == expected.chosen
    again, done = run(tmp_path, resume=True, steps=steps, learning_rate=0.3)
    assert done.resumed_from == steps and same(again, whole) and done.chosen == expected.chosen


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    import os
    import signal

    whole, expected = run(None)
    step = Learner.step

    def stopped(self: Learner, number: int, batch: Any) -> Any:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stopped)
        with pytest.raises(Interrupted):
            run(tmp_path)
    end, outcome = run(tmp_path, resume=True)
    assert outcome.resumed_from == 5 and same(end, whole) and outcome.chosen == expected.chosen


def damaged(path: Path, change: Any) -> None:
    from safetensors.torch import save_file

    tensors, metadata = read_tensors(path), read_metadata(path)
    del metadata["checksums"]
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.pop(next(n for n in t if n.startswith("best.A."))),
        lambda t, m: t.update({next(n for n in t if n.startswith("best.A.")): torch.zeros(3)}),
        lambda t, m: t[next(n for n in t if n.startswith("best.A."))].fill_(math.nan),
        lambda t, m: m.update(best="null"),
        lambda t, m: m.update(best='{"step": 1, "score": "x", "looks": {}}'),
        lambda t, m: m.update(best='{"step": 1, "score": 1.0, "looks": 5}'),
        lambda t, m: m.pop("best"),
    ],
)
def test_a_best_state_that_is_not_whole_is_looked_for_anew(tmp_path: Path, change: Any) -> None:
    run(tmp_path)
    damaged(tmp_path / CHECKPOINT_NAME, change)
    end, outcome = run(tmp_path, resume=True)
    assert list(outcome.chosen["looks"]) == [12] and outcome.chosen["step"] == 12
    kept = read_tensors(tmp_path / CHECKPOINT_NAME)
    assert all(torch.equal(value, kept[f"parameter.{name}"]) for name, value in end.items())


def test_a_share_of_another_size_is_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=r"differs in held_back \(0.25, now 0.5\)"):
        run(tmp_path, resume=True, held_back=0.5)
