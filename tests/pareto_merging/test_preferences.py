"""What a preference may be, how it is set, sampled and laid out."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import noisy_copy, randomize
from torch import nn

import pareto_merging.preferences as preferences
from pareto_merging.model.fold import merge
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import get_preference, preference, set_preference
from pareto_merging.preferences import (
    check_preference,
    dirichlet,
    energy,
    equal_preference,
    lattice,
    one_hot_preferences,
    parse_preference,
    parse_preferences,
    priority_preferences,
    sample_dirichlet,
    two_task_grid,
)

NAMES = ("MNIST", "DTD", "Cars")


def small_model() -> nn.Module:
    plain = nn.Linear(4, 3)
    copies = {name: noisy_copy(plain, k) for k, name in enumerate(NAMES)}
    return randomize(parametrize(plain, copies, rank=2, low_rank="all"))


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([0.5, 0.5], r"expected shape \[3\] or \[batch, 3\], one weight for each of MNIST, DTD, Cars; got \[2\]"),
        ([0.5, 0.6, 0.0], "expected a sum of 1, got 1.1"),
        ([0.5, 0.5, 0.0002], "expected a sum of 1"),
        ([1.5, -0.5, 0.0], "expected non-negative numbers"),
        ([math.nan, 0.5, 0.5], "expected finite numbers"),
        ([math.inf, 0.5, 0.5], "expected finite numbers"),
        ([[0.2, 0.3, 0.5], [0.2, 0.3, 0.4]], "expected a sum of 1, got 0.9"),
        (torch.zeros(2, 2, 3), "expected shape"),
        ({"MNIST": 0.5, "SVHN": 0.5}, "expected task names among MNIST, DTD, Cars; got SVHN"),
        ({"MNIST": 0.9, "DTD": 0.2}, "expected a sum of at most 1, got 1.1"),
        ({"MNIST": 0.2, "DTD": 0.2, "Cars": 0.2}, "expected a sum of 1, got 0.6"),
        ({"MNIST": -0.5}, "expected non-negative numbers"),
        ("equal", "expected 3 numbers"),
        (0.5, "expected shape"),
    ],
)
def test_what_is_off_the_simplex_is_refused_and_nothing_changes(gamma: object, message: str) -> None:
    model = small_model()
    set_preference(model, [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match=message):
        set_preference(model, gamma)  # type: ignore[arg-type]
    assert get_preference(model) == pytest.approx({"MNIST": 0.2, "DTD": 0.3, "Cars": 0.5})


def test_nothing_is_normalised() -> None:
    within = torch.tensor([0.5, 0.5, 0.00005])
    assert torch.equal(check_preference(within, NAMES), within)


def test_by_name_the_rest_is_shared_out() -> None:
    assert check_preference({"DTD": 1}, NAMES).tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(check_preference({"DTD": 0.6}, NAMES), torch.tensor([0.2, 0.6, 0.2]))
    torch.testing.assert_close(check_preference({"Cars": 0.5, "MNIST": 0.25, "DTD": 0.25}, NAMES)[2], torch.tensor(0.5))


def test_parse() -> None:
    assert parse_preference(" 0.2, 0.3,0.5 ", NAMES).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert parse_preference("DTD=0.6", NAMES).tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert parse_preference("equal", NAMES).tolist() == pytest.approx([1 / 3] * 3)
    for text in ("", "a,b,c", "0.2,0.8", "DTD=x", "DTD=0.2,DTD=0.8", "DTD=0.5,0.5,0"):
        with pytest.raises(ValueError, match="preference: expected"):
            parse_preference(text, NAMES)


def test_default_is_equal_and_the_context_manager_restores() -> None:
    model = small_model()
    x = torch.randn(2, 4)
    assert get_preference(model) == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    y = model(x)
    with preference(model, {"MNIST": 1}):
        torch.testing.assert_close(model(x), merge(model, [1, 0, 0])(x))
        with preference(model, [0, 0, 1]):
            torch.testing.assert_close(model(x), merge(model, [0, 0, 1])(x))
        torch.testing.assert_close(model(x), merge(model, [1, 0, 0])(x))
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="inside"), preference(model, [0, 1, 0]):
        raise RuntimeError("inside")
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="preference: expected"), preference(model, [0, 1]):
        pass
    assert torch.equal(model(x), y)


def test_set_preference_copies_and_leaves_earlier_graphs_alone() -> None:
    model = small_model()
    gamma = torch.tensor([0.2, 0.3, 0.5])
    set_preference(model, gamma)
    y = model(torch.ones(1, 4)).sum()
    gamma.zero_()
    assert get_preference(model)["Cars"] == 0.5
    set_preference(model, [1, 0, 0])
    y.backward()


def test_gradient_of_the_preference() -> None:
    model = small_model()
    gamma = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    set_preference(model, gamma)
    x = torch.randn(2, 4)
    (grad,) = torch.autograd.grad(model(x).sum(), gamma)
    expected = [float((x @ model.B @ model.G[:, :, k].T @ model.A.T).detach().sum()) for k in range(3)]
    assert grad.tolist() == pytest.approx(expected, rel=1e-4)
    merge(model, gamma)


def test_a_plain_model_is_refused() -> None:
    for function in (lambda m: set_preference(m, [1.0]), get_preference, lambda m: merge(m, [1.0])):
        with pytest.raises(ValueError, match="model: expected"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("concentration", [0.01, 0.1, 1.0, 10.0])
def test_dirichlet_has_the_right_moments_and_never_fails(concentration: float) -> None:
    rng = np.random.default_rng(0)
    samples = torch.stack([sample_dirichlet(concentration, 8, rng) for _ in range(4000)])
    assert bool(torch.isfinite(samples).all())
    torch.testing.assert_close(samples.sum(dim=1), torch.ones(4000))
    variance = (1 / 8) * (7 / 8) / (8 * concentration + 1)
    assert samples.mean(dim=0).tolist() == pytest.approx([1 / 8] * 8, abs=6 * (variance / 4000) ** 0.5)
    assert samples.var(dim=0).mean() == pytest.approx(variance, rel=0.1)
    assert torch.equal(
        sample_dirichlet(concentration, 8, np.random.default_rng(3)),
        sample_dirichlet(concentration, 8, np.random.default_rng(3)),
    )


def test_grids() -> None:
    assert one_hot_preferences(2).tolist() == [[1, 0], [0, 1]]
    grid = two_task_grid(11)
    assert grid[:, 0].tolist() == pytest.approx([i / 10 for i in range(11)])
    check_preference(grid, ("a", "b"))
    points = lattice(3, 4)
    assert len(points) == 15
    check_preference(points, NAMES)
    assert len({tuple(row) for row in points.tolist()}) == 15
    assert torch.equal(points * 4, (points * 4).round())
    assert lattice(1, 5).tolist() == [[1.0]]


def test_priority() -> None:
    rows = priority_preferences(3, 0.6)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]))
    assert rows.dtype == torch.float32
    check_preference(priority_preferences(8), [f"t{k}" for k in range(8)])
    torch.testing.assert_close(priority_preferences(8)[5, 5:7], torch.tensor([0.5, 0.5 / 7]))
    assert priority_preferences(2).tolist() == [[0.5, 0.5]] * 2
    assert priority_preferences(3, 1.0).tolist() == one_hot_preferences(3).tolist()
    assert priority_preferences(1).tolist() == priority_preferences(1, 0.2).tolist() == [[1.0]]
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"weight: expected a number in \[0, 1\], got"):
            priority_preferences(3, weight)


@pytest.mark.parametrize(("tasks", "points"), [(2, 2), (2, 7), (3, 3), (3, 10), (8, 8), (8, 29)])
def test_energy(tasks: int, points: int) -> None:
    found = energy(tasks, points, seed=3)
    assert found.dtype == torch.float32 and found.shape == (points, tasks)
    check_preference(found, [str(k) for k in range(tasks)])
    assert int((found == 1).any(dim=1).sum()) == tasks, "the corners"
    assert torch.equal(energy(tasks, points, seed=3), found)
    # a random set of that size has some pair much closer
    nearest = float(torch.pdist(found).min())
    assert nearest > 2 * float(torch.pdist(dirichlet(tasks, points)).min())


def test_energy_takes_its_seed() -> None:
    # pymoo's get_reference_directions gives the same set for all seeds
    assert not torch.equal(energy(3, 20, seed=0), energy(3, 20, seed=1))


def test_energy_of_one_task_and_of_too_few_points() -> None:
    assert energy(1, 1).tolist() == energy(1, 5).tolist() == [[1.0]]
    for tasks, points in ((2, 1), (8, 7), (3, 0), (1, 0), (0, 3)):
        with pytest.raises(ValueError, match=rf"points: expected .* {tasks} tasks, got {points}"):
            energy(tasks, points)


def test_generators_leave_standard_output_alone() -> None:
    # in another process: what an import prints, it prints once
    code = "from pareto_merging.preferences import *; energy(3, 9); lattice(3, 2); dirichlet(3, 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_dirichlet() -> None:
    found = dirichlet(8, 50, 0.1, seed=4)
    assert found.dtype == torch.float32 and found.shape == (50, 8)
    rng = np.random.default_rng(4)
    assert torch.equal(found, torch.stack([sample_dirichlet(0.1, 8, rng) for _ in range(50)]))
    assert torch.equal(dirichlet(8, 9, 0.1, seed=4), found[:9])
    assert not torch.equal(dirichlet(8, 9, 0.1, seed=5), found[:9])
    assert torch.equal(dirichlet(3, 4), dirichlet(3, 4, 1.0, 0))
    assert dirichlet(1, 2).tolist() == [[1.0], [1.0]]
    for extreme in (1e-300, 1.7e308):
        check_preference(dirichlet(8, 20, extreme), [str(k) for k in range(8)])
    for bad in (0.0, -1.0, math.nan, math.inf, 5e-324):
        with pytest.raises(ValueError, match="concentration: expected a finite number above 0, got"):
            dirichlet(3, 4, bad)
    for tasks, points in ((3, 0), (0, 3), (3, -1)):
        with pytest.raises(ValueError, match="points: expected at least one point of at least one task"):
            dirichlet(tasks, points)


def test_parse_several() -> None:
    found = parse_preferences(" 0.2,0.3,0.5; DTD=0.6;;equal;one-hot;priority; ", NAMES)
    expected = [
        torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.6, 0.2]]),
        equal_preference(3)[None],
        one_hot_preferences(3),
        priority_preferences(3, 0.5),
    ]
    torch.testing.assert_close(torch.stack(found), torch.cat(expected))
    assert all(gamma.shape == (3,) and gamma.dtype == torch.float32 for gamma in found)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("grid:11", "ab", lambda: two_task_grid(11)),
        ("lattice:4", "abc", lambda: lattice(3, 4)),
        ("lattice:4", "a", lambda: one_hot_preferences(1)),
        ("lattice:1", "abcdefgh", lambda: lattice(8, 1)),
        ("energy:12", "abc", lambda: energy(3, 12)),
        ("energy:99999", "a", lambda: one_hot_preferences(1)),
        ("dirichlet:6", "abc", lambda: dirichlet(3, 6)),
        ("dirichlet:6:0.1", "abc", lambda: dirichlet(3, 6, 0.1)),
        ("dirichlet:10000", "ab", lambda: dirichlet(2, 10_000)),
        ("priority", "a", lambda: one_hot_preferences(1)),
        ("lattice=0.7", ("lattice", "b"), lambda: torch.tensor([[0.7, 0.3]])),
        ("lattice:2=0.7", ("lattice:2", "b"), lambda: torch.tensor([[0.7, 0.3]])),
    ],
)
def test_parse_sets(text: str, names: Any, expected: Callable[[], torch.Tensor]) -> None:
    rows = expected()
    found = parse_preferences(text, tuple(names))
    torch.testing.assert_close(torch.stack(found), rows, rtol=0, atol=1e-7)
    assert [gamma.tolist() for gamma in parse_preferences(text, tuple(names))] == [gamma.tolist() for gamma in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one, got none"),
        (" ; ;", "expected at least one, got none"),
        ("0.5,0.5", r"expected shape \[3\]"),
        ("0.5,0.5,0.5", "expected a sum of 1, got 1.5"),
        ("SVHN=1", "expected task names among MNIST, DTD, Cars; got SVHN"),
        ("a,b", "expected 3 numbers such as 0.5,0.5 or TASK=0.7, got 'a,b'"),
        ("equal;nonsense", "expected 3 numbers such as .* got 'nonsense'"),
        ("one-hot:2", "expected 3 numbers such as"),
        ("grid:11", "expected grid:POINTS for two tasks, got 'grid:11' for 3 tasks"),
        ("lattice", "expected lattice:PARTITIONS, got 'lattice'"),
        ("energy:2", "expected energy:POINTS of at least 3 points for 3 tasks"),
        ("energy:1001", r"expected energy:POINTS .* at most 1,000 \(more take too long\), got 'energy:1001'"),
        ("energy:9:1", "expected energy:POINTS, got"),
        ("dirichlet:5:1:1", "expected dirichlet:POINTS or dirichlet:POINTS:CONCENTRATION, got"),
        *(
            (f"{kind}:{number}", rf"expected {kind}:[A-Z]+.*, got '{kind}:{number}'")
            for kind in ("lattice", "energy", "dirichlet")
            for number in ("", "0", "-3", "1.5", "1e3", "x", "²", "٣", "9" * 10)
        ),
        *(
            (f"dirichlet:5:{value}", f"expected a finite concentration above 0, got 'dirichlet:5:{value}'")
            for value in ("", "0", "-1", "nan", "inf", "1e999", "1e-400", "x")
        ),
        ("dirichlet:10001", "expected at most 10,000 in all, got 10,001 for 3 tasks"),
        ("equal;dirichlet:5000;dirichlet:5000", "expected at most 10,000 in all, got 10,001"),
        # 141 · 142 / 2
        ("lattice:140;lattice:1", "expected at most 10,000 in all, got 10,014"),
        ("lattice:999999999", r"expected at most 10,000 in all, got more than 10\^12"),
    ],
)
def test_what_cannot_be_parsed_is_refused_before_anything_is_generated(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lattice", "energy", "dirichlet", "two_task_grid", "one_hot_preferences", "priority_preferences"):
        monkeypatch.setattr(preferences, name, lambda *_: pytest.fail("generated"))
    with pytest.raises(ValueError, match=f"preference: {message}"):
        parse_preferences(text, NAMES)


def test_parse_refuses_what_only_some_numbers_of_tasks_refuse() -> None:
    for text in ("grid:1", "grid:0", "grid:x", "grid:"):
        with pytest.raises(ValueError, match=f"preference: expected grid:POINTS for two tasks, got '{text}'"):
            parse_preferences(text, ("a", "b"))
    with pytest.raises(ValueError, match="preference: expected at most 10,000 in all, got 10,001"):
        parse_preferences("grid:10001", ("a", "b"))
    # too many digits to read, and to print
    with pytest.raises(ValueError, match="preference: expected lattice:PARTITIONS, got"):
        parse_preferences(f"lattice:{'9' * 5000}", NAMES)
    with pytest.raises(ValueError, match="preference: expected at most 10,000 in all"):
        parse_preferences("lattice:999999999", [f"t{k}" for k in range(1000)])
