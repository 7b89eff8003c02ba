"""Every operation of :mod:`pmkernels` as a microbenchmark."""

import functools

import torch
from torch import Tensor

import pmkernels
from benchmarks.common.layer_case import Source, learned, total, with_gradients
from benchmarks.micro.cases import LogitsPoint, Measure, Point, TowerPoint, backward, offers, one_kernel
from pmkernels import costs, reference
from pmkernels.costs import Bound

STEP = ("forward", "dx", "weight_grad")


@offers("auto", "fused", "eager")
def test_entropy(measure: Measure, logits_point: LogitsPoint) -> None:
    values, strategy = logits_point.make(Source(logits_point.device)), logits_point.strategy
    measure(
        "softmax entropy",
        logits_point,
        run=lambda: [pmkernels.softmax_entropy(**values, strategy=strategy)],
        theirs=lambda v: [reference.softmax_entropy(**v)],
        values=values,
        least=Bound(0.0, values["logits"].nbytes),
        choice=one_kernel(strategy, values),
    )


@offers("auto", "fused", "eager")
def test_entropy_and_gradient(measure: Measure, logits_point: LogitsPoint) -> None:
    source, strategy = Source(logits_point.device), logits_point.strategy
    values, grad = logits_point.make(source), source.normal(logits_point.rows)
    ours = functools.partial(pmkernels.softmax_entropy, strategy=strategy)
    measure(
        "softmax entropy and gradient",
        logits_point,
        run=lambda: with_gradients(ours, values, ["logits"], grad),
        theirs=lambda v: with_gradients(reference.softmax_entropy, v, ["logits"], grad),
        values=values,
        # read forward and backward, written once
        least=Bound(0.0, 3.0 * values["logits"].nbytes),
        choice=one_kernel(strategy, values),
    )


@offers("auto", "fused", "streamed", "eager")
def test_forward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, _ = point.activations(source, weights)
    values = {**weights, "x": x, "bias": source.normal(point.layer.n, dtype=point.dtype)}
    measure(
        "forward",
        point,
        run=lambda: [pmkernels.pareto_linear(**values, strategy=point.strategy)],
        theirs=lambda v: [reference.pareto_linear(**v)],
        values=values,
        least=costs.bound("forward", point.problem()),
        choice=point.choice(weights, ["forward"]),
    )


@offers("auto", "fused", "streamed", "eager")
def test_dx(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)
    measure(
        "dx",
        point,
        run=backward(ours, {**weights, "x": x}, ["x"], dy),
        theirs=lambda v: [v.pop("dy") @ reference.merge_weight(**v)],
        values={**weights, "dy": dy},
        least=costs.bound("dx", point.problem()),
        choice=point.choice(weights, ["dx"]),
    )


@offers("auto", "fused", "streamed", "eager")
def test_forward_and_backward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    values, names = {**weights, "x": x}, ("x", *learned(weights))
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)

    def theirs(v: dict[str, Tensor]) -> list[Tensor]:
        return [*with_gradients(reference.pareto_linear, v, names, dy), dy.to(v["x"].dtype).t() @ v["x"]]

    measure(
        "forward and backward",
        point,
        run=lambda: with_gradients(ours, values, names, dy),
        theirs=theirs,
        values=values,
        least=total(costs.bound(operation, point.problem()) for operation in STEP),
        choice=point.choice(weights, STEP),
    )


@offers("auto", "fused", "streamed", "eager")
def test_weight_gradient(measure: Measure, row_point: Point) -> None:
    """Measure the gradients of λ, A, G and B from rows. There dW need not exist."""
    point, source = row_point, Source(row_point.device)
    weights = point.weights(source)
    x, dy = point.activations(source, weights)
    values, names = {**weights, "x": x}, learned(weights)
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)

    def theirs(v: dict[str, Tensor]) -> list[Tensor]:
        return [*backward(reference.pareto_linear, v, names, dy)(), dy.to(v["x"].dtype).t() @ v["x"]]

    measure(
        "weight gradient",
        point,
        run=backward(ours, values, names, dy),
        theirs=theirs,
        values=values,
        least=costs.bound("weight_grad", point.problem()),
        choice=point.choice(weights, ["weight_grad"]),
    )


@offers("auto", "fused", "eager")
def test_weight_gradient_reduction(measure: Measure, weight_point: Point) -> None:
    """Measure the same from a given dW."""
    point, problem = weight_point, weight_point.problem()
    weights = point.weights(Source(point.device))
    names = learned(weights)
    # Σ_k τ_k, so that no dλ_k is a sum that cancels
    d_weight = weights["task_vectors"].sum(dim=0)
    ours = functools.partial(pmkernels.merge_weight, strategy=point.strategy)
    measure(
        "weight gradient, reduction of dW",
        point,
        run=backward(ours, weights, names, d_weight),
        theirs=lambda v: backward(reference.merge_weight, v, names, d_weight)(),
        values=weights,
        least=Bound(0.0, (problem.tasks + 1) * problem.weight),
        choice=one_kernel(point.strategy, weights),
    )


@offers("auto", "fused", "eager")
def test_merge(measure: Measure, weight_point: Point) -> None:
    weights, strategy = weight_point.weights(Source(weight_point.device)), weight_point.strategy
    out = torch.empty_like(weights["weight"])
    measure(
        "merge",
        weight_point,
        run=lambda: [pmkernels.merge_weight(**weights, out=out, strategy=strategy)],
        theirs=lambda v: [reference.merge_weight(**v)],
        values=weights,
        least=costs.bound("merge", weight_point.problem()),
        choice=one_kernel(strategy, weights),
    )


@offers("auto", "fused", "eager")
def test_merge_vectors(measure: Measure, tower_point: TowerPoint) -> None:
    values, strategy = tower_point.make(Source(tower_point.device)), tower_point.strategy
    measure(
        "merge of vectors",
        tower_point,
        run=lambda: [pmkernels.merge_vectors(**values, strategy=strategy)],
        theirs=lambda v: [reference.merge_vectors(**v)],
        values=values,
        least=Bound(0.0, float((tower_point.K + 2) * values["weight"].nbytes)),
        choice=one_kernel(strategy, {name: values[name] for name in ("weight", "task_vectors", "lam")}),
    )


@offers("auto", "fused", "eager")
def test_vectors_gradient(measure: Measure, tower_point: TowerPoint) -> None:
    values, strategy = tower_point.make(Source(tower_point.device)), tower_point.strategy
    taus, offsets = values["task_vectors"], values["offsets"]
    # Σ_k τ_k, so that no dλ_lk is a sum that cancels
    grad = taus.sum(dim=0)
    measure(
        "gradient of vectors",
        tower_point,
        run=lambda: [pmkernels.merge_vectors_gradient(grad, taus, offsets, strategy=strategy)],
        theirs=lambda v: backward(reference.merge_vectors, v, ["lam"], grad)(),
        values=values,
        least=Bound(0.0, float((tower_point.K + 1) * grad.nbytes)),
        choice=one_kernel(strategy, {"grad": grad, "task_vectors": taus}),
    )


@offers("auto", "fused", "eager", low_rank=True)
def test_projection(measure: Measure, weight_point: Point) -> None:
    point, problem = weight_point, weight_point.problem()
    weights = point.weights(Source(point.device))
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    measure(
        "projection",
        point,
        run=lambda: [pmkernels.project_task_vectors(**values, strategy=point.strategy)],
        theirs=lambda v: [reference.project_task_vectors(**v)],
        values=values,
        least=Bound(2.0 * problem.tasks * problem.n * problem.d * problem.rank, problem.tasks * problem.weight),
        choice=one_kernel(point.strategy, values),
        rounded=True,
    )


@offers("auto", "fused", "eager", low_rank=True)
def test_projection_and_gradient(measure: Measure, weight_point: Point) -> None:
    point, problem, source = weight_point, weight_point.problem(), Source(weight_point.device)
    weights = point.weights(source)
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    grad = source.normal(point.K, point.r, point.r)
    ours = functools.partial(pmkernels.project_task_vectors, strategy=point.strategy)
    measure(
        "projection and gradient",
        point,
        run=lambda: with_gradients(ours, values, ("A", "B"), grad),
        theirs=lambda v: with_gradients(reference.project_task_vectors, v, ("A", "B"), grad),
        values=values,
        # forward and backward read every task vector once each
        least=Bound(4.0 * problem.tasks * problem.n * problem.d * problem.rank, 2 * problem.tasks * problem.weight),
        choice=one_kernel(point.strategy, values),
        rounded=True,
    )


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
    measure(
        op,
        point,
        run=lambda: [pmkernels.preference_linear(**arguments, strategy=point.strategy)],
        theirs=lambda v: [reference.pareto_linear(**v)],
        values=values,
        least=costs.bound("preference", point.problem()),
        choice=point.choice(values, ["preference"], tasks=0),
    )


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

    def fused() -> list[Tensor]:
        from pmkernels.kernels import preference as kernels

        return parts(kernels.widen(values["x"], values["G"], values["B"], values["gamma"].squeeze(1)))

    moved = problem.rows * (problem.d + width) * problem.size
    measure(
        "widening of rows",
        point,
        run=fused if point.strategy == "fused" else lambda: plain(**values),
        theirs=lambda v: plain(**v),
        values=values,
        least=Bound(2.0 * problem.rows * problem.d * problem.rank, moved),
        choice=point.strategy,
    )


@offers("eager", low_rank=True)
def test_widen_weight(measure: Measure, weight_point: Point) -> None:
    weights = weight_point.weights(Source(weight_point.device))
    values = {"weight": weights["weight"], "A": weights["A"]}
    wide = pmkernels.widen_weight(**values)

    def plain(weight: Tensor, A: Tensor) -> list[Tensor]:
        zeros = A.new_zeros(A.shape[0], wide.shape[1] - weight.shape[1] - A.shape[1])
        return [torch.cat([weight, A, zeros], dim=1)]

    measure(
        "widening of the weight",
        weight_point,
        run=lambda: [pmkernels.widen_weight(**values)],
        theirs=lambda v: plain(**v),
        values=values,
        least=Bound(0.0, float(values["weight"].nbytes + wide.nbytes + values["A"].nbytes)),
        choice="eager",
        rounded=True,
    )
