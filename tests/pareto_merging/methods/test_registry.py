"""Every method by its name: on transformers and convolutions, one to three copies, as modules and as state dicts."""

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from helpers import noisy_copy
from method_cases import conv_net, image_tasks, labelled_tasks, state_of
from torch import Tensor, nn

from pareto_merging.learn.settings import MethodSettings
from pareto_merging.methods import FILES, adamerging, pareto, registry, task_arithmetic
from pareto_merging.methods.interface import Choice, Merged, Method, Problem, check_needs
from pareto_merging.methods.registry import METHODS, register

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LEARNED = [name for name, method in METHODS.items() if method.learns or name == "pareto-data-free"]
AWARE = {
    "individual",
    "task-arithmetic-preference",
    "adamerging-preference",
    "pareto-data-free",
    "pareto",
    "pareto++",
    "pareto-closed-form",
    "pareto-expert",
    "outer-product-1",
    "outer-product-2",
}
SMALL: dict[str, dict[str, Any]] = {"fisher": {"images": 3}, "regmean": {"images": 3}}


class Odd(nn.Module):
    """What models may have beside matrices: numbers without a dimension, nothing, integers, ties, unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.integers = nn.Parameter(torch.tensor([2, 3]), requires_grad=False)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 8)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("other", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean(dim=(2, 3))
        return self.out(self.norm(self.second(torch.tanh(self.first(x)))) * self.scale)


def settings(**changes: Any) -> MethodSettings:
    return MethodSettings.model_validate({"steps": 2, "batch_size": 3, "rank": 2, "low_rank": "all", **changes})


def problem(net: nn.Module, count: int, as_states: bool = False, **changes: Any) -> Problem:
    copies = {f"t{k}": noisy_copy(net, k + 1) for k in range(count)}
    tasks = image_tasks(count)
    finetuned = {name: other.state_dict() for name, other in copies.items()} if as_states else copies
    return Problem(net, finetuned, tasks, labelled_tasks(tasks), settings(**changes), progress=False)


def contents(given: Problem) -> list[Tensor]:
    """A copy of everything that comes in."""
    modules = [given.pretrained, *(task.head for task in given.tasks.values())]
    copies = [w.state_dict() if isinstance(w, nn.Module) else w for w in given.finetuned.values()]
    states = [module.state_dict() for module in modules] + copies
    images = [task.images.images for task in (*given.tasks.values(), *given.training.values())]
    return [value.clone() for state in states for value in state.values()] + [image.clone() for image in images]


def flags(given: Problem) -> list[tuple[bool, bool]]:
    modules = [given.pretrained, *(w for w in given.finetuned.values() if isinstance(w, nn.Module))]
    return [(p.requires_grad, p.grad is None) for module in modules for p in module.parameters()] + [
        (inner.training, True) for module in modules for inner in module.modules()
    ]


def run(name: str, given: Problem, **choice: Any) -> Merged:
    return registry.run(name, given, **{**SMALL.get(name, {}), **choice})


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["vit", "conv"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str, kind: str, count: int, tiny_vit: nn.Module) -> None:
    net = tiny_vit if kind == "vit" else conv_net()
    given = problem(net, count, as_states=count == 2)
    before, flags_before = contents(given), flags(given)
    torch.manual_seed(1)
    random = torch.random.get_rng_state()
    result = run(name, given)
    assert isinstance(result, Merged)
    assert result.task_names == tuple(given.finetuned)
    assert result.preference_aware == (name in AWARE)
    gammas: list[Any] = [None, {"t0": 1.0}]
    models = [result.model(gamma) for gamma in gammas]
    for model in models:
        assert type(model) is type(net)
        assert [type(m) for m in model.modules()] == [type(m) for m in net.modules()]
        assert list(model.state_dict()) == list(net.state_dict())
        assert [t.dtype for t in model.state_dict().values()] == [t.dtype for t in net.state_dict().values()]
        with torch.no_grad():
            y = model.eval()(X)
        assert y.shape == (3, 8)
        assert bool(torch.isfinite(y).all())
        shared = {t.data_ptr() for t in net.state_dict().values()}
        assert not shared & {t.data_ptr() for t in model.state_dict().values()}, "shares memory with pretrained"
    assert torch.equal(torch.random.get_rng_state(), random), "the caller's random numbers"
    assert all(torch.equal(a, b) for a, b in zip(before, contents(given), strict=True)), "an input was modified"
    assert flags(given) == flags_before
    # the same seed twice, the same bits
    again = run(name, given)
    for gamma, model in zip(gammas, models, strict=True):
        other = state_of(again.model(gamma))
        assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())
    if result.preference_aware and count > 1 and name not in ("adamerging-preference",):
        states = [state_of(model) for model in models]
        different = any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
        # individual answers the equal preference with the first model
        assert different == (name != "individual")
    if not result.preference_aware:
        assert models[0] is models[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_odd_models(name: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Odd().to(dtype)
    given = problem(net, 2)
    for other in given.finetuned.values():
        # far enough that TIES keeps it
        other.scale.data += 2
    model = run(name, given).model([0.3, 0.7])
    assert model.second.weight is model.first.weight
    assert [t.dtype for t in model.state_dict().values()] == [t.dtype for t in net.state_dict().values()]
    assert torch.equal(model.integers, net.integers)
    assert bool(torch.isfinite(model(X.to(dtype))).all())
    if name not in ("pretrained", "multitask"):
        assert not torch.equal(model.scale, net.scale), "a parameter without a dimension is merged too"


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs(name: str, tiny_vit: nn.Module) -> None:
    method, given = METHODS[name], problem(tiny_vit, 2)
    for field, need, kind in (("tasks", "images", "unlabelled"), ("training", "labels", "labelled")):
        for some in (None, {"t0": getattr(given, field)["t0"]}):
            lacking = "t1" if some else "t0, t1"
            lacks = Problem(
                given.pretrained,
                given.finetuned,
                given.tasks if field != "tasks" else some,
                given.training if field != "training" else some,
                given.method,
                progress=False,
            )
            if method.needs == need:
                expected = f"{field}: expected {kind} images of every task, got none of {lacking}"
                with pytest.raises(ValueError, match=expected):
                    run(name, lacks)
            else:
                check_needs(method, lacks)
    if method.needs == "weights":
        bare = Problem(given.pretrained, given.finetuned, method=given.method, progress=False)
        run(name, bare).model()
    with pytest.raises(KeyError):
        registry.run("averaging", given)


@pytest.mark.parametrize("name", METHODS)
def test_every_choice_is_taken(name: str) -> None:
    """What there is to choose from runs, differs, and starts with what run() takes by itself."""
    given = problem(conv_net(), 3)
    choices = METHODS[name].choices(3, given.method)
    assert len({str(sorted(choice.items())) for choice in choices}) == len(choices)
    # with so few images it may be best not to learn at all, whatever the rates
    fixed = {"few_images": "as-given"} if name in ("pareto-expert", "pareto-closed-form") else {}
    states = [state_of(run(name, given, **choice, **fixed).model([0.6, 0.3, 0.1])) for choice in choices]
    own = state_of(run(name, given, **fixed).model([0.6, 0.3, 0.1]))
    assert all(torch.equal(own[key], states[0][key]) for key in own)
    # a choice of λ's learning rate or of sampling shows in two steps already; TIES's published ones may meet
    for number, state in enumerate(states[1:], start=1):
        assert any(not torch.equal(state[key], own[key]) for key in own), choices[number]


def test_adamerging_takes_its_preset_and_only_some_of_the_configuration() -> None:
    wide = settings(
        steps=None, seed=4, init_lambda=0.2, buffers="average", learning_rate=0.5, cosine=0.3, density=0.7, rank=9
    )
    given = Problem(conv_net(), [conv_net()], method=wide)
    made = adamerging.settings_of(given, {"learning_rate": 0.01}, plus=True)
    assert made == adamerging.settings(
        "official", plus=True, seed=4, init_lambda=0.2, buffers="average", density=0.7, learning_rate=0.01
    )
    assert (made.steps, made.batch_size) == (500, 32)
    given.method = settings(steps=7)
    assert adamerging.settings_of(given, {}, "fusionbench").steps == 7
    given.method = settings(preprocess="dare", density=0.3)
    plus = pareto.settings_of(given, {"density": 0.5}, preprocess="ties")
    assert (plus.preprocess, plus.density, plus.rank) == ("ties", 0.5, 2)


def test_the_names_stand_for_their_methods() -> None:
    given = problem(conv_net(), 2)
    made = {name: run(name, given) for name in LEARNED if name != "multitask"}
    assert list(made["adamerging-task-wise"].facts["lambda"]) == ["model"]
    assert list(made["adamerging"].facts["lambda"]) == [name for name, _ in conv_net().named_parameters()]
    expected = {
        "pareto": ("none", "tensor"),
        "pareto++": ("ties", "tensor"),
        "outer-product-1": ("none", "outer-product"),
        "outer-product-2": ("none", "outer-vector"),
        "pareto-data-free": ("none", "tensor"),
    }
    for name, (preprocess, core) in expected.items():
        state = made[name].pareto.pareto  # type: ignore[union-attr]
        assert (state.settings["preprocess"], state.core) == (preprocess, core), name
    states = {name: state_of(result.model([0.4, 0.6])) for name, result in made.items()}
    for first, second in itertools.combinations(states, 2):
        assert any(not torch.equal(states[first][key], states[second][key]) for key in states[first]), (first, second)


@pytest.mark.parametrize("name", LEARNED)
def test_checkpoints_are_gone_on_from(name: str, tmp_path: Path) -> None:
    """A second run in the same folder gives the same bits; multi-task training keeps none."""
    given = problem(conv_net(), 2)
    given.folder = tmp_path / "run"
    first = state_of(run(name, given).model([0.3, 0.7]))
    kept = sorted(path.name for path in tmp_path.rglob("checkpoint.safetensors"))
    assert len(kept) == (name != "multitask")
    second = state_of(run(name, given).model([0.3, 0.7]))
    assert all(torch.equal(first[key], second[key]) for key in first)
    if kept:
        log = next(tmp_path.rglob("log.jsonl")).read_text()
        assert '"event": "resumed", "step": 2' in log


def halfway(problem: Problem, choice: Choice) -> Merged:
    """W0 + λ/K Σ_k τ_k: a method of one's own, made of two that are there."""
    count = len(problem.task_names)
    merged = task_arithmetic.merge(problem.pretrained, problem.finetuned, coefficient=choice["share"] / count)
    merged.facts["copies"] = count
    return merged


@pytest.fixture
def dummy() -> Iterator[Method]:
    """A method of one's own in the table, for as long as the test lasts."""
    choices = [{"share": 0.5}, {"share": 1.0}]
    yield register(Method("halfway", "Half the way", "weights", halfway, lambda tasks, method: choices))
    del METHODS["halfway"]


def test_a_method_of_ones_own(dummy: Method, tiny_vit: nn.Module) -> None:
    given = problem(tiny_vit, 2)
    result = registry.run("halfway", given, share=1.0)
    assert result.facts == {"copies": 2} and not result.preference_aware
    average = state_of(registry.run("weight-averaging", given).model())
    for name, value in state_of(result.model()).items():
        torch.testing.assert_close(value, average[name])
    with pytest.raises(ValueError, match="method: expected a new name, got 'halfway', which is taken"):
        register(dummy)


def test_compare_runs_a_method_of_ones_own(dummy: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("suite: digits\ntasks: [upright, rotated]\n")
    arguments = ("--methods", "pretrained,halfway", "--effort", 2, "--preferences", "equal", "--quiet")
    assert command_line.run("compare", config, "--out", tmp_path / "out", *arguments) == 0
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(report["methods"]) == ["pretrained", "halfway"]
    assert (report["methods"]["halfway"]["title"], report["methods"]["halfway"]["seeds"]) == (dummy.title, 1)
    stored = json.loads((tmp_path / "out" / "halfway-seed-0.json").read_text())
    assert [row["choice"] for row in stored["candidates"]] == dummy.choices(2, MethodSettings())
    assert dummy.title in (tmp_path / "out" / "compare.md").read_text()
    assert command_line.run("compare", "--list") == 0
    assert dummy.title in capsys.readouterr().out


def test_every_method_of_a_file_is_in_the_table() -> None:
    for file in set(FILES.values()):
        module = importlib.import_module(f"pareto_merging.methods.{file}")
        keys = [method.key for method in getattr(module, "VARIANTS", None) or (module.METHOD,)]
        assert keys == [key for key, other in FILES.items() if other == file], file
