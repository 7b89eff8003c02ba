"""The settings: presets, groups, their order in files, and that they cannot contradict a model."""

import json
from typing import Any

import pytest
import torch
from helpers import noisy_copy
from learn_cases import short_run, task_set
from pydantic import ValidationError
from torch import Tensor, nn

from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import (
    LogSettings,
    LossSettings,
    MethodSettings,
    ModelSettings,
    OptimiserSettings,
    SamplingSettings,
    StartSettings,
)
from pareto_merging.model.learned import set_lambda
from pareto_merging.model.parametrize import parametrize

# the keys of config.yaml and of a checkpoint, as they have always stood there
KEYS = [
    *("preset", "objective", "scalarization", "mu", "cosine", "tensor_norm", "preference", "gamma", "concentration"),
    *("preferences_per_step", "information_maximisation", "normalize_distance", "preprocess", "density", "core"),
    *("rank", "low_rank", "init_lambda", "learn_lambda", "clamp_lambda", "granularity", "buffers", "steps"),
    *("batch_size", "learning_rate", "lambda_learning_rate", "betas", "seed", "collapse_threshold", "checkpoint_every"),
    *("temperature", "entropy_weight", "features_weight", "teacher_outputs", "constant_rank", "start", "start_images"),
    *("ridge", "schedule", "warm_up", "few_images", "held_back"),
]
GROUPS = {
    "model": ModelSettings,
    "begin": StartSettings,
    "loss": LossSettings,
    "sampling": SamplingSettings,
    "optimiser": OptimiserSettings,
    "log": LogSettings,
}


def test_presets() -> None:
    icml = MethodSettings.model_validate({})
    assert (icml.preset, icml.cosine, icml.tensor_norm, icml.concentration) == ("icml2025", 0.0, 0.1, 0.1)
    assert (icml.rank, icml.batch_size, icml.learning_rate, icml.betas) == (16, 32, 1e-3, (0.9, 0.999))
    assert (icml.init_lambda, icml.mu, icml.scalarization) == (0.3, 0.1, "smooth-tchebycheff")
    first = MethodSettings.model_validate({"preset": "arxiv-v1"})
    assert (first.cosine, first.tensor_norm, first.concentration) == (0.1, 1.0, 1.0)
    assert MethodSettings.model_validate({"preset": "arxiv-v1", "cosine": 0.5}).cosine == 0.5


def test_steps_of_the_paper() -> None:
    settings = MethodSettings.model_validate({})
    assert [settings.steps_for(k) for k in (1, 2, 5, 8, 20)] == [2000, 2000, 3000, 4000, 4000]
    assert MethodSettings.model_validate({"steps": 7}).steps_for(8) == 7


def test_every_setting_of_the_method_is_documented_and_fixed() -> None:
    assert [name for name, field in MethodSettings.model_fields.items() if not field.description] == []
    with pytest.raises(ValidationError):
        MethodSettings.model_validate({}).rank = 3  # type: ignore[misc]


def test_every_setting_is_in_one_group_and_reads_the_same_there() -> None:
    settings = MethodSettings(rank=4, mu=0.5, concentration=1.0, learning_rate=0.1, checkpoint_every=7)
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(names) == sorted(KEYS) == sorted(MethodSettings.model_fields)
    for group, kind in GROUPS.items():
        view = getattr(settings, group)
        assert type(view) is kind
        for name in kind.model_fields:
            assert getattr(view, name) == getattr(settings, name), name
        with pytest.raises(ValidationError):
            setattr(view, next(iter(kind.model_fields)), 1)
    assert (settings.model.rank, settings.loss.mu, settings.sampling.concentration) == (4, 0.5, 1.0)
    assert (settings.optimiser.learning_rate, settings.log.checkpoint_every) == (0.1, 7)
    assert all(type(vars(MethodSettings)[group]) is type(getattr(MethodSettings, group)) for group in GROUPS)
    changed = settings.model_copy(update={"mu": 0.7})
    assert (changed.mu, changed.loss.mu, settings.loss.mu) == (0.7, 0.7, 0.5)


def test_files_have_the_flat_keys_in_their_order() -> None:
    settings = MethodSettings(rank=4, steps=10, preference="fixed", gamma=(0.5, 0.5))
    assert list(settings.model_dump()) == list(json.loads(settings.model_dump_json())) == KEYS
    assert MethodSettings.model_validate(settings.model_dump()) == settings
    assert MethodSettings.model_validate_json(settings.model_dump_json()) == settings
    assert list(MethodSettings.model_fields) == KEYS
    with pytest.raises(ValidationError) as caught:
        MethodSettings(rank=0, steps=-1, mu=-1, concentration=0)
    assert [error["loc"][0] for error in caught.value.errors()] == ["mu", "concentration", "rank", "steps"]
    some = settings.model_dump(exclude={"mu"}, exclude_none=True)
    assert list(some) == [name for name in KEYS if name not in ("mu", "lambda_learning_rate")]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8))


def pareto(**settings: Any) -> nn.Module:
    net = network()
    copies = {f"t{k}": noisy_copy(net, k + 1) for k in range(2)}
    return parametrize(net, copies, **{"rank": 2, "low_rank": "all", **settings})


@pytest.mark.parametrize(
    ("built", "given", "message"),
    [
        (
            {},
            {"rank": 16, "core": "outer-product"},
            "core is 'outer-product' and the model's 'tensor', rank is 16 and the model's 2",
        ),
        ({}, {"low_rank": "none"}, "low_rank is 'none' and the model's 'all'"),
        ({}, {"init_lambda": 0.4}, "init_lambda is 0.4 and the model's 0.3"),
        ({}, {"granularity": "model"}, "granularity is 'model' and the model's 'tensor'"),
        ({}, {"buffers": "average"}, "buffers is 'average' and the model's 'pretrained'"),
        ({}, {"preprocess": "ties"}, "preprocess is 'ties' and the model's 'none'"),
        ({"preprocess": "ties"}, {"density": 0.5}, "density is 0.5 and the model's 0.2"),
        ({"core": "outer-vector"}, {"core": "tensor"}, "core is 'tensor' and the model's 'outer-vector'"),
        ({"low_rank": "none"}, {"low_rank": "all"}, "low_rank is 'all' and the model's 'none'"),
    ],
)
def test_a_setting_that_contradicts_the_model(built: dict[str, Any], given: dict[str, Any], message: str) -> None:
    settings = MethodSettings.model_validate({"steps": 1, "batch_size": 2, **given})
    with pytest.raises(ValueError, match=f"settings: expected none that contradicts the model, but {message}$"):
        learn_pareto_set(pareto(**built), task_set(2), settings, progress=False)


def double(name: str, taus: Tensor) -> Tensor:
    return 2 * taus


@pytest.mark.parametrize(
    ("built", "given"),
    [
        # what was not given is the model's own affair
        ({"rank": 4, "granularity": "block", "init_lambda": 0.1}, {}),
        ({"core": "outer-product"}, {}),
        # the seed is that of the batches too, and no core has the rank of a setting here
        ({}, {"seed": 5, "rank": 2}),
        ({"core": "outer-product"}, {"core": "outer-product", "rank": 16}),
        ({"low_rank": "none"}, {"low_rank": "none", "rank": 16}),
        ({}, {"density": 0.9}),
        # a function of the user's own has no name that a setting could have
        ({"low_rank": lambda name, module: True}, {"low_rank": "attention"}),
        ({"preprocess": double}, {"preprocess": "ties", "density": 0.3}),
    ],
)
def test_settings_that_do_not(built: dict[str, Any], given: dict[str, Any]) -> None:
    settings = MethodSettings.model_validate({"steps": 1, "batch_size": 2, **given})
    assert learn_pareto_set(pareto(**built), task_set(2), settings, progress=False).steps == 1


def test_lambda_may_have_moved_on_from_where_it_started() -> None:
    model = pareto()
    set_lambda(model, 0.1)
    assert learn_pareto_set(model, task_set(2), short_run(init_lambda=0.3), progress=False).steps == 4


def test_a_rank_contradicts_nothing_where_no_matrix_has_a_low_rank_term() -> None:
    net = nn.Linear(6, 4)
    model = parametrize(net, [noisy_copy(net, 1), noisy_copy(net, 2)])
    settings = MethodSettings.model_validate({"objective": "weight-distance", "steps": 1, "rank": 4})
    assert learn_pareto_set(model, None, settings, progress=False).steps == 1


def test_a_subclass_keeps_its_own_fields_when_it_is_dumped() -> None:
    class Warmer(MethodSettings):
        temperature: float = 2.0

    dumped = Warmer.model_validate({}).model_dump()
    assert dumped == {**MethodSettings.model_validate({}).model_dump(), "temperature": 2.0}


def test_the_expert_preset() -> None:
    expert = MethodSettings.model_validate({"preset": "expert"})
    changed = {
        "preset": "expert",
        "objective": "distillation",
        "scalarization": "linear",
        "tensor_norm": 0.0,
        "preference": "per-item",
        "concentration": 0.3,
        "constant_rank": 32,
        "start": "sequential",
        "steps": 200,
        "learning_rate": 1e-3,
        "lambda_learning_rate": 1e-2,
        "schedule": "cosine",
        "warm_up": 10,
        "few_images": "regularise",
    }
    assert expert.model_dump() == {**MethodSettings.model_validate({}).model_dump(), **changed}
    assert (expert.temperature, expert.ridge, expert.start_images, expert.held_back) == (4.0, 1e-3, 400, 0.0)
    assert MethodSettings.model_validate({"preset": "expert", "constant_rank": 0}).constant_rank == 0
    assert MethodSettings.model_validate_json(expert.model_dump_json()) == expert
    arguments = expert.model_arguments()
    assert arguments["constant_rank"] == 32 and "start" not in arguments


@pytest.mark.parametrize("preset", ["icml2025", "arxiv-v1"])
def test_published_presets_use_nothing_that_is_new(preset: str) -> None:
    settings = MethodSettings.model_validate({"preset": preset})
    new = {
        "temperature": 4.0,
        "entropy_weight": 0.0,
        "features_weight": 0.0,
        "teacher_outputs": "auto",
        "constant_rank": 0,
        "start": "pretrained",
        "start_images": 400,
        "ridge": 1e-3,
        "schedule": "constant",
        "warm_up": 0,
        "few_images": "as-given",
        "held_back": 0.0,
        "objective": "entropy",
        "preference": "dirichlet",
    }
    assert {name: getattr(settings, name) for name in new} == new
    assert settings.for_images(1) is settings


PER_ITEM = {"preference": "per-item", "scalarization": "linear"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "expert", "scalarization": "smooth-tchebycheff"}, "scalarization: expected linear with preference"),
        ({"preset": "expert", "scalarization": "tchebycheff"}, "which nothing else can be written as, got tchebycheff"),
        ({"preference": "per-item"}, "scalarization: expected linear with preference: per-item"),
        ({**PER_ITEM, "cosine": 0.1}, "cosine: expected 0 with preference: per-item, got 0.1"),
        ({**PER_ITEM, "preset": "arxiv-v1"}, "cosine: expected 0 with preference: per-item, got 0.1"),
        ({**PER_ITEM, "core": "outer-product"}, "core: expected tensor with preference: per-item, got outer-product"),
        ({**PER_ITEM, "core": "outer-vector"}, "core: expected tensor with preference: per-item, got outer-vector"),
        ({**PER_ITEM, "objective": "weight-distance"}, "preference: expected another than per-item with the"),
        ({**PER_ITEM, "gamma": (0.5, 0.5)}, "gamma: expected one with preference: fixed, and none without"),
        ({"preset": "expert", "clamp_lambda": True}, "clamp_lambda: expected false where start is a merge"),
        ({"start": "regmean", "clamp_lambda": True}, "clamp_lambda: expected false where start is a merge"),
        ({"held_back": 0.2}, "expected 0 with the objective entropy, which has no teachers to agree with, got 0.2"),
        ({"objective": "weight-distance", "held_back": 0.2}, "expected 0 with the objective weight-distance"),
        ({"held_back": 0.6, "objective": "distillation"}, "less than or equal to 0.5"),
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": float("inf")}, "finite number"),
        ({"constant_rank": -1}, "greater than or equal to 0"),
        ({"ridge": 0}, "greater than 0"),
        ({"start": "average"}, "'pretrained', 'regmean' or 'sequential'"),
    ],
)  # fmt: skip
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MethodSettings.model_validate(given)
    assert message in str(caught.value)


def test_settings_for_few_images() -> None:
    expert = MethodSettings.model_validate({"preset": "expert"})
    assert expert.for_images(128) is expert
    few = expert.for_images(127)
    assert few.learning_rate == pytest.approx(1e-4) and few.lambda_learning_rate == pytest.approx(1e-3)
    assert (few.ridge, few.held_back, few.few_images) == (0.1, 0.2, "as-given")
    assert few.for_images(5) is few, "once"
    assert {name for name in KEYS if getattr(few, name) != getattr(expert, name)} == {
        *("learning_rate", "lambda_learning_rate", "ridge", "held_back", "few_images")
    }
    own = MethodSettings(preset="expert", ridge=1.0, held_back=0.4).for_images(5)
    assert (own.ridge, own.held_back) == (1.0, 0.4)
    without = MethodSettings(few_images="regularise").for_images(5)
    assert without.lambda_learning_rate is None and without.held_back == 0


def test_what_a_start_says_of_a_model() -> None:
    model = pareto()
    settings = MethodSettings(start="regmean", steps=1, rank=2, low_rank="all")
    with pytest.raises(ValueError, match="start is 'regmean' and the model's 'pretrained'"):
        learn_pareto_set(model, task_set(2), settings, progress=False)
    with pytest.raises(ValueError, match="constant_rank is 3 and the model's 0"):
        learn_pareto_set(model, task_set(2), short_run(constant_rank=3), progress=False)
