"""Layers and whole models counted: their bounds, :mod:`pmkernels.costs`'s predictions, and how both are written.

A step or a forward is a list of kernels, each with how often it is launched; its seconds are their sum, one after the
other. What :data:`PARTS` names can be added up by part. Nothing here was measured.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.common import pages
from benchmarks.common.towers import BATCH, KIND, LANGUAGE_MODEL, TOWERS, Layer, Tower
from pmkernels import configs, costs, dispatch, strategies
from pmkernels.costs import Bound, Pass, Problem, Rates

TASKS = (2, 4, 8)
# task vectors of the goals, and how far a predicted time may be off
GOAL_TASKS, UNCERTAINTY = 8, 0.25
# name of a configuration file -> title, architecture
DEVICES = {
    "nvidia-h200": ("NVIDIA H200", "sm_90"),
    "nvidia-h100-80gb-hbm3": ("NVIDIA H100 80GB HBM3", "sm_90"),
    "nvidia-rtx-a6000": ("NVIDIA RTX A6000", "sm_86"),
}
GROUPS: dict[str, tuple[Layer, ...]] = {
    **{f"{tower.name}, {BATCH} images": tower.block_layers(BATCH) for tower in TOWERS},
    "One image": tuple(layer for tower in TOWERS for layer in tower.block_layers(1)),
    "A 4096×4096 projection of a 7B language model": LANGUAGE_MODEL,
}


def figure(value: float) -> str:
    """Return three digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """Return a table between empty lines. Its first ``text`` columns are words, the others figures."""
    return ["", *pages.table(columns, rows, "l" * text + "r" * (len(columns) - text)), ""]


def problem(layer: Layer, tasks: int, *, per_row: bool = False, bias: bool = False) -> Problem:
    """Return ``layer`` as :mod:`pmkernels.costs` counts it."""
    return Problem(layer.rows, layer.n, layer.d, tasks, layer.rank, KIND, per_row, bias)


@functools.cache
def configuration_file(gpu: str) -> str:
    """Return the configuration file that such a GPU takes: its own, its architecture's, the default."""
    arch = DEVICES[gpu][1] if gpu in DEVICES else ""
    files = dispatch.in_force().files
    return next((name for name in (gpu, arch) if name in files), "default")


@functools.cache
def rates_of(gpu: str) -> Rates:
    """Return the rates of a GPU, measured ones where its configuration file has them."""
    return replace(costs.GPUS[gpu], **configs.read_rates(dispatch.in_force().files[configuration_file(gpu)]))


def predicted(
    operation: str, strategy: str, counted: Problem, gpu: str, *, cached: bool = False, configuration: str | None = None
) -> float:
    """Return the seconds ``strategy`` should take on one of :data:`pmkernels.costs.GPUS`, with its kernel's tiles.

    ``configuration``: the file that they are read from, instead of the one that a GPU of :data:`DEVICES` takes.
    """
    name, rates = configuration or configuration_file(gpu), rates_of(gpu)
    kernels = strategies.predicted_passes(name, rates, operation, strategy, counted, cached=cached)
    return costs.seconds(kernels, rates, counted.kind)


def choice(operation: str, counted: Problem, gpu: str) -> str:
    """Name the strategy that ``auto`` takes where nothing was measured. It does not know whether there is a bias."""
    known = replace(counted, bias=False)
    return min(("streamed", "fused"), key=lambda strategy: predicted(operation, strategy, known, gpu))


# a kernel and how often it is launched
Kernels = Iterable[tuple[int, Pass]]
# part of a step or of a forward -> the kernels of pmkernels.costs, and of this module, that it consists of
PARTS = {
    "products": ("product", "dW from rows", "fused", "sum"),
    "attention": ("attention", "attention backward"),
    "the rest of the network": ("normalisation", "activation", "sum of two", "q, k and v joined"),
    "merge": ("merge",),
    "reduction of dW": ("reduction",),
    "partial sums": ("partial sums",),
    "db": ("column sums", "cast of db"),
    "normalisations' own gradients": ("gradients of a normalisation",),
    "dW added up": ("dW added up",),
    "widening": ("widen",),
    "the preference's term by rows": ("rows of a preference",),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
REST = "the rest of the network"


@dataclass(frozen=True)
class Prediction:
    """Seconds by part, in the order of :data:`PARTS`, and launches."""

    parts: dict[str, float]
    launches: int

    @property
    def seconds(self) -> float:
        """Return all parts together."""
        return sum(self.parts.values())

    @property
    def counted_alone(self) -> float:
        """Return the time without the rest of the network. That takes the same time however weights are merged."""
        return self.seconds - self.parts.get(REST, 0.0)

    def apart(self, other: "Prediction") -> float:
        """Add up by how many seconds each part differs from that of another."""
        names = self.parts.keys() | other.parts.keys()
        return sum(abs(self.parts.get(name, 0.0) - other.parts.get(name, 0.0)) for name in names)


def ratio_text(value: float, off: float, digits: int = 2) -> str:
    """Write a predicted ratio and its bounds, where it is so much more or less."""
    return f"*{value:.{digits}f}× ({value - off:.{digits}f}–{value + off:.{digits}f})*"


def over_text(ours: Prediction, other: Prediction, digits: int = 2) -> str:
    """Write the ratio of two predictions; parts that are alike in both are off alike."""
    return ratio_text(ours.seconds / other.seconds, UNCERTAINTY * ours.apart(other) / other.seconds, digits)


def prediction(kernels: Kernels, gpu: str) -> Prediction:
    """Add up what kernels should take on a GPU, one after the other."""
    rates, seconds_of, launches = rates_of(gpu), dict.fromkeys(PARTS, 0.0), 0
    for times, kernel in kernels:
        seconds_of[_PART_OF[kernel.name]] += times * kernel.seconds(rates, KIND)
        launches += times * kernel.launches
    return Prediction({part: seconds for part, seconds in seconds_of.items() if seconds}, launches)


def at_full_rate(kernels: Kernels) -> Kernels:
    """Yield the kernels as if those bound by memory reached its full rate."""
    for times, kernel in kernels:
        below = costs.FORMS[kernel.form].memory_efficiency < 1
        yield times, replace(kernel, form="library product") if below else kernel


def of_operation(
    operation: str, strategy: str, counted: Problem, gpu: str, times: int, *, cached: bool = False
) -> Kernels:
    """Yield the kernels of an operation of a layer, each launched so many times."""
    name = configuration_file(gpu)
    for kernel in strategies.predicted_passes(name, rates_of(gpu), operation, strategy, counted, cached=cached):
        yield times, kernel


class Product(NamedTuple):
    """A product of a step and how often it comes. ``dx`` is false where nothing before it learns."""

    problem: Problem
    times: int
    dx: bool = True


def products(tower: Tower, tasks: int, items: int = BATCH) -> list[Product]:
    """Return every product with a merged weight in one forward: patch embedding, blocks, final projection."""
    patches = Problem(items * (tower.tokens - 1), tower.width, 3 * tower.patch**2, tasks, 0, KIND)
    final = Problem(items, tower.output, tower.width, tasks, 0, KIND)
    blocks = [Product(problem(layer, tasks, bias=True), tower.blocks) for layer in tower.block_layers(items)]
    return [Product(patches, 1, dx=False), *blocks, Product(final, 1)]


def attention(tower: Tower, items: int = BATCH) -> list[Pass]:
    """Return QKᵀ and AV of a block, forward and backward, as flash attention moves bytes.

    Forward: two products; Q, K, V read, the output written. Backward: four products (the recomputed scores are not
    counted); Q, K, V, output and its gradient read, three gradients written.
    """
    rows = items * tower.tokens
    product, tensor = 2.0 * rows * tower.tokens * tower.width, 2.0 * rows * tower.width
    forward = Pass("attention", products=2 * product, memory=4 * tensor, form="attention")
    backward = Pass("attention backward", products=4 * product, memory=8 * tensor, form="attention")
    return [forward, backward]


# kernel, times a block, and in tensors [rows, width]: read as the kernel before left it, read from long ago, written
REST_FORWARD = [("normalisation", 2, 1, 0, 1), ("sum of two", 2, 1, 1, 1), ("activation", 1, 4, 0, 4)]
REST_BACKWARD = [("normalisation", 2, 1, 1, 1), ("sum of two", 2, 1, 1, 1), ("activation", 1, 4, 4, 4)]
REST_BACKWARD += [("q, k and v joined", 1, 3, 0, 3)]
# of their weight and bias, where those learn
OF_NORMS = [("gradients of a normalisation", 2, 1, 1, 0)]


def beside(lines: Iterable[tuple[str, int, int, int, int]], tower: Tower, items: int, gpu: str) -> Kernels:
    """Yield the kernels of a block that are no products, as eager PyTorch launches them."""
    tensor, cache_bytes = 2.0 * items * tower.tokens * tower.width, rates_of(gpu).cache_bytes
    for name, times, near, far, written in lines:
        memory = costs.from_memory(near * tensor, (near + written) * tensor, cache_bytes) + (far + written) * tensor
        whole = (near + far + written) * tensor
        yield times, Pass(name, memory=memory, cache=whole, form="tensor by tensor")


def _of_blocks(tower: Tower, items: int, gpu: str, times: int, own: bool) -> Kernels:
    """Yield attention and the rest of all blocks, forward and backward; ``own``: normalisations learn."""
    for kernel in attention(tower, items):
        yield times * tower.blocks, kernel
    for lines in (REST_FORWARD, REST_BACKWARD, *((OF_NORMS,) if own else ())):
        for count, kernel in beside(lines, tower, items, gpu):
            yield times * tower.blocks * count, kernel


def limit_kernels(tower: Tower, tasks: int, gpu: str) -> Kernels:
    """Yield the kernels of the limit's step: frozen merged linear layers, and their full dW."""
    for p, times, dx in products(tower, tasks):
        yield from of_operation("forward", "streamed", p, gpu, tasks * times * (3 if dx else 2), cached=True)
    yield from _of_blocks(tower, BATCH, gpu, tasks, own=False)


GUIDED = "expert-guided"
WAYS = ("cached", "all at once", "streamed", "fused", GUIDED)
# of the preset ``expert``: a constant term on every matrix, which is part of what is merged and reduced
CONSTANT_RANK = 32


def by_rows(p: Problem, cache_bytes: float) -> Kernels:
    """Yield the products of the preference's term with rows, forward and backward.

    s = x·B and t·Aᵀ added to y; u = dy·A, ds·Bᵀ added to dx, dA = dyᵀ·t and dB = xᵀ·ds. The r columns beside them, the
    mixing by γ and dG are not counted.
    """
    rank = p.rank - p.constant
    x, y = (float(p.rows * size * p.size) for size in (p.d, p.n))
    narrow = 2.0 * p.rows * rank
    for operations, again, far in (
        (narrow * p.d, x, 0.0),
        (narrow * p.n, y, y),
        (narrow * p.n, y, 0.0),
        (narrow * p.d, x, x),
        (narrow * p.n, y, 0.0),
        (narrow * p.d, x, 0.0),
    ):
        memory = costs.from_memory(again, x + y, cache_bytes) + far
        yield 1, Pass("rows of a preference", products=operations, memory=memory, cache=again + far)


def step_kernels(tower: Tower, tasks: int, gpu: str, way: str) -> Kernels:
    """Yield the kernels of a step of ours, in one of :data:`WAYS`."""
    repeat, items = (1, tasks * BATCH) if way == "all at once" else (tasks, BATCH)
    for p, times, dx in products(tower, tasks, items):
        if way == GUIDED:
            preferred = bool(p.rank)
            p = replace(p, rank=p.rank + CONSTANT_RANK, constant=CONSTANT_RANK, per_row=preferred)
            for count, kernel in by_rows(p, rates_of(gpu).cache_bytes) if preferred else ():
                yield repeat * times * count, kernel
        if way in ("streamed", "fused"):
            for operation in ("forward", "dx") if dx else ("forward",):
                yield from of_operation(operation, way, p, gpu, repeat * times)
        else:
            yield from of_operation("merge", "streamed", p, gpu, times)
            count = repeat * times * (2 if dx else 1)
            yield from of_operation("forward", "streamed", p, gpu, count, cached=True)
        gradient = "fused" if way == "fused" else choice("weight_grad", p, gpu)
        yield from of_operation("weight_grad", gradient, p, gpu, repeat * times)
    yield from _of_blocks(tower, items, gpu, repeat, own=True)


def once_kernels(tower: Tower, tasks: int, gpu: str) -> Kernels:
    """Yield the kernels of a step that merges once with autograd. This baseline takes two more models of memory.

    The τ are added up by one product of λ and reduced by one; dW of each task but the first is added in place.
    """
    for p, times, dx in products(tower, tasks):
        yield from of_operation("forward", "streamed", p, gpu, tasks * times * (3 if dx else 2), cached=True)
        for kernel in costs.bias_sums(p, rates_of(gpu).cache_bytes):
            yield tasks * times, kernel
        yield times, Pass("merge", memory=(tasks + 1) * p.weight, form="tensor by tensor")
        # W0, and the low-rank term
        yield times * (2 if p.rank else 1), Pass("merge", memory=3 * p.weight, form="tensor by tensor")
        yield (tasks - 1) * times, Pass("dW added up", memory=3 * p.weight, form="tensor by tensor")
        yield times, Pass("reduction", memory=(tasks + 1) * p.weight, form="tensor by tensor")
        if p.rank:
            yield 2 * times, Pass("reduction", memory=p.weight, form="tensor by tensor")
    yield from _of_blocks(tower, BATCH, gpu, tasks, own=True)


@dataclass(frozen=True)
class Step:
    """One optimiser step (all tasks, forward and backward): operations, bounds in seconds, and predictions.

    ``limit`` and ``bound`` count products and attention alone; predictions count the rest of the network too.
    """

    operations: float
    limit: float
    bound: float
    predicted_limit: Prediction
    predicted: dict[str, Prediction]

    def ratio(self, way: str) -> float:
        """Divide the prediction of one of :data:`WAYS` by that of the limit, task by task."""
        return self.predicted[way].seconds / self.predicted_limit.seconds


@functools.cache
def step(tower: Tower, tasks: int, gpu: str) -> Step:
    """Return the limit, the bound and the predictions of a training step."""
    rates = rates_of(gpu)
    scores = attention(tower) * tower.blocks
    operations = tasks * sum(kernel.products for kernel in scores)
    limit = bound = tasks * sum(Bound(k.products, k.memory).seconds(rates, KIND) for k in scores)
    for p, times, dx in products(tower, tasks):
        # forward, dx and dW on a merged weight read or write the same: one weight, x and y
        plain = costs.bound("forward", p, cached=True)
        one = plain.seconds(rates, KIND)
        with_weight = 2 if dx else 1
        operations += tasks * times * (with_weight + 1) * plain.operations
        limit += tasks * times * (with_weight + 1) * one
        gradient = costs.bound("weight_grad", p).seconds(rates, KIND)
        bound += times * (costs.bound("merge", p).seconds(rates, KIND) + tasks * (with_weight * one + gradient))
    predictions = {way: prediction(step_kernels(tower, tasks, gpu, way), gpu) for way in WAYS}
    return Step(operations, limit, bound, prediction(limit_kernels(tower, tasks, gpu), gpu), predictions)


def memory(tower: Tower, tasks: int) -> dict[str, float]:
    """Return bytes of weights that a step holds, by strategy. W0, K task vectors, and what is merged."""
    held = 2.0 * (tasks + 1) * tower.parameters
    largest = 2.0 * max(p.problem.n * p.problem.d for p in products(tower, tasks))
    return {"cached": held + 2.0 * tower.parameters, "streamed": held + largest, "fused": held}


def block_kernels(tower: Tower, items: int, gpu: str, served: bool) -> Kernels:
    """Yield the forward of one block; ``served``: folded, with a preference per image."""
    for layer in tower.block_layers(items):
        p = problem(layer, 0, per_row=True)
        if served and p.rank:
            yield from of_operation("preference", choice("preference", p, gpu), p, gpu, 1)
        else:
            yield from of_operation("forward", "streamed", p, gpu, 1, cached=True)
    yield 1, attention(tower, items)[0]
    yield from beside(REST_FORWARD, tower, items, gpu)


def forward_kernels(tower: Tower, items: int, gpu: str, served: bool) -> Kernels:
    """Yield the forward of a whole tower, of merged weights or ``served``."""
    patches, *_, final = products(tower, 0, items)
    for product in (patches, final):
        yield from of_operation("forward", "streamed", product.problem, gpu, 1, cached=True)
    for times, kernel in block_kernels(tower, items, gpu, served):
        yield tower.blocks * times, kernel


def served_and_plain(
    kernels: Callable[[Tower, int, str, bool], Kernels], tower: Tower, items: int, gpu: str
) -> tuple[Prediction, Prediction]:
    """Predict what is served and what is plain: of :func:`block_kernels` or :func:`forward_kernels`."""
    return prediction(kernels(tower, items, gpu, True), gpu), prediction(kernels(tower, items, gpu, False), gpu)


def reduction_share(layer: Layer, tasks: int, gpu: str) -> float:
    """Divide bytes over bandwidth by the predicted seconds of a dW's reduction. It includes the partial sums."""
    p, rates = problem(layer, tasks), rates_of(gpu)
    kernels = strategies.predicted_passes(configuration_file(gpu), rates, "weight_grad", "streamed", p)
    reduction = [kernel for kernel in kernels if kernel.name in ("reduction", "partial sums")]
    return (tasks + 1) * p.weight / rates.memory / costs.seconds(reduction, rates, KIND)


def weight_gradient_ratio(layer: Layer, tasks: int, gpu: str, *, bias: bool) -> float:
    """Divide ``auto``'s predicted weight gradient by the library's dW and one reading of τ."""
    p, rates = problem(layer, tasks, bias=bias), rates_of(gpu)
    product = costs.seconds(costs.product(p), rates, KIND)
    return predicted("weight_grad", choice("weight_grad", p, gpu), p, gpu) / (product + tasks * p.weight / rates.memory)
