"""Inputs for the kernels and the comparison with float64: used on the CPU (interpreted) and on a GPU."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pmkernels
from pmkernels import configs, dispatch, launch, reference

FROZEN = ("weight", "task_vectors")
LEARNED = ("lam", "A", "G", "B", "gamma")
CONSTANT = ("A_c", "B_c")
LOW_RANK = ("A", "G", "B", "gamma")


def linear_arguments(
    lead: Sequence[int],
    n: int,
    d: int,
    *,
    tasks: int = 3,
    rank: int = 2,
    gamma_lead: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    without: Iterable[str] = (),
    constant: int = 0,
) -> dict[str, Tensor]:
    """Arguments of pareto_linear on the scale of a real layer: entries of W about 1/√D, task vectors a third of it.

    ``constant``: the rank of A_c·B_cᵀ; 0: none.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 1.0, into: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(into).to(device)

    width = max(d, 1) ** -0.5
    values = {
        "x": make(*lead, d, into=dtype),
        "weight": make(n, d, scale=width, into=dtype),
        "task_vectors": make(tasks, n, d, scale=0.3 * width, into=dtype),
        "lam": make(tasks),
        "A": make(n, rank),
        "G": make(rank, rank, tasks, scale=rank**-0.5),
        "B": make(d, rank, scale=width),
        "gamma": torch.softmax(make(*gamma_lead, tasks), dim=-1),
        "bias": make(n, into=dtype),
    }
    if constant:
        values |= {"A_c": make(n, constant), "B_c": make(d, constant, scale=(max(d, 1) * constant) ** -0.5)}
    values = {name: value for name, value in values.items() if name not in set(without)}
    for name, value in values.items():
        value.requires_grad_(name not in FROZEN)
    return values


def gradients(y: Tensor, dy: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of every argument that requires one, by name; zeros where it does not take part."""
    names = [name for name, value in values.items() if value.requires_grad]
    if not names:
        return {}
    found = torch.autograd.grad(y, [values[name] for name in names], dy, allow_unused=True)
    return {n: torch.zeros_like(values[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def exactly(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same arguments in float64."""
    return {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in values.items()}


def assert_close(
    name: str,
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    times: float = 2.0,
    ulps: float = 2.0,
    terms: float = 0.0,
) -> None:
    """The error is at most ``times`` that of plain PyTorch in the same precision, or ``ulps`` of the largest element.

    ``terms``, the sum of the absolute values of the terms behind the largest element, allows for the rounding of
    float32 sums: plain PyTorch's error is one draw and may be lucky where results are few and terms cancel.
    """
    assert ours.shape == truth.shape, f"{name}: {list(ours.shape)} against {list(truth.shape)}"
    if not truth.numel():
        return
    scale = float(truth.abs().max())
    error = float((ours.double() - truth).abs().max())
    allowed = float((plain.double() - truth).abs().max())
    bound = times * allowed + ulps * torch.finfo(dtype).eps * scale + 8 * torch.finfo(torch.float32).eps * terms
    assert error <= bound, f"{name}: error {error:.3g}, plain PyTorch {allowed:.3g}, largest element {scale:.3g}"


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def check_linear(values: Mapping[str, Tensor], dy: Tensor | None = None, **options: Any) -> None:
    """pareto_linear and each of its gradients against float64, in units of plain PyTorch's own error."""
    exact = exactly(values)
    truth = reference.pareto_linear(**exact)
    plain = reference.pareto_linear(**values)
    ours = pmkernels.pareto_linear(**values, **options)
    dtype = values["x"].dtype
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    absolute = {name: v.detach().abs().requires_grad_(v.requires_grad) for name, v in exact.items()}
    sizes = reference.pareto_linear(**absolute)
    assert_close("y", ours.detach(), plain.detach(), truth.detach(), dtype, terms=_largest(sizes))
    if not ours.requires_grad:
        return
    if dy is None:
        dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    sums = gradients(sizes, dy.double().abs(), absolute)
    theirs, reached = gradients(truth, dy.double(), exact), gradients(plain, dy, values)
    for name, gradient in gradients(ours, dy, values).items():
        assert gradient.dtype == values[name].dtype, name
        assert_close(f"gradient of {name}", gradient, reached[name], theirs[name], dtype, terms=_largest(sums[name]))


def folded(lead: tuple[int, ...], n: int, d: int, **options: Any) -> dict[str, Tensor]:
    """Arguments of pareto_linear of a folded layer that wants no gradient."""
    values = linear_arguments(lead, n, d, without=("task_vectors", "lam"), **options)
    return {name: value.detach() for name, value in values.items()}


def served(values: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The same through preference_linear, with A and B in the model's type as a server holds them."""
    x, dtype = values["x"], values["x"].dtype
    return pmkernels.preference_linear(
        x,
        pmkernels.widen_weight(values["weight"], values["A"]),
        values["G"],
        values["B"].to(dtype).t().contiguous().t(),
        values["gamma"],
        values.get("bias"),
        **options,
    )


def check_served(values: Mapping[str, Tensor], **options: Any) -> None:
    """In units of the error of plain PyTorch's row by row computation in that precision; A and B in the same type."""
    dtype = values["x"].dtype
    rounded = {k: v.to(dtype).to(v.dtype) if k in ("A", "B") else v for k, v in values.items()}
    truth = reference.pareto_linear(**exactly(rounded))
    plain = reference.pareto_linear(**rounded)
    absolute = {name: value.abs() for name, value in exactly(rounded).items()}
    terms = float(reference.pareto_linear(**absolute).max()) if truth.numel() else 0.0
    found = served(values, **options)
    assert found.dtype == dtype
    assert_close("y", found, plain, truth, dtype, terms=terms)


class Parts:
    """How many parts every product was cut into; ``force`` asks for a number instead of the rules."""

    def __init__(self) -> None:
        self.of_d: list[int] = []
        self.of_rows: list[int] = []
        self.force: int | None = None


def note_parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """From here on the parts of every product are noted, and forced where a test asks for that."""
    seen = Parts()
    of_d, of_rows = launch.splits_of_d, launch.splits_of_rows

    def forced(length: int, block: int) -> tuple[int, int]:
        assert seen.force is not None
        each = max(-(-length // (seen.force * block)), 1) * block
        return max(-(-length // each), 1), each

    def noted_d(config: configs.Config, gpu: int, rows: int, n: int, d: int, tiles: int) -> tuple[int, int]:
        found = of_d(config, gpu, rows, n, d, tiles) if seen.force is None else forced(d, config.block_d)
        seen.of_d.append(found[0])
        return found

    def noted_rows(config: configs.Config, gpu: int, rows: int, *rest: int) -> tuple[int, int]:
        found = of_rows(config, gpu, rows, *rest) if seen.force is None else forced(rows, config.block_m)
        seen.of_rows.append(found[0])
        return found

    monkeypatch.setattr(launch, "splits_of_d", noted_d)
    monkeypatch.setattr(launch, "splits_of_rows", noted_rows)
    return seen


def configurations() -> dict[str, tuple[str, configs.Entry]]:
    """Every line of every shipped configuration file: a name for it -> the file and the line."""
    lines = [(name, entry) for name, text in configs.config_files().items() for entry in configs.read_entries(text)]
    return {f"{name}: {entry.op} {i}": (name, entry) for i, (name, entry) in enumerate(lines)}


@contextlib.contextmanager
def use_configuration(name: str, entry: configs.Entry) -> Iterator[list[str]]:
    """Launch with that line wherever it fits, and note its op each time; skip on another architecture than its own."""
    major, minor = torch.cuda.get_device_capability()
    meant_for = configs.architectures(configs.config_files()[name])
    if meant_for and f"sm_{major}{minor}" not in meant_for:
        pytest.skip(f"for {', '.join(meant_for)}")
    used: list[str] = []

    def with_entry(asked: configs.Asked, found: configs.Entry) -> configs.Config:
        if not entry.fits(asked):
            return found.config
        used.append(asked.op)
        return entry.config

    torch.backends.cuda.matmul.fp32_precision = "tf32" if entry.dtype == "tf32" else "ieee"
    with dispatch.using(configs.Configs(launch=with_entry)):
        yield used
