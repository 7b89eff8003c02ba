"""What each part of the expert-guided method gives: the lines, what they alter, and a run with a few steps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import run, tables
from benchmarks.suites import digits as study
from benchmarks.suites import expert
from pareto_merging.data import digits
from pareto_merging.learn.distillation import Outputs
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.run.config import RunConfig
from pareto_merging.run.workspace import Workspace

TASKS = [expert.WRONG_TASK, expert.OTHER_TASK]


def settings(case: expert.Case) -> MethodSettings:
    return MethodSettings.model_validate({"preset": "expert", **case.changes})


@pytest.fixture
def objectives() -> Iterator[None]:
    """The suite's own objectives are in the table, and gone after the test."""
    expert._register()
    yield
    for name in expert.DIVERGENCES:
        OBJECTIVES.pop(name)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite whose encoders were trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "PRETRAINING", {**digits.PRETRAINING, "steps": 2})
        patch.setattr(digits, "FINETUNING", {**digits.FINETUNING, "steps": 2})
        folder = tmp_path_factory.mktemp("encoders")
        digits.make(folder, seed=7)
    return folder


def altered(encoders: Path, case: expert.Case) -> expert.Altered:
    config = RunConfig.model_validate({"suite": "digits", "tasks": TASKS})
    return expert.Altered(Workspace(config, encoders), case)


@pytest.mark.usefixtures("objectives")
def test_every_line_changes_the_preset_as_it_says() -> None:
    preset = MethodSettings.model_validate({"preset": "expert"})
    for case in expert.CASES:
        if case.method == "pareto-expert":
            same = not case.changes or case.name in ("rank 16", "200 steps")
            assert (settings(case) == preset) == same, case.name
    names = [(case.part, case.name) for case in expert.CASES]
    assert len(set(names)) == len(names)


def test_ladder_begins_with_the_published_method_and_ends_with_the_preset() -> None:
    first, *between, last = [case for case in expert.CASES if case.part == "ladder"]
    published = MethodSettings.model_validate(study.METHOD)
    of_experts = {"temperature", "few_images", "start_images", "ridge", "held_back", "steps"}
    differing = {
        name
        for name, value in settings(first).model_dump(exclude={"preset"}).items()
        if value != published.model_dump().get(name)
    }
    assert differing <= of_experts, differing
    assert not last.changes
    assert len({json.dumps(settings(case).model_dump()) for case in (first, *between, last)}) == len(between) + 2


def test_lines_that_are_the_same_run_share_a_file_and_no_others_do() -> None:
    plain = expert.Case("a", "b")
    assert plain.file == expert.Case("c", "d", images=400, suite="digits").file
    others = [
        expert.Case("a", "b", "pareto"),
        expert.Case("a", "b", changes={"rank": 2}),
        expert.Case("a", "b", tasks=2),
        expert.Case("a", "b", images=16),
        expert.Case("a", "b", suite="width 24"),
        expert.Case("a", "b", wrong=expert.CHANCE),
        expert.Case("a", "b", whole=True),
    ]
    assert len({case.file for case in (plain, *others)}) == len(others) + 1


def test_few_images_are_the_first_ones(encoders: Path) -> None:
    whole = altered(encoders, expert.Case("", "")).available_merging_tasks()
    few = altered(encoders, expert.Case("", "", images=16)).available_merging_tasks()
    for name, task in few.items():
        assert len(task.images) == 16  # type: ignore[arg-type]
        for at in range(16):
            torch.testing.assert_close(task.images[at][0], whole[name].images[at][0])


def test_wrong_teacher_is_at_chance_and_no_other_weight_changes(encoders: Path) -> None:
    right = altered(encoders, expert.Case("", "")).finetuned()
    wrong = altered(encoders, expert.Case("", "", wrong=expert.CHANCE)).finetuned()
    apart = [
        (task, name)
        for task, weights in right.items()
        for name, weight in weights.items()
        if not torch.equal(weight, wrong[task][name])
    ]
    assert apart == [(expert.WRONG_TASK, "proj")]
    shuffled, own = wrong[expert.WRONG_TASK]["proj"], right[expert.WRONG_TASK]["proj"]
    torch.testing.assert_close(shuffled.flatten().sort().values, own.flatten().sort().values)


def test_another_tasks_images_come_with_the_own_head(encoders: Path) -> None:
    right = altered(encoders, expert.Case("", "")).available_merging_tasks()
    wrong = altered(encoders, expert.Case("", "", wrong=expert.FOREIGN)).available_merging_tasks()
    for task in TASKS:
        assert torch.equal(wrong[task].images[0][0], right[expert.OTHER_TASK].images[0][0])
    x = torch.randn(2, digits.ENCODER["output_dim"], generator=torch.Generator().manual_seed(0))
    heads = [tasks[expert.WRONG_TASK].head for tasks in (right, wrong)]
    assert heads[0] is not None and heads[1] is not None
    torch.testing.assert_close(heads[0](x), heads[1](x))


@pytest.mark.usefixtures("objectives")
def test_divergences_against_plain_sums() -> None:
    logits, teacher = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    temperature = 3.0
    p = torch.softmax(logits / temperature, dim=1).detach()
    q = torch.softmax(teacher / temperature, dim=1)
    expected = {
        "reverse-kl": sum(
            temperature**2 * p[i, c] * (p[i, c].log() - q[i, c].log()) for i in range(5) for c in range(4)
        )
        / 5,
        "hard-labels": sum(-torch.log_softmax(logits[i].detach(), dim=0)[int(teacher[i].argmax())] for i in range(5))
        / 5,
    }
    for name, value in expected.items():
        chosen = MethodSettings.model_validate({"objective": name, "temperature": temperature})
        objective = OBJECTIVES[name](torch.nn.Identity(), {}, chosen)
        terms = objective.terms(0, Outputs(logits, None), teacher)
        torch.testing.assert_close(terms.objective.detach(), torch.as_tensor(value))
        (gradient,) = torch.autograd.grad(terms.objective, logits)
        assert gradient.abs().sum() > 0
        agreement = (logits.argmax(dim=1) == teacher.argmax(dim=1)).double().mean()
        torch.testing.assert_close(terms.watched[0].double(), agreement)


@pytest.mark.slow
def test_quick_run_writes_a_whole_report_and_goes_on_from_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoders: Path
) -> None:
    # in this process: what the fixture trained is what it finds
    work, out = tmp_path / "work", tmp_path / "result.json"
    for name in ("suite", "width-48", "width-24"):
        (work / "seed-7" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "seed-7" / name).symlink_to(encoders)
    (encoders / "done").touch()
    arguments = ["--suite", "expert", "--seeds", "7", "--quick", "--work", str(work), "--out", str(out)]
    assert run.main(arguments) == 0
    report = json.loads(out.read_text())
    ranks, ablations, images = (report["parts"][part] for part in ("ranks", "ablations", "images"))
    assert list(ranks) == ["rank 2"] and list(ablations) == ["closed form alone"]
    assert ranks["rank 2"]["folded"] > 1 and len(ranks["rank 2"]["per_task"]) == 2
    assert "| rank 2 |" in expert.ranks_markdown(report)
    assert "| closed form alone |" in expert.ablations_markdown(report)
    assert list(images) == ["16: RegMean"] and "| 16: RegMean |" in expert.images_markdown(report)
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("quick-expert/*.json")}
    assert len(kept) == 3
    assert run.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in work.rglob("quick-expert/*.json")} == kept
    again = json.loads(out.read_text())
    assert again["parts"] == report["parts"]


def test_committed_results_have_every_line() -> None:
    path = tables.newest("expert")
    assert path is not None
    report = json.loads(path.read_text())
    assert len(report["seeds"]) >= 2 and not report["quick"]
    for case in expert.CASES:
        figures = report["parts"][case.part][case.name]
        assert "reasons" not in figures, case.name
        assert len(figures["one_hot"]["values"]) == len(report["seeds"]), case.name
