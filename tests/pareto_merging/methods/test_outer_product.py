"""The two outer products against W0 + Σ λ τ + (Aγ)(Bγ)ᵀ and (Aγ)bᵀ written out."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from method_cases import image_tasks, state_of
from torch import Tensor, nn

from pareto_merging.learn.gradient import tensor_norm
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.weight_distance import WeightDistance
from pareto_merging.methods import outer_product
from pareto_merging.model.cores import preference_core
from pareto_merging.model.files import load_folded, load_pareto_set, save_folded, save_pareto_set
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference

# every test here runs twice: with the eager strategy and with the kernels
pytestmark = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]
CORES = ["outer-product", "outer-vector"]
GAMMA = [0.2, 0.5, 0.3]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def term(core: str, A: Tensor, B: Tensor, gamma: Tensor) -> Tensor:
    """The low-rank term entry by entry: A [N, K], B [D, K], gamma [K] -> [N, D]."""
    left = sum(gamma[k] * A[:, k] for k in range(len(gamma)))
    right = sum(gamma[k] * B[:, k] for k in range(len(gamma))) if core == "outer-product" else B[:, 0]
    return left[:, None] * right[None, :]


def merged_by_hand(net: nn.Module, finetuned: list[nn.Module], model: nn.Module, gamma: Tensor) -> dict[str, Tensor]:
    learned = learned_parameters(model)
    core = model.pareto.core
    merged = {}
    for name, base in net.named_parameters():
        value = base.detach()
        if f"lam.{name}" in learned:
            for k, other in enumerate(finetuned):
                value = value + learned[f"lam.{name}"][k] * (other.get_parameter(name).detach() - base.detach())
        if f"A.{name}" in learned:
            value = value + term(core, learned[f"A.{name}"], learned[f"B.{name}"], gamma)
        merged[name] = value
    return merged


def linear_model(core: Any, tasks: int = 3) -> tuple[nn.Linear, list[nn.Module], nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(6, 5)
    finetuned = [noisy_copy(net, k + 1, 0.2) for k in range(tasks)]
    model = parametrize(net, finetuned, rank=7, low_rank="all", core=core, digests=False)
    return net, finetuned, randomize(model, scale=0.5)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("tasks", [1, 3])
def test_forward_and_every_gradient(core: str, tasks: int) -> None:
    net, finetuned, model = linear_model(core, tasks)
    learned = learned_parameters(model)
    assert {name: list(p.shape) for name, p in learned.items()} == {
        "lam.weight": [tasks],
        "lam.bias": [tasks],
        "A.weight": [5, tasks],
        "B.weight": [6, tasks],
    }
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    dy = torch.randn(4, 5, generator=generator)
    gamma = torch.tensor(GAMMA if tasks == 3 else [1.0], requires_grad=True)
    inputs = {"x": x, "gamma": gamma, **learned}
    values = merged_by_hand(net, finetuned, model, gamma)
    expected = x @ values["weight"].t() + values["bias"]
    set_preference(model, gamma)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad((expected * dy).sum(), list(inputs.values()), retain_graph=True)
    ours = torch.autograd.grad((y * dy).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"d{name}: {text}")
    # the merged tensor itself
    weight = torch.autograd.grad(model.weight.square().sum(), list(learned.values()), allow_unused=True)
    by_hand = torch.autograd.grad(values["weight"].square().sum(), list(learned.values()), allow_unused=True)
    for name, a, b in zip(learned, weight, by_hand, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"d{name}: {text}")
    plain = merge(model, gamma.detach())
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain.weight, values["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", CORES)
def test_tensor_norm_and_weight_distance(core: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).double()
    finetuned = [noisy_copy(net, k + 1, 0.2) for k in range(3)]
    model = randomize(parametrize(net, finetuned, low_rank="all", core=core, digests=False), scale=0.5)
    # another than the current preference
    gamma = torch.tensor(GAMMA, dtype=torch.float64)
    learned = learned_parameters(model)
    parameters = list(learned.values())
    values = merged_by_hand(net, finetuned, model, gamma)
    terms = [term(core, learned[f"A.{n}"], learned[f"B.{n}"], gamma) for n in ("0.weight", "1.weight")]
    norm = sum(value.square().sum() for value in terms).sqrt()
    torch.testing.assert_close(tensor_norm(model, gamma), norm)
    distances = [sum((values[n] - p).square().sum() for n, p in other.named_parameters()) for other in finetuned]
    ours = WeightDistance(model).values(gamma)
    torch.testing.assert_close(ours, torch.stack(distances))
    pairs = [("norm", tensor_norm(model, gamma), norm)]
    pairs += [(f"S_{k}", ours[k], value) for k, value in enumerate(distances)]
    for name, a, b in pairs:
        got = torch.autograd.grad(a, parameters, allow_unused=True, retain_graph=True)
        expected = torch.autograd.grad(b, parameters, allow_unused=True, retain_graph=True)
        for parameter, c, d in zip(learned, got, expected, strict=True):
            zero = torch.zeros_like(learned[parameter])
            torch.testing.assert_close(
                zero if c is None else c,
                zero if d is None else d,
                msg=lambda text, name=name, parameter=parameter: f"d{name}/d{parameter}: {text}",
            )


@pytest.mark.parametrize("strategy", ["eager"], indirect=True)
@pytest.mark.parametrize("core", CORES)
def test_models_round_trip(core: Any, tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    finetuned = copies(tiny_vit, 3)
    model = randomize(parametrize(tiny_vit, finetuned, core=core), scale=0.3)
    assert not any(key.rpartition("_")[2] == "G" for key in model.state_dict())
    set_preference(model, GAMMA)
    expected = model(IMAGES)
    truth = copy.deepcopy(tiny_vit)
    values = merged_by_hand(tiny_vit, list(finetuned.values()), model, torch.tensor(GAMMA))
    truth.load_state_dict({k: v.detach() for k, v in values.items()}, strict=False)
    torch.testing.assert_close(expected, truth(IMAGES), rtol=1e-4, atol=1e-5)
    blank = parametrize(tiny_vit, finetuned, core=core)
    set_preference(blank, GAMMA)
    # the run starts at the base, whatever the preference
    base = parametrize(tiny_vit, finetuned, low_rank="none")
    torch.testing.assert_close(blank(IMAGES), base(IMAGES), rtol=1e-5, atol=1e-5)
    blank.load_state_dict(model.state_dict())
    path = tmp_path / "set.safetensors"
    save_pareto_set(model, path)
    save_folded(model, tmp_path / "folded.safetensors")
    others = {
        "state_dict": blank,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "to": copy.deepcopy(model).double().float(),
        "fold": fold(model),
        "file": load_pareto_set(path, tiny_vit, finetuned),
        "folded file": load_folded(tmp_path / "folded.safetensors", copy.deepcopy(tiny_vit)),
    }
    for name, other in others.items():
        set_preference(other, GAMMA)
        for y in (other(IMAGES), merge(other, GAMMA)(IMAGES)):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        set_preference(other, [1.0, 0.0, 0.0])
        assert not torch.allclose(other(IMAGES), expected), f"{name}: the preference changes nothing"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kind", ["self", "key is value", "all differ"])
def test_attention_takes_its_rows(core: Any, kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    model = randomize(parametrize(net, [noisy_copy(net, k + 1) for k in range(3)], core=core, digests=False), scale=0.3)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 4, 8, generator=generator) for _ in range(3))
    if kind == "self":
        key = value = query
    elif kind == "key is value":
        value = key
    set_preference(model, GAMMA)
    plain = merge(model, GAMMA)
    y, expected = model(query, key, value)[0], plain(query, key, value)[0]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    parameters = learned_parameters(model)
    gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    # merged by autograd instead of row by row
    values = {name: getattr(model, name) for name in ("in_proj_weight", "in_proj_bias")}
    values |= {f"out_proj.{name}": getattr(model.out_proj, name) for name in ("weight", "bias")}
    whole = torch.func.functional_call(copy.deepcopy(net), values, (query, key, value), {"need_weights": False})[0]
    others = torch.autograd.grad(whole.square().sum(), list(parameters.values()))
    for name, a, b in zip(parameters, gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("folding", [False, True])
def test_a_preference_per_item_says_so(core: Any, folding: bool, tiny_vit: nn.Module, copies: Copies) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 3), core=core, digests=False)
    model = fold(model) if folding else model
    set_preference(model, torch.tensor([GAMMA] * 3))
    with pytest.raises(ValueError, match=f"preference: expected one for the whole batch with core='{core}', got 3"):
        model(IMAGES)
    set_preference(model, GAMMA)
    assert model(IMAGES).shape == (3, 8)


def test_core_errors() -> None:
    with pytest.raises(
        ValueError, match="core: expected outer-product or outer-vector where there is no G, got 'tensor'"
    ):
        preference_core("tensor", torch.tensor(GAMMA))
    gamma = torch.tensor(GAMMA, dtype=torch.float64)
    torch.testing.assert_close(preference_core("outer-product", gamma) @ gamma, torch.outer(gamma, gamma))


@pytest.mark.parametrize("core", CORES)
def test_training_moves_what_starts_at_zero(core: Any, tiny_vit: nn.Module, copies: Copies) -> None:
    tasks = image_tasks(3)
    method = MethodSettings.model_validate({"steps": 3, "batch_size": 2, "core": core, "tensor_norm": 0.1})
    model = parametrize(tiny_vit, copies(tiny_vit, 3), core=core, digests=False)
    start = {name: p.detach().clone() for name, p in learned_parameters(model).items()}
    assert not any(bool(value.any()) for name, value in start.items() if name.startswith("A."))
    learn_pareto_set(model, tasks, method, progress=False)
    for name, parameter in learned_parameters(model).items():
        assert not torch.equal(parameter, start[name]), name
        if core == "outer-vector" and name.startswith("B."):
            assert torch.equal(parameter[:, 1:], start[name][:, 1:]), f"{name}: b is the first column"


@pytest.mark.parametrize("strategy", ["eager"], indirect=True)
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("core", ["tensor", *CORES])
def test_keeping_a_steps_merged_weights_changes_nothing(
    core: Any, clamp: bool, tiny_vit: nn.Module, copies: Copies
) -> None:
    settings = {"steps": 3, "batch_size": 2, "learning_rate": 0.4, "core": core, "clamp_lambda": clamp}
    method = MethodSettings.model_validate(settings)
    learned = []
    for cache in (True, False):
        model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, core=core, digests=False)
        learn_pareto_set(model, image_tasks(2), method, progress=False, cache=cache)
        learned.append(learned_parameters(model))
    for name, value in learned[0].items():
        torch.testing.assert_close(value, learned[1][name], rtol=1e-3, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
    largest = max(value.detach().abs().max() for name, value in learned[0].items() if name.startswith("lam."))
    assert (largest == 1) == clamp


@pytest.mark.parametrize("strategy", ["eager"], indirect=True)
@pytest.mark.parametrize("variation", [1, 2])
def test_the_method_is_pareto_merging_with_that_core(variation: Any, tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned, tasks = copies(tiny_vit, 2), image_tasks(2)
    method = MethodSettings.model_validate({"steps": 3, "batch_size": 2, "rank": 5, "learning_rate": 0.1})
    result = outer_product.merge(tiny_vit, finetuned, tasks=tasks, variation=variation, method=method, progress=False)
    model = parametrize(tiny_vit, finetuned, core=CORES[variation - 1])
    learn_pareto_set(model, tasks, method, progress=False)
    for gamma in ([0.3, 0.7], [1.0, 0.0]):
        expected = state_of(merge(model, gamma))
        for name, value in state_of(result.model(gamma)).items():
            assert torch.equal(value, expected[name]), name
    assert result.preference_aware
    assert result.pareto is not None
    with pytest.raises(ValueError, match="variation: expected 1 or 2, got 3"):
        outer_product.merge(tiny_vit, finetuned, tasks=tasks, variation=3)  # type: ignore[arg-type]
