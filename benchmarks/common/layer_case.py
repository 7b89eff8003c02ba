"""One layer with K task vectors: random inputs, variants of each operation, and the truth."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks.common.errors import relative_error
from benchmarks.common.towers import Layer
from pmkernels import linear, reference
from pmkernels.costs import Bound

LIMIT, PYTORCH = "limit: merged beforehand", "PyTorch"
# operation of pmkernels.costs -> as results files call it
NAMES = {"forward": "forward", "dx": "dx", "weight_grad": "weight gradient", "merge": "merge"}
# operation as results files call it -> as pmkernels.costs does
OPERATIONS = {name: key for key, name in NAMES.items() if key != "merge"}
CHOICES = ("fused", "streamed")
Variant = Callable[[], Sequence[Tensor]]


class Source:
    """Normal random numbers on a device, the same in every run. On the meta device there are shapes alone."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return numbers of that standard deviation."""
        if self.generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype)
        return (scale * torch.randn(*shape, generator=self.generator, device=self.device)).to(dtype)


def make_folded(
    layer: Layer, tasks: int, rank: int, dtype: torch.dtype, source: Source, items: int | None = None
) -> dict[str, Tensor]:
    """Return W0, and A, G, B and γ of a low-rank term, as in :mod:`pmkernels`.

    γ is [K], or [items, 1, K] where each of ``items`` has its own.
    """
    width, lead = layer.d**-0.5, () if items is None else (items, 1)
    values = {"weight": source.normal(layer.n, layer.d, scale=width, dtype=dtype)}
    if rank:
        values |= {
            "A": source.normal(layer.n, rank),
            "G": source.normal(rank, rank, tasks, scale=0.1),
            "B": source.normal(layer.d, rank, scale=width),
            "gamma": torch.softmax(source.normal(*lead, tasks), dim=-1),
        }
    return values


def make_served(layer: Layer, tasks: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return a folded layer with bias, x [items, tokens, D], and each item's γ."""
    source = Source(device)
    values = make_folded(layer, tasks, rank, dtype, source, layer.items)
    values["x"] = source.normal(layer.items, layer.tokens, layer.d, dtype=dtype)
    return {**values, "bias": source.normal(layer.n, dtype=dtype)}


def make_weights(layer: Layer, tasks: int, rank: int, dtype: torch.dtype, source: Source) -> dict[str, Tensor]:
    """Return W0, τ and λ of a layer, and its low-rank term."""
    scale = 0.1 * layer.d**-0.5
    vectors = [source.normal(layer.n, layer.d, scale=scale, dtype=dtype) for _ in range(tasks)]
    learned = {"task_vectors": torch.stack(vectors), "lam": source.normal(tasks, scale=0.3)}
    return {**make_folded(layer, tasks, rank, dtype, source), **learned}


def make_activations(rows: int, layer: Layer, source: Source, task_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and dy. dy depends on x through Σ_k τ_k, so that no dλ_k is a sum that cancels."""
    x = source.normal(rows, layer.d, dtype=task_vectors.dtype)
    dy = F.linear(x, task_vectors.sum(dim=0))
    return x, dy / dy.float().square().mean().sqrt().to(dy.dtype)


def learned(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return those of λ, A, G and B that a layer has. Their gradients are reductions of dW."""
    return tuple(name for name in ("lam", "A", "G", "B") if name in weights)


@dataclass(frozen=True)
class Case:
    """One layer with K task vectors and inputs for the most rows. W(γ) is there in the model's type and in float64."""

    layer: Layer
    tasks: int
    x: Tensor
    dy: Tensor
    parts: dict[str, Tensor]
    bias: Tensor
    merged: Tensor
    exact: Tensor

    @classmethod
    def make(cls, layer: Layer, tasks: int, rows: int, dtype: torch.dtype, device: torch.device) -> "Case":
        """Make random inputs; no gradient is a sum that cancels."""
        source = Source(device)
        parts = make_weights(layer, tasks, layer.rank, dtype, source)
        x, dy = make_activations(rows, layer, source, parts["task_vectors"])
        exact = parts["weight"].double()
        for scale, task_vector in zip(parts["lam"].double(), parts["task_vectors"], strict=True):
            exact += scale * task_vector.double()
        if "A" in parts:
            core = reference.preference_core(parts["G"].double(), parts["gamma"].double())
            exact += parts["A"].double() @ core @ parts["B"].double().t()
        bias = source.normal(layer.n, dtype=dtype)
        return cls(layer, tasks, x, dy, parts, bias, reference.merge_weight(**parts), exact)

    def reduced(self, d_weight: Tensor) -> list[Tensor]:
        """Return dλ, and dA, dG, dB where there is a low-rank term, of a dW."""
        dtype, parts = d_weight.dtype, self.parts
        gradients = [torch.stack([(tau.to(dtype) * d_weight).sum() for tau in parts["task_vectors"]])]
        if "A" in parts:
            A, G, B, gamma = (parts[name].to(dtype) for name in ("A", "G", "B", "gamma"))
            core = reference.preference_core(G, gamma)
            P = d_weight @ B
            gradients += [P @ core.t(), (A.t() @ P)[:, :, None] * gamma, d_weight.t() @ A @ core]
        return gradients


def backward(case: Case, rows: int, names: Collection[str], strategy: str, cached: Tensor | None = None) -> Variant:
    """Return the gradients of ``names`` as a variant, without a forward.

    They are some of x and of ``linear.LEARNED``.
    """
    values = {**case.parts, "x": case.x[:rows], "bias": case.bias, "cached": cached}
    inputs = [values.get(name) for name in linear.INPUTS]
    needs = [name in names for name in ("x", *linear.LEARNED)]

    def run() -> list[Tensor]:
        gradients = linear.linear_backward_operator(case.dy[:rows], *inputs, needs, strategy)
        return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]

    return run


def variants(case: Case, op: str, rows: int) -> dict[str, Variant]:
    """Return what is measured of an operation, by name. The limit of the weight gradient is dW alone."""
    x, dy, merged, bias = case.x[:rows], case.dy[:rows], case.merged, case.bias

    def make(strategy: str, cached: Tensor | None = None) -> Variant:
        if op == "forward":
            return lambda: [pmkernels.pareto_linear(x, **case.parts, bias=bias, cached=cached, strategy=strategy)]
        return backward(case, rows, ("x",) if op == "dx" else learned(case.parts), strategy, cached)

    own = {name: make(name) for name in (*CHOICES, "auto")}
    if op == "weight gradient":
        plain = lambda: case.reduced((dy.t() @ x).float())  # noqa: E731
        return {LIMIT: lambda: [dy.t() @ x], **own, PYTORCH: plain}
    own["cached"] = make("auto", merged)
    if op == "dx":
        return {LIMIT: lambda: [dy @ merged], **own, PYTORCH: lambda: [dy @ reference.merge_weight(**case.parts)]}
    limit = lambda: [F.linear(x, merged, bias)]  # noqa: E731
    return {LIMIT: limit, **own, PYTORCH: lambda: [reference.pareto_linear(x, **case.parts, bias=bias)]}


def graph(
    function: Callable[..., Tensor], values: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[Tensor, list[Tensor]]:
    """Call ``function`` under autograd; return its result, and the arguments ``names`` as leaves of it."""
    wanted = tuple(names)
    arguments = {name: value.detach().requires_grad_(name in wanted) for name, value in values.items()}
    return function(**arguments), [arguments[name] for name in wanted]


def with_gradients(
    function: Callable[..., Tensor], values: Mapping[str, Tensor], names: Iterable[str], upstream: Tensor
) -> list[Tensor]:
    """Return the result of ``function``, and the gradients of ``names``."""
    result, leaves = graph(function, values, names)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]


def with_gradient(function: Callable[[Tensor], Tensor], at: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the result of ``function`` of one tensor, and its gradient."""
    return with_gradients(lambda at: function(at), {"at": at}, ("at",), upstream)


def total(bounds: Iterable[Bound]) -> Bound:
    """Return operations and bytes of several operations together."""
    each = tuple(bounds)
    return Bound(sum(bound.operations for bound in each), sum(bound.bytes for bound in each))


def truth(case: Case, op: str, rows: int) -> tuple[list[Tensor], float]:
    """Return the result in float64, and the error of plain PyTorch in the model's type.

    For the weight gradient that error is at least the one of its dW: a few numbers dλ may come out right by luck.
    """
    x, dy = case.x[:rows], case.dy[:rows]
    if op == "forward":
        truth = [F.linear(x.double(), case.exact, case.bias.double())]
        return truth, relative_error([F.linear(x, case.merged, case.bias)], truth)
    if op == "dx":
        truth = [dy.double() @ case.exact]
        return truth, relative_error([dy @ case.merged], truth)
    exact, plain = dy.double().t() @ x.double(), dy.t() @ x
    truth = case.reduced(exact)
    return truth, max(relative_error([plain], [exact]), relative_error(case.reduced(plain.float()), truth))


def product_error(x: Tensor, dy: Tensor) -> tuple[float, float]:
    """Return the error of the library's dW = dyᵀ·x, and what rounding allows it. Partial sums round too."""
    exact = dy.double().t() @ x.double()
    return relative_error([dy.t() @ x], [exact]), 2 * relative_error([exact.to(x.dtype)], [exact])


def needed_memory(layer: Layer, tasks: int, rows: int) -> float:
    """Return the bytes that a point takes: weights, what the reference sums, float64, activations."""
    weight, activations = layer.n * layer.d, rows * (layer.n + layer.d)
    return weight * ((tasks + 4) * 2 + (tasks + 2) * 4 + 4 * 8) + activations * (4 * 2 + 3 * 8)
