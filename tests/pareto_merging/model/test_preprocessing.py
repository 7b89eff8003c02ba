"""Trimming, sign election and dropping, against sorting, a hand-worked example and counting."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import noisy_copy, randomize
from method_cases import parameter_task_vectors, ties_in_loops
from torch import Tensor, nn

from pareto_merging.errors import UserError
from pareto_merging.model import pieces
from pareto_merging.model.files import load_folded, load_pareto_set, save_folded, save_pareto_set
from pareto_merging.model.fold import fold, merge
from pareto_merging.model.parameters import part_name
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.preprocessing import Dare, Ties, check_density, elect_sign, make_preprocess, trim_threshold
from pareto_merging.model.state import set_preference

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


def in_pieces(vector: Tensor, size: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(vector.split(size))


def largest(vector: Tensor, density: float) -> float:
    """The k-th largest magnitude by sorting, k = ⌊density·n⌋ and at least 1."""
    k = max(1, math.floor(density * len(vector)))
    return vector.abs().sort(descending=True).values[k - 1].item()


def vectors(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator, dtype=dtype)
    wide = normal * torch.exp(10 * torch.randn(size, generator=generator, dtype=dtype))
    tiny = torch.finfo(dtype).tiny
    ends = torch.tensor([torch.finfo(dtype).max, tiny], dtype=dtype)
    return {
        "normal": normal,
        "many magnitudes": wide,
        "ties": (4 * normal).round() / 4,
        "all equal": torch.full((size,), -0.375, dtype=dtype),
        "mostly zero": normal * (normal > 1.2),
        "all zero": torch.zeros(size, dtype=dtype) * -1,
        "denormal": normal * tiny * 1e-3,
        "negative": -normal.abs(),
        # they share their upper bits, so that only the last count tells them apart
        "neighbours": (1 + torch.finfo(dtype).eps * torch.randperm(size, generator=generator).to(dtype)),
        "largest and smallest": torch.where(normal > 0, ends[0], ends[1]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 127, 1000, 4099])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 1e-9])
def test_threshold_is_the_kth_largest_magnitude(size: int, density: float, dtype: torch.dtype) -> None:
    for name, vector in vectors(size, dtype).items():
        for piece in (size, 64, max(1, size // 3)):
            found = trim_threshold(in_pieces(vector, piece), density)
            assert found == largest(vector, density), (name, piece)
            assert math.copysign(1, found) == 1, name


def test_threshold_of_nothing_and_of_mixed_types() -> None:
    assert trim_threshold(lambda: iter(()), 0.5) == 0.0
    assert trim_threshold(in_pieces(torch.zeros(0), 3), 0.5) == 0.0
    single, double = torch.tensor([0.1, 3.0]), torch.tensor([0.1, 2.0], dtype=torch.float64)
    values = sorted([*single.double().tolist(), *double.tolist()], reverse=True)
    for k in range(1, 5):
        assert trim_threshold(lambda: iter((single, double)), k / 4) == values[k - 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_threshold_of_what_is_not_finite(bad: float) -> None:
    vector = torch.ones(100)
    vector[77] = bad
    with pytest.raises(ValueError, match="expected finite numbers in MNIST minus pretrained, got NaN or inf"):
        trim_threshold(in_pieces(vector, 10), 0.2, "MNIST")


def worked_example() -> Tensor:
    """Three tasks of five entries; with density 0.6 each keeps its largest three.

    trimmed:  task 1   3  −2   0   1   0
              task 2  −1   0   2  −1   0      (0.5 and 0.2 go)
              task 3  −4   0   1   0   6
    sum               −2  −2   3   0   6
    """
    return torch.tensor(
        [[3.0, -2.0, 0.5, 1.0, -0.1], [-1.0, 0.5, 2.0, -1.0, 0.2], [-4.0, -0.5, 1.0, 0.2, 6.0]], dtype=torch.float32
    )


TRIMMED = [[3.0, -2, 0, 1, 0], [-1, 0, 2, -1, 0], [-4, 0, 1, 0, 6]]
ELECTED = [-1.0, -1, 1, 0, 1]
KEPT = [[0.0, -2, 0, 0, 0], [-1, 0, 2, 0, 0], [-4, 0, 1, 0, 6]]


def test_ties_by_hand() -> None:
    taus = worked_example()
    base = [(["weight"], torch.zeros(5)), (["count"], torch.zeros(2, dtype=torch.int64))]
    copies = {f"t{k}": {"weight": tau, "count": torch.tensor([7, 8])} for k, tau in enumerate(taus)}
    ties = Ties.of(base, copies, 0.6)
    assert ties.thresholds == (1.0, 1.0, 1.0)
    assert ties.trim(taus).tolist() == TRIMMED
    assert elect_sign(ties.trim(taus)).tolist() == ELECTED
    assert ties("weight", taus).tolist() == KEPT
    # of any shape, and of none
    assert ties("weight", taus.view(3, 5, 1)).view(3, 5).tolist() == KEPT
    assert ties("weight", taus[:, 0]).tolist() == [0.0, -1.0, -4.0]
    assert ties("weight", taus.double()).dtype == torch.float64


def test_ties_trims_over_the_whole_model_and_not_tensor_by_tensor() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    copies = {"a": noisy_copy(net, 1, 1.0), "b": noisy_copy(net, 2, 0.01)}
    with torch.no_grad():
        copies["a"][0].weight.add_(100.0)
    states = {name: copy.state_dict() for name, copy in copies.items()}
    base = [([name], tensor) for name, tensor in net.state_dict().items()]
    ties = Ties.of(base, states, 0.3)
    for k, state in enumerate(states.values()):
        flat = torch.cat([(state[name] - tensor).reshape(-1) for (name,), tensor in base])
        assert ties.thresholds[k] == largest(flat, 0.3)
    # 13 of 43, and there are 20 that were moved far
    bias = torch.stack([state["0.bias"] - net[0].bias.detach() for state in states.values()])
    assert not bool(ties.trim(bias)[0].any())
    assert bool(ties.trim(bias)[1].any())


def test_the_entry_at_the_threshold_is_kept_whatever_the_types() -> None:
    """In a mixture of types a difference may round to another number in float32 than in float64."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, generator=generator)
    # of other magnitudes than the base, or the differences would be exact
    first = 100 * torch.randn(50, generator=generator)
    second = 100 * torch.randn(50, generator=generator, dtype=torch.float64)
    net = nn.Linear(50, 1, bias=False)
    net.weight.data = base[None]
    copies = {"first": {"weight": first[None]}, "second": {"weight": second[None]}}
    seen: list[Tensor] = []
    parametrize(net, copies, low_rank="none", preprocess=lambda name, taus: seen.append(taus.clone()) or taus)
    for density in (0.02, 0.1, 0.2, 0.3, 0.5, 0.7):
        ties = Ties.of([(["weight"], net.weight)], copies, density)
        kept = (ties.trim(seen[0]) != 0).sum(dim=(1, 2))
        assert kept.tolist() == [int(density * 50)] * 2


@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3))
    states = {f"t{k}": noisy_copy(net, k).state_dict() for k in range(3)}
    base = [([name], tensor) for name, tensor in net.state_dict().items()]
    taus = torch.randn(3, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = Ties.of(base, states, 0.2).thresholds, Dare(0.4, 5)("w", taus)
    monkeypatch.setattr(pieces, "CHUNK", size)
    assert Ties.of(base, states, 0.2).thresholds == expected[0]
    assert torch.equal(Dare(0.4, 5)("w", taus), expected[1])


def test_dare_keeps_a_share_and_the_expectation() -> None:
    taus = torch.ones(3, 200, 100)
    for density in (0.1, 0.5, 0.9):
        kept = Dare(density, 1)("w", taus)
        assert set(kept.unique().tolist()) == {0.0, (torch.tensor(1.0) / density).item()}
        # six standard deviations of a mean of 20,000 draws
        slack = 6 * math.sqrt(density * (1 - density) / 20_000)
        for task in range(3):
            assert (kept[task] != 0).double().mean().item() == pytest.approx(density, abs=slack)
            assert kept[task].double().mean().item() == pytest.approx(1, abs=slack / density)
    assert torch.equal(Dare(1.0)("w", taus), taus)
    noise = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    kept = Dare(0.3)("w", noise)
    torch.testing.assert_close(kept[kept != 0], (noise / 0.3)[kept != 0])


def test_dare_draws_anew_for_every_task_name_and_seed_only() -> None:
    taus = torch.ones(2, 50, 20)
    first = Dare(0.5, 0)("w", taus)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(Dare(0.5, 0)("w", taus), first)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    others = {
        "task": (first[0], first[1]),
        "name": (first[0], Dare(0.5, 0)("v", taus)[0]),
        "seed": (first[0], Dare(0.5, 1)("w", taus)[0]),
        "a far seed": (first[0], Dare(0.5, 2**32)("w", taus)[0]),
        "place": (first[0][:25], first[0][25:]),
    }
    for name, (a, b) in others.items():
        same = (a == b).double().mean().item()
        assert same == pytest.approx(0.5, abs=6 * 0.5 / math.sqrt(a.numel())), name
    # a transposed layout gets the same draws, and its numbers are written
    turned = torch.ones(20, 50, 2).permute(2, 1, 0)
    assert torch.equal(Dare(0.5, 0)("w", turned), first)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan, True, "0.2", None])
def test_densities_out_of_range(density: Any, tiny_vit: nn.Module, copies: Copies) -> None:
    for attempt in (
        lambda: check_density(density),
        lambda: Dare(density),
        lambda: Ties.of([], {}, density),
        lambda: parametrize(tiny_vit, copies(tiny_vit, 1), density=density, digests=False),
    ):
        with pytest.raises(ValueError, match=r"density: expected a share of the entries in \(0, 1\], got"):
            attempt()
    assert check_density(1) == 1.0


def test_unknown_names(tiny_vit: nn.Module, copies: Copies) -> None:
    assert make_preprocess("none", 0.2, 0, [], {}) is None
    for attempt in (
        lambda: make_preprocess("tie", 0.2, 0, [], {}),
        lambda: parametrize(tiny_vit, copies(tiny_vit, 1), preprocess="tie", digests=False),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="preprocess: expected none, ties, dare or a function, got 'tie'"):
            attempt()
    with pytest.raises(ValueError, match="core: expected tensor, outer-product, outer-vector, got 'outer'"):
        parametrize(tiny_vit, copies(tiny_vit, 1), core="outer", digests=False)  # type: ignore[arg-type]


# in a Pareto model


def task_vectors(model: nn.Module, names: list[str]) -> dict[str, Tensor | None]:
    """As they are stored, None where there are none; a module that has none at all is a plain one."""
    found: dict[str, Tensor | None] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found[name] = model.get_submodule(owner)._parameters.get(part_name(attribute, "task_vectors"))
    return found


def float_task_vectors(pretrained: nn.Module, finetuned: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Differences in float32, [K, *shape] by name, as they are handed to a preprocessing."""
    wide = [copy.deepcopy(other).float() for other in (pretrained, *finetuned.values())]
    return {name: torch.stack(taus) for name, taus in parameter_task_vectors(wide[0], wide[1:]).items()}


def trimmed_and_elected(taus: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    return {
        name: torch.stack(kept) for name, kept in ties_in_loops({n: list(t) for n, t in taus.items()}, density).items()
    }


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_pareto_model_of_ties_task_vectors(tasks: int, tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, tasks)
    model = parametrize(tiny_vit, finetuned, rank=2, preprocess="ties", density=0.2)
    taus = float_task_vectors(tiny_vit, finetuned)
    expected = trimmed_and_elected(taus, 0.2)
    found = task_vectors(model, list(expected))
    for name, value in expected.items():
        if found[name] is None:
            assert not bool(value.any()), name
        else:
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    merged = merge(model, [1 / tasks] * tasks)
    for name, base in tiny_vit.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), base + 0.3 * expected[name].sum(dim=0))


def test_16_bit_models_are_compared_before_they_are_rounded(copies: Copies) -> None:
    """float16 numbers whose differences are not: rounded first, more of them would reach the threshold."""
    net = nn.Linear(40, 30).half()
    with torch.no_grad():
        net.weight.copy_(torch.randn(30, 40, generator=torch.Generator().manual_seed(0)))
    finetuned = {f"t{k}": noisy_copy(net, k + 1, 0.3) for k in range(2)}
    seen = {}

    def look(name: str, taus: Tensor) -> Tensor:
        seen[name] = taus
        return taus

    parametrize(net, finetuned, low_rank="none", preprocess=look)
    assert {name: (value.dtype, list(value.shape)) for name, value in seen.items()} == {
        "weight": (torch.float32, [2, 30, 40]),
        "bias": (torch.float32, [2, 30]),
    }
    taus = float_task_vectors(net, finetuned)
    assert all(torch.equal(seen[name], value) for name, value in taus.items())
    assert not torch.equal(taus["weight"], taus["weight"].half().float())
    model = parametrize(net, finetuned, low_rank="none", preprocess="ties", density=0.35)
    expected = trimmed_and_elected(taus, 0.35)
    for name, value in task_vectors(model, list(expected)).items():
        assert value.dtype == torch.float16
        assert torch.equal(value, expected[name].half()), name


def test_a_preprocessing_of_ones_own(tiny_vit: nn.Module, copies: Copies) -> None:
    finetuned = copies(tiny_vit, 2)
    taus = float_task_vectors(tiny_vit, finetuned)
    # an expanded result must not leave one memory for two tasks
    model = parametrize(tiny_vit, finetuned, rank=2, preprocess=lambda n, t: t.mean(dim=0, keepdim=True).expand_as(t))
    for name, value in task_vectors(model, list(taus)).items():
        torch.testing.assert_close(value, taus[name].mean(dim=0).expand_as(value))
        assert value.is_contiguous()
    again = parametrize(tiny_vit, finetuned, rank=2, preprocess=lambda n, t: torch.zeros_like(t))
    assert all(value is None for value in task_vectors(again, list(taus)).values())
    again = parametrize(tiny_vit, finetuned, rank=2, preprocess=lambda n, t: t.double().requires_grad_())
    assert all(v.dtype == torch.float32 and v.is_leaf for v in task_vectors(again, list(taus)).values())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n, t: t[0], r"preprocess: expected task vectors of shape \[2, .*\] for \w.*, got \["),
        (lambda n, t: None, "got NoneType"),
        (lambda n, t: t / 0, "preprocess: expected finite task vectors for .*, got NaN or inf"),
    ],
)
def test_wrong_preprocessings(function: Any, message: str, tiny_vit: nn.Module, copies: Copies) -> None:
    with pytest.raises(ValueError, match=message):
        parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, preprocess=function)


def test_what_overflows_the_models_type_is_an_error() -> None:
    net = nn.Linear(4, 4).half()
    with pytest.raises(ValueError, match="expected finite task vectors for weight, got NaN or inf"):
        parametrize(net, [noisy_copy(net, 1)], low_rank="none", preprocess=lambda n, t: t * 1e8)


def halve(name: str, taus: Tensor) -> Tensor:
    return taus / 2


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("core", ["tensor", "outer-product", "outer-vector"])
@pytest.mark.parametrize("preprocess", ["ties", "dare", halve])
@pytest.mark.parametrize("tasks", [1, 3])
def test_files_of_preprocessed_models(
    preprocess: Any, core: Any, tasks: int, tiny_vit: nn.Module, copies: Copies, tmp_path: Path
) -> None:
    finetuned = copies(tiny_vit, tasks)
    model = randomize(
        parametrize(tiny_vit, finetuned, rank=2, preprocess=preprocess, density=0.4, core=core, seed=3), scale=0.3
    )
    gamma = [0.7, 0.2, 0.1] if tasks == 3 else [1.0]
    set_preference(model, gamma)
    expected = model(IMAGES)
    path = tmp_path / "set.safetensors"
    save_pareto_set(model, path)
    own = preprocess if callable(preprocess) else None
    loaded = load_pareto_set(path, tiny_vit, finetuned, preprocess=own)
    set_preference(loaded, gamma)
    assert torch.equal(loaded(IMAGES), expected)
    assert loaded.pareto.settings == model.pareto.settings
    assert loaded.pareto.core == core
    save_folded(model, tmp_path / "folded.safetensors")
    from_file = load_folded(tmp_path / "folded.safetensors", noisy_copy(tiny_vit, 9))
    for other in (fold(model), fold(loaded), from_file):
        set_preference(other, gamma)
        torch.testing.assert_close(other(IMAGES), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merge(other, gamma)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(model, gamma)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="as preprocess, got"):
        load_pareto_set(path, tiny_vit, finetuned, preprocess=None if own else halve)
