"""Preferences, finite, non-negative and summing to 1: checked, written, sampled and laid out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Preference: TypeAlias = Tensor | Sequence[float] | Sequence[Sequence[float]] | Mapping[str, float]

SUM_TOLERANCE = 1e-4

MAX_PREFERENCES = 10_000
# minutes of computation beyond that
MAX_ENERGY_POINTS = 1_000


def check_preference(gamma: Preference, task_names: Sequence[str], per_item: bool = True) -> Tensor:
    """Return ``gamma`` as a float32 tensor [K] or, where ``per_item`` allows, [batch, K].

    By task name, ``{"MNIST": 0.6}`` gives MNIST 0.6 and shares the rest out equally among the tasks not named; naming
    every task leaves nothing to share, so the values must then sum to 1.

    Raises ValueError off the simplex (sum 1 within 1e-4), for the wrong length or an unknown task; normalises nothing.
    """
    tasks = len(task_names)
    try:
        if isinstance(gamma, Mapping):
            gamma = _from_names(gamma, task_names)
        tensor = gamma if isinstance(gamma, Tensor) else torch.tensor(gamma, dtype=torch.float32, device="cpu")
    except (TypeError, RuntimeError, ValueError) as error:
        if str(error).startswith("preference:"):
            raise
        raise ValueError(f"preference: expected {tasks} numbers, got {gamma!r}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"preference: expected real numbers, got {tensor.dtype}")
    allowed = f"[{tasks}] or [batch, {tasks}]" if per_item else f"[{tasks}]"
    if tensor.ndim not in ((1, 2) if per_item else (1,)) or tensor.shape[-1] != tasks or not len(tensor):
        expected = f"{allowed}, one weight for each of {', '.join(task_names)}"
        raise ValueError(f"preference: expected shape {expected}; got {list(tensor.shape)}")
    tensor = tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)
    values = tensor.detach()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"preference: expected finite numbers, got {_show(values)}")
    if bool((values < 0).any()):
        raise ValueError(f"preference: expected non-negative numbers, got {_show(values)}")
    sums = values.double().sum(dim=-1)
    if bool(((sums - 1).abs() > SUM_TOLERANCE).any()):
        worst = sums.reshape(-1)[(sums.reshape(-1) - 1).abs().argmax()]
        raise ValueError(f"preference: expected a sum of 1, got {worst:.6g} from {_show(values)}")
    return tensor


def _from_names(gamma: Mapping[str, float], task_names: Sequence[str]) -> Tensor:
    if unknown := [name for name in gamma if name not in task_names]:
        named = ", ".join(map(str, unknown))
        raise ValueError(f"preference: expected task names among {', '.join(task_names)}; got {named}")
    others = [name for name in task_names if name not in gamma]
    given = float(sum(float(value) for value in gamma.values()))
    if given > 1 + SUM_TOLERANCE:
        raise ValueError(f"preference: expected a sum of at most 1, got {given:.6g} from {dict(gamma)}")
    share = max(0.0, 1.0 - given) / len(others) if others else 0.0
    return torch.tensor([float(gamma.get(name, share)) for name in task_names], dtype=torch.float32, device="cpu")


def _show(values: Tensor) -> str:
    shown = format_preference(values.reshape(-1)[:16].tolist())
    return f"[{shown}{', …' if values.numel() > 16 else ''}]"


def parse_preference(text: str, task_names: Sequence[str]) -> Tensor:
    """Read a preference [K] such as ``0.5,0.5``, ``MNIST=0.7`` or ``equal``. Raises as :func:`check_preference`."""
    text = text.strip()
    if text == "equal":
        return equal_preference(len(task_names))
    try:
        given: Preference
        if "=" in text:
            pairs = [part.partition("=") for part in text.split(",")]
            names = [name.strip() for name, _, _ in pairs]
            if len(set(names)) != len(names):
                raise ValueError(f"preference: expected each task once, got {text!r}")
            given = {name: float(value) for name, (_, _, value) in zip(names, pairs, strict=True)}
        else:
            given = [float(part) for part in text.split(",")]
        return check_preference(given, task_names, per_item=False)
    except ValueError as error:
        if str(error).startswith("preference:"):
            raise
        expected = f"{len(task_names)} numbers such as 0.5,0.5 or TASK=0.7"
        raise ValueError(f"preference: expected {expected}, got {text!r}") from error


_SETS = {
    "grid": "grid:POINTS for two tasks",
    "lattice": "lattice:PARTITIONS",
    "energy": "energy:POINTS",
    "dirichlet": "dirichlet:POINTS or dirichlet:POINTS:CONCENTRATION",
}
# no task is called as what a text may stand for
RESERVED_WORDS = ("equal", "one-hot", "priority", *_SETS)


def parse_preferences(text: str, task_names: Sequence[str]) -> list[Tensor]:
    """Read preferences from the command line, float32 [K] each, in the order given. One or more, separated by
    semicolons.

    Each is what :func:`parse_preference` reads, or a set: ``one-hot`` (each task alone), ``priority`` (0.5 on each task
    in turn), ``grid:11`` (two tasks, points from 0 to 1), ``lattice:4`` (every γ of multiples of 1/4), ``energy:50``
    (50 well-spread points), ``dirichlet:20`` (20 uniform draws) and ``dirichlet:20:0.5`` (of concentration 0.5). The
    same text always gives the same preferences.

    Raises ValueError as :func:`check_preference`, for none, and for more than 10,000, before any is generated.
    """
    sets = [_counted(part, task_names) for part in map(str.strip, text.split(";")) if part]
    total = sum(count for count, _ in sets)
    if not total:
        raise ValueError("preference: expected at least one, got none")
    if total > MAX_PREFERENCES:
        # an integer of thousands of digits cannot even be printed
        got = f"{total:,}" if total < 10**12 else "more than 10^12"
        got = f"{got} for {len(task_names)} tasks"
        raise ValueError(f"preference: expected at most {MAX_PREFERENCES:,} in all, got {got}")
    return [gamma for _, generate in sets for gamma in generate()]


def _counted(part: str, task_names: Sequence[str]) -> tuple[int, Callable[[], Iterable[Tensor]]]:
    """Say how many preferences one part of a text stands for. And how to generate them."""
    tasks = len(task_names)
    if part == "one-hot":
        return tasks, lambda: one_hot_preferences(tasks)
    if part == "priority":
        return tasks, lambda: priority_preferences(tasks)
    kind, *arguments = part.split(":")
    if kind not in _SETS or "=" in part:
        gamma = parse_preference(part, task_names)
        return 1, lambda: [gamma]
    points = _whole_number(arguments[0]) if len(arguments) == 1 or (len(arguments) == 2 and kind == "dirichlet") else 0
    if not points or (kind == "grid" and (tasks != 2 or points < 2)):
        raise ValueError(f"preference: expected {_SETS[kind]}, got {part!r} for {tasks} tasks")
    if kind == "grid":
        return points, lambda: two_task_grid(points)
    if kind == "lattice":
        return math.comb(points + tasks - 1, tasks - 1), lambda: lattice(tasks, points)
    if kind == "energy":
        if tasks > 1 and not tasks <= points <= MAX_ENERGY_POINTS:
            expected = (
                f"at least {tasks} points for {tasks} tasks and at most {MAX_ENERGY_POINTS:,} (more take too long)"
            )
            raise ValueError(f"preference: expected energy:POINTS of {expected}, got {part!r}")
        return 1 if tasks == 1 else points, lambda: energy(tasks, points)
    try:
        concentration = float(arguments[1]) if len(arguments) == 2 else 1.0
    except ValueError:
        concentration = math.nan
    if not _is_concentration(concentration):
        raise ValueError(f"preference: expected a finite concentration above 0, got {part!r}")
    return points, lambda: dirichlet(tasks, points, concentration)


def _whole_number(text: str) -> int:
    """Read a number of at most nine digits, 0 for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else 0


def equal_preference(tasks: int) -> Tensor:
    """Return [K] with 1/K everywhere."""
    return torch.full((tasks,), 1.0 / tasks, dtype=torch.float32, device="cpu")


def one_hot_preferences(tasks: int) -> Tensor:
    """Return [K, K]: row k wants task k alone."""
    return torch.eye(tasks, dtype=torch.float32, device="cpu")


def priority_preferences(tasks: int, weight: float = 0.5) -> Tensor:
    """Return [K, K]: row k gives task k ``weight`` in [0, 1]. The rest is shared out equally; [[1]] for one task."""
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number in [0, 1], got {weight}")
    if tasks == 1:
        return one_hot_preferences(1)
    rows = torch.full((tasks, tasks), (1.0 - weight) / (tasks - 1), dtype=torch.float64, device="cpu")
    return rows.fill_diagonal_(weight).float()


def two_task_grid(points: int = 11) -> Tensor:
    """Return [points, 2]: γ₁ from 0 to 1 in equal steps."""
    first = torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")
    return torch.stack([first, 1 - first], dim=1).float()


def lattice(tasks: int, partitions: int) -> Tensor:
    """Return the Das–Dennis simplex lattice (pymoo's), [points, K]: every γ of multiples of 1/partitions."""
    # takes a second to import
    from pymoo.util.ref_dirs import get_reference_directions

    directions = get_reference_directions("das-dennis", tasks, n_partitions=partitions)
    return torch.from_numpy(directions).float()


def energy(tasks: int, points: int, seed: int = 0) -> Tensor:
    """Well-spread preferences of minimal Riesz s-energy (pymoo's; Blank et al. 2021), float32 [points, K].

    A function of its arguments. One task has one preference, [[1]], whatever ``points`` is. On one core and 8 tasks,
    100 points take about 1.5 s, 500 take 20 s and 1000 take 100 s and 1 GB.

    Raises ValueError for fewer points than tasks: the K corners are part of every such set.
    """
    # takes a while to import
    from pymoo.util.ref_dirs import RieszEnergyReferenceDirectionFactory

    if tasks == 1 and points >= 1:
        return one_hot_preferences(1)
    if not 1 <= tasks <= points:
        raise ValueError(f"points: expected at least one point and one for each of {tasks} tasks, got {points}")
    # get_reference_directions("energy", …, seed=…) takes a seed and ignores it
    directions = RieszEnergyReferenceDirectionFactory(tasks, points).do(seed=seed)
    return torch.from_numpy(directions).float()


def dirichlet(tasks: int, points: int, concentration: float = 1.0, seed: int = 0) -> Tensor:
    """Independent γ ~ Dirichlet(concentration · 1), float32 [points, K]; a concentration of 1 is uniform.

    More points with the same seed begin with the same ones. Raises ValueError for fewer than one point or task, or a
    concentration that is not finite and above 0.
    """
    if tasks < 1 or points < 1:
        raise ValueError(f"points: expected at least one point of at least one task, got {points} of {tasks}")
    if not _is_concentration(concentration):
        raise ValueError(f"concentration: expected a finite number above 0, got {concentration}")
    rng = np.random.default_rng(seed)
    return torch.stack([sample_dirichlet(concentration, tasks, rng) for _ in range(points)])


def _is_concentration(value: float) -> bool:
    # sample_dirichlet divides by it, which overflows a little below 1e-300
    return 1e-300 <= value < math.inf


def sample_dirichlet(concentration: float, tasks: int, rng: np.random.Generator) -> Tensor:
    """Draw one γ ~ Dirichlet(concentration · 1), float32 [K].

    Drawn in the logarithm of the gamma variates (log Γ_a = log Γ_{a+1} + log U / a in distribution), because at a
    concentration such as 0.01 all of them underflow together.
    """
    return _sample(np.full(tasks, concentration), (tasks,), rng)


def sample_for_task(concentration: float, tasks: int, task: int, count: int, rng: np.random.Generator) -> Tensor:
    """Draw ``count`` γ ~ Dirichlet(concentration · 1 + e_task), float32 [count, K].

    Under linear scalarisation γ_k is a weight, and a density: E γ_k·f(γ) for γ ~ Dirichlet(p·1) is E f(γ) / K for
    γ ~ Dirichlet(p·1 + e_k).
    """
    concentrations = np.full(tasks, concentration)
    concentrations[task] += 1.0
    return _sample(concentrations, (count, tasks), rng)


def _sample(concentrations: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    log_uniform = -rng.standard_exponential(shape)
    log_gamma = np.log(rng.standard_gamma(concentrations + 1.0, shape)) + log_uniform / concentrations
    return torch.softmax(torch.from_numpy(log_gamma), dim=-1).float()


def format_preference(gamma: Iterable[float]) -> str:
    """Write a preference for tables and messages, ``0.1, 0.9``: four significant digits at most."""
    return ", ".join(f"{value:.4g}" for value in gamma)
