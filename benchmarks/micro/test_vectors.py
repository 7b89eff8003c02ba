"""merge_vectors: all vectors of a vision transformer in one launch, and the gradient of λ."""

import functools

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, TowerPoint, offers
from pmkernels import reference
from pmkernels.costs import Bound


@offers("auto", "fused", "eager")
def test_merge_vectors(measure: Measure, tower_point: TowerPoint) -> None:
    point = tower_point
    values = point.make(cases.Source(point.device))
    weight = values["weight"]
    measure(
        Case(
            "merge of vectors",
            point.tower.name,
            run=lambda: [pmkernels.merge_vectors(**values, strategy=point.strategy)],
            plain=lambda: [reference.merge_vectors(**values)],
            truth=lambda: [reference.merge_vectors(**cases.exactly(values))],
            least=Bound(0.0, float((point.K + 2) * weight.numel() * weight.element_size())),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, {name: values[name] for name in ("weight", "task_vectors", "lam")}),
        )
    )


@offers("auto", "fused", "eager")
def test_vectors_gradient(measure: Measure, tower_point: TowerPoint) -> None:
    point = tower_point
    values = point.make(cases.Source(point.device))
    # Σ_k τ_k, so that no dλ_lk is a sum that cancels
    grad = values["task_vectors"].sum(dim=0)
    arguments = {"task_vectors": values["task_vectors"], "offsets": values["offsets"]}
    theirs = functools.partial(cases.backward, reference.merge_vectors)
    measure(
        Case(
            "gradient of vectors",
            point.tower.name,
            run=lambda: [pmkernels.merge_vectors_gradient(grad, **arguments, strategy=point.strategy)],
            plain=lambda: theirs(values, ["lam"], grad)(),
            truth=lambda: theirs(cases.exactly(values), ["lam"], grad)(),
            least=Bound(0.0, float((point.K + 1) * grad.numel() * grad.element_size())),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, {"grad": grad, "task_vectors": values["task_vectors"]}),
        )
    )
