"""Every operation of :mod:`pmkernels` as a microbenchmark."""

import torch
from torch import Tensor

import pmkernels
from benchmarks.common.layer_case import Source, learned, total
from benchmarks.micro.cases import LogitsPoint, Measure, Point, TowerPoint, offers
from pmkernels import costs, reference
from pmkernels.costs import Bound

STEP = ("forward", "dx", "weight_grad")


@offers("auto", "fused", "eager")
def test_entropy(measure: Measure, logits_point: LogitsPoint) -> None:
    values = logits_point.make(Source(logits_point.device))
    measure("softmax entropy", logits_point, "softmax_entropy", values, Bound(0.0, values["logits"].nbytes))


@offers("auto", "fused", "eager")
def test_entropy_and_gradient(measure: Measure, logits_point: LogitsPoint) -> None:
    point, source = logits_point, Source(logits_point.device)
    values, grad = point.make(source), source.normal(point.rows)
    # read forward and backward, written once
    least = Bound(0.0, 3.0 * values["logits"].nbytes)
    measure("softmax entropy and gradient", point, "softmax_entropy", values, least, names=["logits"], grad=grad)


@offers("auto", "fused", "streamed", "eager")
def test_forward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, _ = point.activations(source, weights)
    values = {**weights, "x": x, "bias": source.normal(point.layer.n, dtype=point.dtype)}
    least, choice = costs.bound("forward", point.problem()), point.choice(weights, ["forward"])
    measure("forward", point, "pareto_linear", values, least, choice)


@offers("auto", "fused", "streamed", "eager")
def test_dx(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    least, choice = costs.bound("dx", point.problem()), point.choice(weights, ["dx"])

    def theirs(values: dict[str, Tensor]) -> list[Tensor]:
        return [dy.to(values.pop("x").dtype) @ reference.merge_weight(**values)]

    gradient = {"names": ["x"], "grad": dy, "alone": True}
    measure("dx", point, "pareto_linear", {**weights, "x": x}, least, choice, **gradient, theirs=theirs)


@offers("auto", "fused", "streamed", "eager")
def test_forward_and_backward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    least = total(costs.bound(operation, point.problem()) for operation in STEP)
    gradients = {"names": ["x", *learned(weights)], "grad": dy, "with_dw": True}
    values, choice = {**weights, "x": x}, point.choice(weights, STEP)
    measure("forward and backward", point, "pareto_linear", values, least, choice, **gradients)


@offers("auto", "fused", "streamed", "eager")
def test_weight_gradient(measure: Measure, row_point: Point) -> None:
    """Measure the gradients of λ, A, G and B from rows. There dW need not exist."""
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    least, choice = costs.bound("weight_grad", point.problem()), point.choice(weights, ["weight_grad"])
    gradients = {"names": learned(weights), "grad": dy, "alone": True, "with_dw": True}
    measure("weight gradient", point, "pareto_linear", {**weights, "x": x}, least, choice, **gradients)


@offers("auto", "fused", "eager")
def test_weight_gradient_reduction(measure: Measure, weight_point: Point) -> None:
    """Measure the same from a given dW."""
    point, problem = weight_point, weight_point.problem()
    weights = point.weights(Source(point.device))
    least = Bound(0.0, (problem.tasks + 1) * problem.weight)
    # Σ_k τ_k, so that no dλ_k is a sum that cancels
    gradients = {"names": learned(weights), "grad": weights["task_vectors"].sum(dim=0), "alone": True}
    measure("weight gradient, reduction of dW", point, "merge_weight", weights, least, **gradients)


@offers("auto", "fused", "eager")
def test_merge(measure: Measure, weight_point: Point) -> None:
    weights, strategy = weight_point.weights(Source(weight_point.device)), weight_point.strategy
    out, least = torch.empty_like(weights["weight"]), costs.bound("merge", weight_point.problem())

    def run() -> list[Tensor]:
        return [pmkernels.merge_weight(**weights, out=out, strategy=strategy)]

    measure("merge", weight_point, "merge_weight", weights, least, run=run)


@offers("auto", "fused", "eager")
def test_merge_vectors(measure: Measure, tower_point: TowerPoint) -> None:
    values = tower_point.make(Source(tower_point.device))
    least = Bound(0.0, float((tower_point.K + 2) * values["weight"].nbytes))
    measure("merge of vectors", tower_point, "merge_vectors", values, least)


@offers("auto", "fused", "eager")
def test_vectors_gradient(measure: Measure, tower_point: TowerPoint) -> None:
    values, strategy = tower_point.make(Source(tower_point.device)), tower_point.strategy
    taus, offsets = values["task_vectors"], values["offsets"]
    # Σ_k τ_k, so that no dλ_lk is a sum that cancels
    grad = taus.sum(dim=0)

    def run() -> list[Tensor]:
        return [pmkernels.merge_vectors_gradient(grad, taus, offsets, strategy=strategy)]

    least, gradient = Bound(0.0, float((tower_point.K + 1) * grad.nbytes)), {"names": ["lam"], "grad": grad}
    measure("gradient of vectors", tower_point, "merge_vectors", values, least, **gradient, alone=True, run=run)


@offers("auto", "fused", "eager", low_rank=True)
def test_projection(measure: Measure, weight_point: Point) -> None:
    problem, weights = weight_point.problem(), weight_point.weights(Source(weight_point.device))
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    least = Bound(2.0 * problem.tasks * problem.n * problem.d * problem.rank, problem.tasks * problem.weight)
    measure("projection", weight_point, "project_task_vectors", values, least, rounded=True)


@offers("auto", "fused", "eager", low_rank=True)
def test_projection_and_gradient(measure: Measure, weight_point: Point) -> None:
    point, problem, source = weight_point, weight_point.problem(), Source(weight_point.device)
    weights = point.weights(source)
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    # forward and backward read every task vector once each
    least = Bound(4.0 * problem.tasks * problem.n * problem.d * problem.rank, 2 * problem.tasks * problem.weight)
    gradients = {"names": ["A", "B"], "grad": source.normal(point.K, point.r, point.r), "rounded": True}
    measure("projection and gradient", point, "project_task_vectors", values, least, **gradients)


def make_served(point: Point, items: int) -> dict[str, Tensor]:
    """Return a folded layer's values by the reference's names. Each of ``items`` parts of the rows has one preference.

    A and B are what their values in the model's type are in float32.
    """
    source = Source(point.device)
    weights = point.weights(source)
    served = {"weight": weights["weight"], "G": weights["G"]}
    served |= {name: weights[name].to(point.dtype).float() for name in ("A", "B")}
    x = source.normal(items, point.rows // items, point.layer.d, dtype=point.dtype)
    gamma = torch.softmax(source.normal(items, 1, point.K), dim=-1)
    return {**served, "x": x, "gamma": gamma, "bias": source.normal(point.layer.n, dtype=point.dtype)}


def laid_out(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B in the model's type, its columns contiguous, as a server holds it."""
    return B.to(dtype).t().contiguous().t()


def measure_served(measure: Measure, point: Point, op: str, items: int) -> None:
    """Measure preference_linear with ``items`` preferences. [W | A] is laid out once a model."""
    values = make_served(point, items)
    arguments = {name: values[name] for name in ("x", "G", "gamma", "bias")}
    arguments["wide"] = pmkernels.widen_weight(values["weight"], values["A"])
    arguments["B"] = laid_out(values["B"], point.dtype)

    def run() -> list[Tensor]:
        return [pmkernels.preference_linear(**arguments, strategy=point.strategy)]

    least, choice = costs.bound("preference", point.problem()), point.choice(values, ["preference"], tasks=0)
    measure(op, point, "pareto_linear", values, least, choice, run=run)


@offers("auto", "fused", "streamed", "eager", low_rank=True)
def test_served_per_image(measure: Measure, row_point: Point) -> None:
    measure_served(measure, row_point, "served, a preference per image", row_point.images)


@offers("auto", "fused", "streamed", "eager", low_rank=True)
def test_served_per_row(measure: Measure, row_point: Point) -> None:
    measure_served(measure, row_point, "served, a preference per row", row_point.rows)


@offers("fused", "eager", low_rank=True)
def test_widen_rows(measure: Measure, row_point: Point) -> None:
    """Measure the widening to rows [x | t]. In the ``streamed`` strategy a kernel of its own does it."""
    point, problem = row_point, row_point.problem(tasks=0)
    served = make_served(point, point.images)
    width = pmkernels.widen_weight(served["weight"], served["A"]).shape[1]
    values = {"x": served["x"], "G": served["G"], "B": laid_out(served["B"], point.dtype), "gamma": served["gamma"]}

    def plain(x: Tensor, G: Tensor, B: Tensor, gamma: Tensor) -> list[Tensor]:
        t = (x @ B).to(G.dtype) @ reference.preference_core(G, gamma.squeeze(1)).transpose(1, 2)
        zeros = x.new_zeros(*x.shape[:-1], width - x.shape[-1] - t.shape[-1])
        return parts(torch.cat([x, t.to(x.dtype), zeros], dim=-1))

    def parts(wide: Tensor) -> list[Tensor]:
        return [wide[..., : point.layer.d], wide[..., point.layer.d :]]

    def run() -> list[Tensor]:
        if point.strategy == "eager":
            return plain(**values)
        from pmkernels.kernels import preference as kernels

        return parts(kernels.widen(values["x"], values["G"], values["B"], values["gamma"].squeeze(1)))

    moved = problem.rows * (problem.d + width) * problem.size
    least = Bound(2.0 * problem.rows * problem.d * problem.rank, moved)
    measure("widening of rows", point, "", values, least, point.strategy, run=run, theirs=lambda v: plain(**v))


@offers("eager", low_rank=True)
def test_widen_weight(measure: Measure, weight_point: Point) -> None:
    weights = weight_point.weights(Source(weight_point.device))
    values = {"weight": weights["weight"], "A": weights["A"]}
    wide = pmkernels.widen_weight(**values)

    def run() -> list[Tensor]:
        return [pmkernels.widen_weight(**values)]

    def theirs(v: dict[str, Tensor]) -> list[Tensor]:
        zeros = v["A"].new_zeros(len(v["A"]), wide.shape[1] - v["weight"].shape[1] - v["A"].shape[1])
        return [torch.cat([v["weight"], v["A"], zeros], dim=1)]

    least = Bound(0.0, float(values["weight"].nbytes + wide.nbytes + values["A"].nbytes))
    measure("widening of the weight", weight_point, "", values, least, "eager", run=run, theirs=theirs, rounded=True)
