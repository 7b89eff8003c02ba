"""What the fine-tuned models say of images: kept or asked, on disk, and teachers that do not fit."""

import gc
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from learn_cases import learned, same, task_set
from method_cases import conv_net
from torch import Tensor, nn
from torch.utils.data import Dataset

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import NoHead, Task, ZeroShotHead
from pareto_merging.errors import TrainingError, UserError
from pareto_merging.learn import teachers
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.teachers import TEACHERS_NAME, describe_teachers, teacher_outputs, with_teachers
from pareto_merging.model.experts import Expert
from pareto_merging.model.parametrize import parametrize


def settings(**changes: Any) -> MethodSettings:
    given = {"objective": "distillation", "scalarization": "linear", "rank": 2, "steps": 3, "batch_size": 6}
    return MethodSettings.model_validate({**given, "low_rank": "all", "tensor_norm": 0.0, **changes})


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(192, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x.flatten(1))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 8)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


def plain(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def copies_of(net: nn.Module, tasks: int = 2) -> dict[str, nn.Module]:
    return {f"t{k}": noisy_copy(net, k + 1, 0.2).eval() for k in range(tasks)}


def pareto(net: nn.Module, copies: Mapping[str, Any], **how: Any) -> nn.Module:
    return parametrize(net, copies, **{"rank": 2, "low_rank": "all", **how})


def quiet(
    model: nn.Module, tasks: Mapping[str, Task], method: MethodSettings, *args: Any, **how: Any
) -> dict[str, Task]:
    return with_teachers(model, tasks, method, *args, progress=False, **how)


@pytest.mark.parametrize("kind", [Net, Tied, conv_net])
@pytest.mark.parametrize("features_weight", [0.0, 0.5])
def test_what_is_kept_is_what_the_copies_say(kind: Callable[[], nn.Module], features_weight: float) -> None:
    net, tasks = plain(kind), task_set(2)
    copies, method = copies_of(net), settings(features_weight=features_weight)
    found = quiet(pareto(net, copies), tasks, method, copies)
    for name, module in copies.items():
        with torch.no_grad():
            features = module(tasks[name].images.images)
            expected = [tasks[name].head(features), *([features] if features_weight else [])]
        teacher = found[name].teacher
        assert isinstance(teacher, Tensor) and teacher.dtype == torch.float16
        torch.testing.assert_close(teacher, torch.cat(expected, dim=1).half())
        assert tasks[name].teacher is None, "the caller's tasks are theirs"


def test_without_copies_they_are_the_base_and_the_task_vectors() -> None:
    net, tasks = plain(), task_set(2)
    copies = copies_of(net)
    model = randomize(pareto(net, copies, constant_rank=2))
    with_copies, without = (quiet(model, tasks, settings(), given) for given in (copies, None))
    for name in tasks:
        torch.testing.assert_close(with_copies[name].teacher, without[name].teacher, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at_once", ["one", "all"])
def test_kept_or_asked_is_the_same_for_images_that_stay_the_same(at_once: Any) -> None:
    results = []
    for how in ("auto", "cached", "in-step"):
        net = plain()
        copies = copies_of(net)
        model = pareto(net, copies, constant_rank=2)
        before = learned(model)
        method = settings(teacher_outputs=how, preference="per-item")
        run = learn_pareto_set(model, task_set(2), method, finetuned=copies, progress=False, tasks_at_once=at_once)
        assert not same(learned(model), before)
        results.append((learned(model), [row["loss"] for row in run.history]))
    assert same(results[0][0], results[1][0])
    # kept in 16 bits
    assert results[1][1] == pytest.approx(results[2][1], rel=1e-2, abs=1e-4)


class Flipped(Dataset[Tensor]):
    """Turns an image round half of the time, as an augmentation may."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        return image.flip(-1) if float(torch.rand(())) < 0.5 else image


def test_images_that_differ_are_found_out_and_their_teachers_asked() -> None:
    net, tasks = plain(), task_set(2)
    copies = copies_of(net)
    model = pareto(net, copies)
    tasks["t1"] = replace(tasks["t1"], images=Flipped(tasks["t1"].images.images))
    for seed in range(20):
        torch.manual_seed(seed)
        found = quiet(model, tasks, settings(), copies)
        assert isinstance(found["t0"].teacher, Tensor) and isinstance(found["t1"].teacher, Expert)
    run = learn_pareto_set(model, tasks, settings(), finetuned=copies, progress=False)
    assert run.steps == 3
    with pytest.raises(
        ValueError, match=r"images of t1 in every step \(they differ each time they are read\), got none"
    ):
        quiet(model, tasks, settings())
    with pytest.raises(ValueError, match=r"the images of t0 in every step \(teacher_outputs is in-step\), got none"):
        quiet(model, {**tasks, "t1": replace(tasks["t1"], teacher=copies["t1"])}, settings(teacher_outputs="in-step"))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    computed: list[str] = []
    original = teachers.teacher_outputs

    def count(module: nn.Module, task: Task, *args: Any) -> Tensor:
        computed.append("one")
        return original(module, task, *args)

    monkeypatch.setattr(teachers, "teacher_outputs", count)
    return computed


def test_a_folder_keeps_them_for_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, net, tasks = counting(monkeypatch), plain(), task_set(2)
    copies = copies_of(net)
    model = pareto(net, copies)

    def needed(model: nn.Module = model, copies: Any = copies, tasks: Any = tasks, **changes: Any) -> int:
        computed.clear()
        found = quiet(model, tasks, settings(**changes), copies, folder=tmp_path)
        assert all(isinstance(task.teacher, Tensor) for task in found.values())
        return len(computed)

    assert needed() == 2 and needed() == 0
    # nor does what is learned meanwhile matter, or how it is
    assert needed(randomize(pareto(net, copies)), temperature=2.0, learning_rate=0.1) == 0
    path = tmp_path / TEACHERS_NAME
    good = path.read_bytes()
    assert json.loads(read_metadata(path)["identity"])["tasks"]["t0"]["images"] == 20
    assert set(read_tensors(path)) == {"t0", "t1"}
    other = {"t0": copies["t0"], "t1": noisy_copy(net, 9, 0.2).eval()}
    shifted = {name: replace(task, images=TensorImages(task.images.images + 1)) for name, task in tasks.items()}
    scaled = {name: replace(task, head=ZeroShotHead(task.head.weight, 3.0)) for name, task in tasks.items()}
    for change in (
        {"model": pareto(net, other), "copies": other},
        {"tasks": shifted},
        {"tasks": scaled},
        {"tasks": task_set(2, seed=8)},
        {"tasks": task_set(2, images=21)},
        {"features_weight": 0.5},
    ):
        path.write_bytes(good)
        assert needed(**change) == 2, change
        assert needed(**change) == 0, change
    for damage in (b"", good[:-3], good[:40], good[:-2] + bytes([good[-2] ^ 1, good[-1]])):
        path.write_bytes(damage)
        assert needed() == 2
    (tmp_path / TEACHERS_NAME).unlink()


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    from safetensors.torch import save_file

    tensors, metadata = read_tensors(path), read_metadata(path)
    del metadata["checksums"]
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("t1"),
        lambda t: t.update(t1=t["t1"][:-1].clone()),
        lambda t: t.update(t1=t["t1"].int()),
        lambda t: t["t1"].fill_(torch.nan),
    ],
)
def test_what_others_wrote_there_is_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], Any]
) -> None:
    net, tasks, computed = plain(), task_set(2), counting(monkeypatch)
    copies = copies_of(net)
    model = pareto(net, copies)
    first = quiet(model, tasks, settings(), copies, folder=tmp_path)
    rewritten(tmp_path / TEACHERS_NAME, change)
    again = quiet(model, tasks, settings(), copies, folder=tmp_path)
    assert len(computed) == 4
    assert all(torch.equal(first[name].teacher, again[name].teacher) for name in tasks)


def test_a_new_run_asks_again_and_a_resumed_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, net = counting(monkeypatch), plain()
    copies = copies_of(net)

    def run(resume: bool) -> int:
        computed.clear()
        how = {"folder": tmp_path, "resume": resume, "progress": False, "finetuned": copies}
        learn_pareto_set(pareto(net, copies), task_set(2), settings(), **how)
        return len(computed)

    assert [run(False), run(True), run(False)] == [2, 0, 2]


def test_without_digests_nothing_is_kept_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be taken for those of any other models."""
    computed, net = counting(monkeypatch), plain()
    for seed in (1, 2):
        copies = {f"t{k}": noisy_copy(net, 10 * seed + k, 0.2) for k in range(2)}
        model = pareto(net, copies, digests=False)
        found = quiet(model, task_set(2), settings(), copies, folder=tmp_path)
        with torch.no_grad():
            wanted = found["t0"].head(copies["t0"].eval()(found["t0"].images.images)).half()
        torch.testing.assert_close(found["t0"].teacher, wanted)
    assert len(computed) == 4 and not (tmp_path / TEACHERS_NAME).exists()


class Reads(Mapping[str, Tensor]):
    """A fine-tuned model in a file: which tensors are read, and how often."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors, self.reads = dict(module.state_dict()), Counter[str]()
        self.shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_every_tensor_of_a_file_is_read_once_and_only_where_it_is_wanted() -> None:
    net, tasks = plain(Tied), task_set(3)
    files = {name: Reads(module) for name, module in copies_of(net, 3).items()}
    model = pareto(net, files)
    tasks["t2"] = replace(tasks["t2"], teacher=torch.randn(20, 5))
    for one in files.values():
        one.reads.clear()
    found = quiet(model, tasks, settings(), files)
    for name in ("t0", "t1"):
        # of tied tensors one
        assert files[name].reads == {key: 1 for key in files[name].tensors if key != "b.bias"}
    assert not files["t2"].reads and found["t2"].teacher is tasks["t2"].teacher


def test_a_fine_tuned_model_is_not_kept() -> None:
    net, tasks = plain(), task_set(2)
    copies = copies_of(net)
    model = pareto(net, copies)
    alive = weakref.ref(copies["t1"])
    found = quiet(model, tasks, settings(), copies)
    del copies
    gc.collect()
    assert alive() is None and isinstance(found["t1"].teacher, Tensor)


def given(teacher: Any, **changes: Any) -> dict[str, Task]:
    net, tasks = plain(), task_set(2)
    copies = copies_of(net)
    tasks["t1"] = replace(tasks["t1"], teacher=teacher)
    return quiet(pareto(net, copies), tasks, settings(**changes), copies)


def several(x: Tensor) -> Any:
    return x.flatten(1)[:, :8], 1


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (torch.full((20, 5), torch.nan), {}, r"expected finite outputs .* got NaN or inf for image 0 \(20 of 20\)$"),
    (torch.ones(19, 5), {}, r"expected a teacher's outputs \[20, \*\], one row for each image, got \[19, 5\]"),
    (torch.ones(20), {}, r"expected a teacher's outputs \[20, \*\].* got \[20\]"),
    (torch.ones(20, 5).long(), {}, r"got \[20, 5\] torch.int64"),
    # these would broadcast, or fail in the middle of a step
    (torch.ones(20, 1), {}, r"expected a teacher of 5 outputs for an image, .* got \[1\]$"),
    (torch.ones(20, 4), {}, r"expected a teacher of 5 outputs for an image, .* got \[4\]$"),
    (torch.ones(20, 5), {"features_weight": 0.5}, r"expected a teacher of 13 outputs for an image, .* got \[5\]$"),
    (torch.ones(20, 13), {}, r"expected a teacher of 5 outputs"),
    # another width, other images, several outputs
    (plain(lambda: Net(7)), {}, r"expected a teacher of this task's images, got Net: mat1 and mat2 shapes"),
    (plain(lambda: Net(7)), {"objective": "features"}, r"expected a teacher of 8 outputs for an image, .* got \[7\]$"),
    (nn.Linear(5, 8), {}, "expected a teacher of this task's images, got Linear: mat1 and mat2 shapes"),
    (several, {}, "expected a teacher of this task's images, got function: "),
]


@pytest.mark.parametrize(("teacher", "changes", "message"), WRONG, ids=[case[2][:50] for case in WRONG])
def test_a_teacher_that_does_not_fit_is_one_line(teacher: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        given(teacher, **changes)
    text = str(caught.value)
    assert text.startswith("task t1: ") and "\n" not in text
    assert re.search(message, text), text


def test_teachers_of_ones_own_that_fit() -> None:
    module = plain()
    assert given(torch.ones(20, 5))["t1"].teacher.shape == (20, 5)
    assert given(module)["t1"].teacher is module
    assert given(torch.ones(20, 8), objective="features")["t1"].teacher.shape == (20, 8)
    assert module.training


def test_a_fine_tuned_model_that_gives_no_numbers(tmp_path: Path) -> None:
    """Nothing is kept of it, in memory or in a folder; one that is asked in the step is named too."""
    net, copies = plain(), copies_of(plain())
    model = pareto(net, copies)

    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 8), torch.nan)

    bad = {**copies, "t1": {name: torch.full_like(p, torch.inf) for name, p in net.state_dict().items()}}
    with pytest.raises(UserError, match=r"^task t1: expected finite outputs of its fine-tuned model, got NaN or inf"):
        quiet(model, task_set(2), settings(), bad, folder=tmp_path)
    assert not (tmp_path / TEACHERS_NAME).exists()
    tasks = task_set(2)
    tasks["t1"] = replace(tasks["t1"], teacher=Nan())
    before = learned(model)
    with pytest.raises(TrainingError, match=r"step 1, task t1, what its teacher says: its objective is nan"):
        learn_pareto_set(model, tasks, settings(), finetuned=copies, progress=False)
    assert same(learned(model), before)


def test_nan_without_a_head_is_said_too() -> None:
    net = plain()
    copies = copies_of(net)
    model = pareto(net, copies)
    tasks = {name: Task(task.images) for name, task in task_set(2).items()}
    tasks["t0"].images.images[3] = torch.nan
    tasks["t0"].teacher, tasks["t1"].teacher = torch.ones(20, 8), torch.ones(20, 8)
    with pytest.raises(TrainingError, match="task t0, the images: its objective is nan"):
        learn_pareto_set(model, tasks, settings(objective="features", batch_size=20), progress=False)


def test_heads_and_names_and_copies_that_are_lacking() -> None:
    net, tasks = plain(), task_set(2)
    copies = copies_of(net)
    model = pareto(net, copies)
    headless = {name: Task(task.images) for name, task in tasks.items()}
    for method in (settings(), settings(objective="features", entropy_weight=0.1)):
        with pytest.raises(ValueError, match=r"tasks: expected a head for t0.* got none"):
            learn_pareto_set(model, headless, method, finetuned=copies, progress=False)
    found = quiet(model, headless, settings(objective="features"), copies)
    assert found["t0"].teacher.shape == (20, 8) and isinstance(found["t0"].head, NoHead)
    for names in ({"t0", "other"}, {"t0"}, {"t0", "t1", "t2"}):
        with pytest.raises(ValueError, match="tasks: expected images and a head for each of t0, t1; got"):
            learn_pareto_set(model, dict.fromkeys(names, tasks["t0"]), settings(), finetuned=copies, progress=False)
    for wrong, message in (
        ({"t0": copies["t0"]}, "finetuned: expected a copy for every task, got none for t1"),
        ([copies["t0"]], r"finetuned: expected 2 copies \(t0, t1\), got 1"),
        ({**copies, "t1": plain(lambda: Net(7))}, r"t1 has out.weight of shape \[7, 6\], expected \[8, 6\]"),
        ({**copies, "t1": plain(Tied)}, "t1 lacks fc.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_pareto_set(model, tasks, settings(), finetuned=wrong, progress=False)


def test_logits_beyond_16_bits_are_kept_in_32() -> None:
    task = Task(TensorImages(torch.ones(3, 4)), ZeroShotHead(torch.eye(4), 1e6))
    outputs = teacher_outputs(nn.Identity(), task, settings())
    assert outputs.dtype == torch.float32 and float(outputs.max()) > 1e5


def test_what_the_log_says_of_them() -> None:
    said: list[str] = []
    heads, images = ZeroShotHead(torch.randn(5, 8)), TensorImages(torch.randn(40, 8))
    sure = 30 * torch.nn.functional.one_hot(torch.arange(40) % 5, 5).half()
    few = 30 * torch.nn.functional.one_hot(torch.zeros(40).long(), 5).half()
    tasks = {
        "sure": Task(images, heads, sure),
        "unsure": Task(images, heads, torch.zeros(40, 5).half()),
        "few": Task(images, heads, few),
        "asked": Task(images, heads, nn.Identity()),
    }
    (event,) = describe_teachers(tasks, settings(), said.append)
    assert event["event"] == "teachers" and list(event["tasks"]) == list(tasks)
    assert event["tasks"]["sure"] == {
        "images": 40,
        "outputs": "cached",
        "bytes": 400,
        "classes": 5,
        "entropy": 0.0,
        "mean_prediction_entropy": 1.6094,
    }
    assert event["tasks"]["asked"] == {"images": 40, "outputs": "in-step"}
    assert [text.partition(":")[0] for text in said] == ["task unsure", "task few"]
    assert "unsure of these images (entropy 1.61 of at most 1.61); are they this task's?" in said[0]
    assert "few classes (entropy of its mean prediction 0.00 of at most 1.61); are they this task's?" in said[1]
    json.dumps(event)
