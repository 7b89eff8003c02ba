"""What microbenchmarks share: inputs at a point, the check against float64, and counts."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

import pmkernels
from benchmarks.common.arguments import sizes
from benchmarks.common.errors import TOLERANCE, relative_error
from benchmarks.common.layer_case import Source, Variant, graph, make_activations, make_weights, with_gradients
from benchmarks.common.towers import BATCH, LANGUAGE_MODEL, TOWERS, Layer, Tower
from pmkernels import launch, reference, strategies
from pmkernels.costs import Bound, Problem


def label(name: str) -> str:
    """Return a name as ids spell it: without spaces, which ``-k`` cannot have."""
    return name.replace(" ", "-")


LAYERS: dict[str, Layer] = {label(layer.name): layer for tower in TOWERS for layer in tower.block_layers(BATCH)}
# prompts of 128 tokens
LAYERS[label(LANGUAGE_MODEL[0].name)] = Layer(LANGUAGE_MODEL[0].name, 4096, 4096, 16, 128)


def find_layer(name: str) -> Layer:
    """Return the layer of that name in :data:`LAYERS`, or of that size. That is ``OUTxIN``, with a ViT-L/14's rows."""
    size = sizes(name)
    return Layer(name, *size, BATCH, TOWERS[-1].tokens) if size else LAYERS[name]


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
    def name(self) -> str:
        """Return the layer's name."""
        return self.layer.name

    @property
    def images(self) -> int:
        """Return parts of as many rows as the layer has tokens. Where that leaves a rest, every row is a part."""
        return self.rows if self.rows % self.layer.tokens else self.rows // self.layer.tokens

    def weights(self, source: Source) -> dict[str, Tensor]:
        """Return W0, τ, λ and the low-rank term of a layer, as in :mod:`pmkernels`."""
        return make_weights(self.layer, self.K, self.r, self.dtype, source)

    def activations(self, source: Source, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return x and dy of those weights."""
        return make_activations(self.rows, self.layer, source, weights["task_vectors"])

    def problem(self, *, tasks: int | None = None) -> Problem:
        """Return the point as :mod:`pmkernels.costs` counts it, with ``tasks`` task vectors instead of K."""
        kind = launch.precision_kind(self.dtype)
        return Problem(self.rows, self.layer.n, self.layer.d, self.K if tasks is None else tasks, self.r, kind)

    def choice(self, tensors: Mapping[str, Tensor], operations: Sequence[str], *, tasks: int | None = None) -> str:
        """Return what the strategy stands for in these operations of :mod:`pmkernels.costs`."""
        if one_kernel(self.strategy, tensors) == "eager":
            return "eager"
        size, like = self.problem(tasks=tasks), torch.empty(0, dtype=self.dtype, device=self.device)
        shape: dict[str, Any] = {name: getattr(size, name) for name in ("rows", "n", "d", "rank", "tasks")}
        chosen = {name: strategies.choose(name, self.strategy, like, **shape) for name in operations}
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

    def make(self, source: Source) -> dict[str, Tensor]:
        """Return logits."""
        return {"logits": source.normal(self.rows, self.classes, scale=3.0, dtype=self.dtype)}


@dataclass(frozen=True)
class TowerPoint:
    """One benchmark's parameters where there are all vectors of a vision transformer."""

    tower: Tower
    K: int
    dtype: torch.dtype
    strategy: str
    device: torch.device

    @property
    def name(self) -> str:
        """Return the tower's name."""
        return self.tower.name

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


AnyPoint: TypeAlias = Point | LogitsPoint | TowerPoint
Theirs: TypeAlias = Callable[[dict[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation at one point: what is timed, and what it is judged by.

    ``theirs`` computes it from ``values``: PyTorch's own result from what they are, or are in the point's type
    (``rounded``), the truth in float64. Tensors of it beyond those of ``run`` count for the error that is allowed
    alone. ``least``: the fewest operations and bytes.
    """

    op: str
    point: AnyPoint
    run: Variant
    theirs: Theirs
    values: Mapping[str, Tensor]
    least: Bound
    choice: str
    rounded: bool = False

    @property
    def group(self) -> str:
        """Return the heading of the table that it stands in."""
        return f"{self.op}, {self.point.name}"

    def check(self) -> tuple[float, float]:
        """Return the relative error of one run and PyTorch's own. Raise AssertionError if it is too large."""
        truth, outputs = self.theirs(in_type(self.values, torch.float64)), self.run()
        own = self.theirs(in_type(self.values, self.point.dtype) if self.rounded else dict(self.values))
        error, plain = relative_error(outputs, truth[: len(outputs)]), relative_error(own, truth)
        if error > TOLERANCE * plain + 1e-6:
            raise AssertionError(
                f"{self.group}: expected an error against float64 of at most {TOLERANCE:g} times {plain:.2e}, "
                f"PyTorch's own in this precision, got {error:.2e}"
            )
        return error, plain


def make_case(
    op: str,
    point: AnyPoint,
    function: str,
    values: Mapping[str, Tensor],
    least: Bound,
    choice: str | None = None,
    *,
    names: Sequence[str] = (),
    grad: Tensor | None = None,
    alone: bool = False,
    with_dw: bool = False,
    run: Variant | None = None,
    theirs: Theirs | None = None,
    rounded: bool = False,
) -> Case:
    """Make a case of a function that :mod:`pmkernels` and its reference have. ``run``, ``theirs``: another instead.

    With ``grad``, that of its result, the gradients of ``names`` are wanted too, or ``alone``. ``with_dw``: dW counts
    for the error that is allowed. ``choice``: by default that of one kernel.
    """

    def variant(function: Callable[..., Tensor], values: Mapping[str, Tensor]) -> Variant:
        if grad is None:
            return lambda: [function(**values)]
        if alone:
            # the forward is run now and its graph kept
            result, leaves = graph(function, values, names)
            return lambda: torch.autograd.grad(result, leaves, grad.to(result.dtype), retain_graph=True)
        return lambda: with_gradients(function, values, names, grad)

    def reference_of(values: dict[str, Tensor]) -> list[Tensor]:
        own = variant(getattr(reference, function), values)()
        return [*own, grad.to(values["x"].dtype).t() @ values["x"]] if with_dw and grad is not None else list(own)

    if run is None:
        ours = functools.partial(getattr(pmkernels, function), strategy=point.strategy)
        run = variant(ours, values)
    if choice is None:
        choice = one_kernel(point.strategy, {name: v for name, v in values.items() if v.is_floating_point()})
    return Case(op, point, run, theirs or reference_of, values, least, choice, rounded)


# the fixture ``measure`` is called as :func:`make_case`
Measure: TypeAlias = Callable[..., None]
Benchmark = TypeVar("Benchmark", bound=Callable[..., None])
# of every microbenchmark that was imported: its strategies, and whether it is one of the low-rank term
OFFERS: dict[Callable[..., None], tuple[tuple[str, ...], bool]] = {}


def offers(*strategies: str, low_rank: bool = False) -> Callable[[Benchmark], Benchmark]:
    """Return a decorator that notes the strategies of a microbenchmark."""

    def note(function: Benchmark) -> Benchmark:
        OFFERS[function] = strategies, low_rank
        return function

    return note


def in_type(values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the values in ``dtype``; integers stay integers."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
