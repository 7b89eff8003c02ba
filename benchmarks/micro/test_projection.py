"""project_task_vectors: Aᵀ·τ_k·B of every task, alone and with the gradients of A and B."""

import functools

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, Point, offers
from pmkernels import reference
from pmkernels.costs import Bound


@offers("auto", "fused", "eager", low_rank=True)
def test_projection(measure: Measure, weight_point: Point) -> None:
    point, problem = weight_point, weight_point.problem()
    weights = cases.make_weights(point, cases.Source(point.device))
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    measure(
        Case(
            "projection",
            point.layer.name,
            run=lambda: [pmkernels.project_task_vectors(**values, strategy=point.strategy)],
            plain=lambda: [reference.project_task_vectors(**cases.rounded(values, point.dtype))],
            truth=lambda: [reference.project_task_vectors(**cases.exactly(values))],
            least=Bound(2.0 * problem.tasks * problem.n * problem.d * problem.rank, problem.tasks * problem.weight),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, values),
        )
    )


@offers("auto", "fused", "eager", low_rank=True)
def test_projection_and_gradient(measure: Measure, weight_point: Point) -> None:
    point, problem, source = weight_point, weight_point.problem(), cases.Source(weight_point.device)
    weights = cases.make_weights(point, source)
    values = {name: weights[name] for name in ("task_vectors", "A", "B")}
    grad, names = source.normal(point.K, point.r, point.r), ("A", "B")
    ours = functools.partial(pmkernels.project_task_vectors, strategy=point.strategy)
    theirs = functools.partial(cases.forward_and_backward, reference.project_task_vectors)
    measure(
        Case(
            "projection and gradient",
            point.layer.name,
            run=lambda: cases.forward_and_backward(ours, values, names, grad),
            plain=lambda: theirs(cases.rounded(values, point.dtype), names, grad),
            truth=lambda: theirs(cases.exactly(values), names, grad),
            # forward and backward read every task vector once each
            least=Bound(4.0 * problem.tasks * problem.n * problem.d * problem.rank, 2 * problem.tasks * problem.weight),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, values),
        )
    )
