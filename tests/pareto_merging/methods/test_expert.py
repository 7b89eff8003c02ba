"""Expert-guided Pareto Merging as a method: its settings for a problem, and what it learns."""

from typing import Any

import pytest
import torch
from helpers import noisy_copy
from learn_cases import learned, same
from method_cases import image_tasks
from torch import Tensor, nn
from torch.utils.data import Subset

import pareto_merging as pm
from pareto_merging.data import digits
from pareto_merging.data.tasks import Task
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import adamerging, expert, pareto
from pareto_merging.methods.interface import Problem
from pareto_merging.methods.registry import METHODS
from pareto_merging.model.state import pareto_state
from pareto_merging.run.config import RunConfig
from pareto_merging.run.workspace import Workspace


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
    return net, {f"t{k}": noisy_copy(net, k + 1, 0.4) for k in range(2)}


def short(**changes: Any) -> MethodSettings:
    return expert.settings(**{"steps": 6, "batch_size": 8, "rank": 2, "low_rank": "all", "constant_rank": 2, **changes})


def agreement(merged: Any, copies: dict[str, nn.Module], tasks: Any) -> float:
    scores = []
    for k, (name, task) in enumerate(tasks.items()):
        model = merged.model([float(k == 0), float(k == 1)])
        with torch.no_grad():
            one, two = (task.head(m(task.images.images)).argmax(1) for m in (model, copies[name]))
        scores.append(float((one == two).double().mean()))
    return sum(scores) / len(scores)


def test_the_preset_is_the_default() -> None:
    assert expert.settings() == MethodSettings.model_validate({"preset": "expert"})
    assert METHODS["pareto-expert"].title == "Pareto Merging, expert-guided"
    choices = METHODS["pareto-expert"].choices(3, expert.settings())
    assert choices[0] == {} and all(expert.settings(**choice) for choice in choices)


@pytest.mark.parametrize("start", ["pretrained", "regmean", "sequential"])
def test_it_learns_to_say_what_the_experts_say(start: str) -> None:
    net, copies = parts()
    tasks = image_tasks(2, images=130)
    merged = expert.merge(net, copies, tasks=tasks, method=short(start=start, steps=30, batch_size=32), progress=False)
    assert merged.preference_aware and merged.pareto is not None
    assert pareto_state(merged.pareto).start == start
    assert ("start" in merged.facts) == (start == "sequential") and "chosen" not in merged.facts
    before = pareto.merge(net, copies, tasks=tasks, method=MethodSettings(steps=0, rank=2), progress=False)
    assert agreement(merged, copies, tasks) > agreement(before, copies, tasks)
    folded = pm.fold(merged.pareto)
    with torch.no_grad(), pm.preference(folded, [0.2, 0.8]):
        images = tasks["t0"].images.images
        torch.testing.assert_close(folded(images), merged.model([0.2, 0.8])(images), rtol=1e-4, atol=1e-5)


def test_no_step_is_the_closed_form() -> None:
    net, copies = parts()
    tasks = image_tasks(2, images=130)
    merged = expert.merge(net, copies, tasks=tasks, method=short(steps=0), progress=False)
    again = expert.merge(net, copies, tasks=tasks, method=short(steps=0), progress=False)
    assert same(learned(merged.pareto), learned(again.pareto))
    assert pareto_state(merged.pareto).start == "sequential"


def test_rates_that_undo_the_start_are_said() -> None:
    net, copies = parts()
    tasks = image_tasks(2, images=130)
    said: list[str] = []
    fast = {"learning_rate": 3.0, "lambda_learning_rate": 3.0, "warm_up": 0, "schedule": "constant"}
    for changes in ({}, fast):
        method = short(steps=40, batch_size=32, **changes)
        expert.merge(net, copies, tasks=tasks, method=method, progress=False, on_warning=said.append)
        assert bool([text for text in said if "the agreement with the fine-tuned models has fallen from" in text]) == (
            changes == fast
        )


def test_closed_form_among_few_images_chooses_its_ridge() -> None:
    net, copies = parts()
    few = Problem(net, copies, method=MethodSettings(rank=2), tasks=image_tasks(2, images=20), progress=False)
    many = Problem(net, copies, method=MethodSettings(rank=2), tasks=image_tasks(2, images=130), progress=False)
    closed = METHODS["pareto-closed-form"]
    facts = closed.run(few, {}).facts["start"]
    assert set(facts["tried"]) == {"0.03", "0.1", "0.3", "1"} and facts["ridge"] >= 0.03
    assert facts["all images"] and set(facts["images"].values()) == {20}
    result = closed.run(many, {})
    assert "tried" not in result.facts["start"] and result.facts["start"]["ridge"] == 1e-3
    # what merge_sequential solves, and no constant term
    own = pm.merge_sequential(net, copies, tasks=many.tasks, rank=2, progress=False).model([0.3, 0.7]).state_dict()
    for name, value in result.model([0.3, 0.7]).state_dict().items():
        torch.testing.assert_close(value, own[name])
    assert result.pareto is not None and not [n for n, _ in result.pareto.named_parameters() if n.endswith("A_c")]


def test_closed_form_of_tasks_without_a_head() -> None:
    net, copies = parts()
    tasks = {name: Task(task.images) for name, task in image_tasks(2, images=20).items()}
    problem = Problem(net, copies, method=MethodSettings(rank=2), tasks=tasks, progress=False)
    result = METHODS["pareto-closed-form"].run(problem, {})
    assert result.preference_aware and set(result.facts["start"]["tried"]) == {"0.03", "0.1", "0.3", "1"}


def test_few_images_are_held_back_and_the_facts_say_so() -> None:
    net, copies = parts()
    merged = expert.merge(net, copies, tasks=image_tasks(2, images=20), method=short(), progress=False)
    assert set(merged.facts["chosen"]) == {"step", "agreement", "looks"}


def test_settings_for_a_problem() -> None:
    net, copies = parts()

    def problem(**changes: Any) -> Problem:
        return Problem(net, copies, image_tasks(2), method=MethodSettings.model_validate(changes))

    # a configuration of published settings: the preset, with what any method can be told
    found = expert.settings_of(problem(seed=7, rank=3, mu=0.5, tensor_norm=0.3), {})
    assert found == expert.settings(seed=7, rank=3)
    # one of this preset: as it is, and a choice on top
    own = {"preset": "expert", "constant_rank": 5, "temperature": 2.0}
    assert expert.settings_of(problem(**own), {"concentration": 1.0}) == expert.settings(
        constant_rank=5, temperature=2.0, concentration=1.0
    )
    # the published method is the published one, whatever the configuration's own run is
    for given in ({"preset": "expert", "steps": 9}, {"objective": "distillation", "held_back": 0.2, "steps": 9}):
        published = pareto.settings_of(problem(**given), {})
        assert published == MethodSettings(steps=9), given
    assert pareto.settings_of(problem(preset="arxiv-v1", mu=0.2), {}) == MethodSettings(preset="arxiv-v1", mu=0.2)


def test_adamerging_can_have_the_same_objective() -> None:
    """And nothing else of it: λ alone, at the equal preference, from the pretrained weights."""
    assert METHODS["adamerging-expert"].title == "AdaMerging, expert-guided"
    method = adamerging.settings(objective="distillation", steps=4, batch_size=8)
    assert (method.objective, method.constant_rank, method.start, method.low_rank) == (
        "distillation",
        0,
        "pretrained",
        "none",
    )
    net, copies = parts()
    tasks = image_tasks(2, images=20)
    learned_of = {}
    for name, given in (
        ("entropy", adamerging.settings(steps=4, batch_size=8)),
        ("expert", method),
        ("preset", short(steps=4)),
    ):
        merged = adamerging.merge(net, copies, tasks=tasks, method=given, progress=False)
        assert set(merged.facts) <= {"lambda", "chosen"}
        learned_of[name] = merged.facts["lambda"]
        one, two = (merged.model(gamma).state_dict() for gamma in ([1.0, 0.0], [0.0, 1.0]))
        assert same(one, two)
    assert learned_of["entropy"] != learned_of["expert"]
    assert adamerging.settings(objective="weight-distance").objective == "entropy"


def test_a_few_steps_do_not_undo_the_start() -> None:
    """Adam's first steps are as large as any: at full rates a constant term on every matrix is thrown off by three."""
    workspace = Workspace(RunConfig.model_validate({"suite": "digits", "tasks": ["upright", "rotated"]}))
    given = workspace.pretrained(), {name: dict(weights) for name, weights in workspace.finetuned().items()}
    tasks = {name: Task(Subset(task.images, range(130)), task.head) for name, task in workspace.merging_tasks().items()}
    images, labels = digits.images("upright", "evaluation")
    right = {}
    for steps in (0, 3):
        method = expert.settings(steps=steps, rank=2, batch_size=8)
        model = expert.merge(*given, tasks=tasks, method=method, progress=False).model({"upright": 1.0})
        logits = tasks["upright"].head(model.eval()(images))
        right[steps] = float((logits.argmax(dim=-1) == labels).float().mean())
    assert right[0] > 0.9 and right[3] > right[0] - 0.05
