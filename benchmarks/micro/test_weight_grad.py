"""The gradients of λ, A, G and B, from rows and from a given dW. From rows, dW need not exist."""

import functools

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, Point, offers
from pmkernels import costs, reference
from pmkernels.costs import Bound


@offers("auto", "fused", "streamed", "eager")
def test_weight_gradient(measure: Measure, row_point: Point) -> None:
    point, source = row_point, cases.Source(row_point.device)
    weights = cases.make_weights(point, source)
    x, dy = cases.make_activations(point, source, weights["task_vectors"])
    values, names = {**weights, "x": x}, cases.learned(weights)
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)
    theirs = functools.partial(cases.backward, reference.pareto_linear)
    measure(
        Case(
            "weight gradient",
            point.layer.name,
            run=cases.backward(ours, values, names, dy),
            plain=lambda: [*theirs(values, names, dy)(), dy.t() @ x],
            truth=lambda: [*theirs(cases.exactly(values), names, dy)(), dy.double().t() @ x.double()],
            least=costs.bound("weight_grad", point.problem()),
            dtype=point.dtype,
            choice=point.choice(weights, ["weight_grad"]),
        )
    )


@offers("auto", "fused", "eager")
def test_weight_gradient_reduction(measure: Measure, weight_point: Point) -> None:
    point, problem = weight_point, weight_point.problem()
    weights = cases.make_weights(point, cases.Source(point.device))
    names = cases.learned(weights)
    # Σ_k τ_k, so that no dλ_k is a sum that cancels
    d_weight = weights["task_vectors"].sum(dim=0)
    ours = functools.partial(pmkernels.merge_weight, strategy=point.strategy)
    theirs = functools.partial(cases.backward, reference.merge_weight)
    measure(
        Case(
            "weight gradient, reduction of dW",
            point.layer.name,
            run=cases.backward(ours, weights, names, d_weight),
            plain=lambda: theirs(weights, names, d_weight)(),
            truth=lambda: theirs(cases.exactly(weights), names, d_weight)(),
            least=Bound(0.0, (problem.tasks + 1) * problem.weight),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, weights),
        )
    )
