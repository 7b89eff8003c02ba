"""What microbenchmarks share: inputs at a point, the check against float64, and counts."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.common import inputs
from benchmarks.common.errors import TOLERANCE, relative_error
from benchmarks.common.inputs import Source as Source
from benchmarks.common.towers import BATCH, LANGUAGE_MODEL, TOWERS, Layer, Tower
from pmkernels import launch, strategies
from pmkernels.costs import Bound, Problem

# learned, with gradients that are reductions of dW
PARAMETERS = ("lam", "A", "G", "B")


def label(name: str) -> str:
    """Return a name as ids spell it: without spaces, which ``-k`` cannot have."""
    return name.replace(" ", "-")


LAYERS: dict[str, Layer] = {label(layer.name): layer for tower in TOWERS for layer in tower.block_layers(BATCH)}
# prompts of 128 tokens
LAYERS[label(LANGUAGE_MODEL[0].name)] = Layer(LANGUAGE_MODEL[0].name, 4096, 4096, 16, 128)


def find_layer(name: str) -> Layer:
    """Return the layer of that name in :data:`LAYERS`, or of that size. That is ``OUTxIN``, with a ViT-L/14's rows."""
    if name in LAYERS:
        return LAYERS[name]
    n, _, d = name.partition("x")
    if not (n.isdecimal() and d.isdecimal() and int(n) and int(d)):
        raise ValueError(f"expected OUTxIN, as in 3072x1024, or one of {', '.join(LAYERS)}, got {name!r}")
    return Layer(name, int(n), int(d), BATCH, TOWERS[-1].tokens)


@dataclass(frozen=True)
class Point:
    """One benchmark's parameters. ``rows`` is 0 where an operation has none, ``r`` without a low-rank term."""

    layer: Layer
    rows: int
    K: int
    r: int
    dtype: torch.dtype
    strategy: str
    device: torch.device

    @property
    def images(self) -> int:
        """Return parts of as many rows as the layer has tokens. Where that leaves a rest, every row is a part."""
        return self.rows if self.rows % self.layer.tokens else self.rows // self.layer.tokens

    def problem(self, *, tasks: int | None = None) -> Problem:
        """Return the point as :mod:`pmkernels.costs` counts it, with ``tasks`` task vectors instead of K."""
        kind = launch.precision_kind(self.dtype)
        return Problem(self.rows, self.layer.n, self.layer.d, self.K if tasks is None else tasks, self.r, kind)

    def choice(self, tensors: Mapping[str, Tensor], operations: Sequence[str], *, tasks: int | None = None) -> str:
        """Return what the strategy stands for in these operations of :mod:`pmkernels.costs`."""
        if one_kernel(self.strategy, tensors) == "eager":
            return "eager"
        size = self.problem(tasks=tasks)
        choose = functools.partial(
            strategies.choose, rows=size.rows, n=size.n, d=size.d, rank=size.rank, tasks=size.tasks
        )
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        chosen = {operation: choose(operation, self.strategy, like) for operation in operations}
        if len(set(chosen.values())) > 1:
            return ", ".join(f"{operation} {strategy}" for operation, strategy in chosen.items())
        return next(iter(chosen.values()))


def one_kernel(strategy: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what a strategy stands for where there is one kernel: ``eager`` or ``fused``."""
    device = next(iter(tensors.values())).device
    return "eager" if strategies.resolve(strategy, tensors, device) == "eager" else "fused"


@dataclass(frozen=True)
class LogitsPoint:
    """One benchmark's parameters where there are logits and no layer."""

    rows: int
    classes: int
    dtype: torch.dtype
    strategy: str
    device: torch.device

    @property
    def name(self) -> str:
        """Return the shape in words."""
        return f"{self.rows} rows of {self.classes} classes"

    def make(self, source: Source) -> Tensor:
        """Return logits."""
        return source.normal(self.rows, self.classes, scale=3.0, dtype=self.dtype)


@dataclass(frozen=True)
class TowerPoint:
    """One benchmark's parameters where there are all vectors of a vision transformer."""

    tower: Tower
    K: int
    dtype: torch.dtype
    strategy: str
    device: torch.device

    def make(self, source: Source) -> dict[str, Tensor]:
        """Return the arguments of merge_vectors: two normalisations and four biases of every block."""
        width = self.tower.width
        pieces = [width, width, 3 * width, width, width, width, 4 * width, width] * self.tower.blocks
        size = sum(pieces)
        return {
            "weight": source.normal(size, dtype=self.dtype),
            "task_vectors": source.normal(self.K, size, scale=0.1, dtype=self.dtype),
            "lam": source.normal(len(pieces), self.K, scale=0.3),
            "offsets": torch.tensor([0, *itertools.accumulate(pieces)], device=self.device),
        }


Variant = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation at one point: what is timed, and what it is judged by.

    ``truth`` is the result in float64, ``plain`` PyTorch's own in the point's precision. Tensors of theirs beyond those
    of ``run`` count for the error that is allowed alone. ``least``: the fewest operations and bytes.
    """

    op: str
    subject: str
    run: Variant
    plain: Variant
    truth: Variant
    least: Bound
    dtype: torch.dtype
    choice: str

    @property
    def group(self) -> str:
        """Return the heading of the table that it stands in."""
        return f"{self.op}, {self.subject}"

    def check(self) -> tuple[float, float]:
        """Return the relative error of one run and PyTorch's own. Raise AssertionError if it is too large."""
        truth, outputs = self.truth(), self.run()
        error, plain = relative_error(outputs, truth[: len(outputs)]), relative_error(self.plain(), truth)
        if error > TOLERANCE * plain + 1e-6:
            raise AssertionError(
                f"{self.group}: expected an error against float64 of at most {TOLERANCE:g} times {plain:.2e}, "
                f"PyTorch's own in this precision, got {error:.2e}"
            )
        return error, plain


# what the fixture ``measure`` does with a case
Measure = Callable[[Case], None]


@dataclass(frozen=True)
class Offer:
    """What a microbenchmark's operation has: strategies, and whether it is one of the low-rank term."""

    strategies: tuple[str, ...]
    low_rank: bool


Benchmark = TypeVar("Benchmark", bound=Callable[..., None])
# of every microbenchmark that was imported
OFFERS: dict[Callable[..., None], Offer] = {}


def offers(*strategies: str, low_rank: bool = False) -> Callable[[Benchmark], Benchmark]:
    """Return a decorator that notes the strategies of a microbenchmark."""

    def note(function: Benchmark) -> Benchmark:
        OFFERS[function] = Offer(strategies, low_rank)
        return function

    return note


def make_weights(point: Point, source: Source) -> dict[str, Tensor]:
    """Return W0, τ, λ and the low-rank term of a layer, as in :mod:`pmkernels`."""
    return inputs.make_weights(point.layer, point.K, point.r, point.dtype, source)


def make_activations(point: Point, source: Source, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and dy. dy depends on x through Σ_k τ_k, so that no dλ_k is a sum that cancels."""
    return inputs.make_activations(point.rows, point.layer, source, task_vectors)


def exactly(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values in float64; integers stay integers."""
    return rounded(values, torch.float64)


def rounded(values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the values in ``dtype``; integers stay integers."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


def graph(
    function: Callable[..., Tensor], values: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[Tensor, list[Tensor]]:
    """Call ``function`` under autograd; return its result, and the arguments ``names`` as leaves of it."""
    wanted = tuple(names)
    arguments = {name: value.detach().requires_grad_(name in wanted) for name, value in values.items()}
    return function(**arguments), [arguments[name] for name in wanted]


def forward_and_backward(
    function: Callable[..., Tensor], values: Mapping[str, Tensor], names: Iterable[str], grad: Tensor
) -> list[Tensor]:
    """Return the result, and the gradients of ``names``."""
    result, leaves = graph(function, values, names)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def backward(
    function: Callable[..., Tensor], values: Mapping[str, Tensor], names: Iterable[str], grad: Tensor
) -> Variant:
    """Return the backward alone as a variant. The forward is run now and its graph kept."""
    result, leaves = graph(function, values, names)
    return lambda: torch.autograd.grad(result, leaves, grad.to(result.dtype), retain_graph=True)


def total(bounds: Iterable[Bound]) -> Bound:
    """Return operations and bytes of several operations together."""
    each = tuple(bounds)
    return Bound(sum(bound.operations for bound in each), sum(bound.bytes for bound in each))


def learned(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return those of λ, A, G and B that a layer has."""
    return tuple(name for name in PARAMETERS if name in weights)
