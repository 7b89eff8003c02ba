"""pareto_linear at one preference: forward, the gradient of x, and a layer's training step."""

import functools

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, Point, offers
from pmkernels import costs, reference

STEP = ("forward", "dx", "weight_grad")


@offers("auto", "fused", "streamed", "eager")
def test_forward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, cases.Source(row_point.device)
    weights = cases.make_weights(point, source)
    x, _ = cases.make_activations(point, source, weights["task_vectors"])
    values = {**weights, "x": x, "bias": source.normal(point.layer.n, dtype=point.dtype)}
    measure(
        Case(
            "forward",
            point.layer.name,
            run=lambda: [pmkernels.pareto_linear(**values, strategy=point.strategy)],
            plain=lambda: [reference.pareto_linear(**values)],
            truth=lambda: [reference.pareto_linear(**cases.exactly(values))],
            least=costs.bound("forward", point.problem()),
            dtype=point.dtype,
            choice=point.choice(weights, ["forward"]),
        )
    )


@offers("auto", "fused", "streamed", "eager")
def test_dx(measure: Measure, row_point: Point) -> None:
    point, source = row_point, cases.Source(row_point.device)
    weights = cases.make_weights(point, source)
    x, dy = cases.make_activations(point, source, weights["task_vectors"])
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)
    measure(
        Case(
            "dx",
            point.layer.name,
            run=cases.backward(ours, {**weights, "x": x}, ["x"], dy),
            plain=lambda: [dy @ reference.merge_weight(**weights)],
            truth=lambda: [dy.double() @ reference.merge_weight(**cases.exactly(weights))],
            least=costs.bound("dx", point.problem()),
            dtype=point.dtype,
            choice=point.choice(weights, ["dx"]),
        )
    )


@offers("auto", "fused", "streamed", "eager")
def test_forward_and_backward(measure: Measure, row_point: Point) -> None:
    point, source = row_point, cases.Source(row_point.device)
    weights = cases.make_weights(point, source)
    x, dy = cases.make_activations(point, source, weights["task_vectors"])
    values, names = {**weights, "x": x}, ("x", *cases.learned(weights))
    ours = functools.partial(pmkernels.pareto_linear, strategy=point.strategy)
    theirs = functools.partial(cases.forward_and_backward, reference.pareto_linear)
    measure(
        Case(
            "forward and backward",
            point.layer.name,
            run=lambda: cases.forward_and_backward(ours, values, names, dy),
            plain=lambda: [*theirs(values, names, dy), dy.t() @ x],
            truth=lambda: [*theirs(cases.exactly(values), names, dy), dy.double().t() @ x.double()],
            least=cases.total(costs.bound(operation, point.problem()) for operation in STEP),
            dtype=point.dtype,
            choice=point.choice(weights, STEP),
        )
    )
