"""merge_weight: W(γ) of one layer, written once from all its parts."""

import torch

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, Point, offers
from pmkernels import costs, reference


@offers("auto", "fused", "eager")
def test_merge(measure: Measure, weight_point: Point) -> None:
    point = weight_point
    weights = cases.make_weights(point, cases.Source(point.device))
    out = torch.empty_like(weights["weight"])
    measure(
        Case(
            "merge",
            point.layer.name,
            run=lambda: [pmkernels.merge_weight(**weights, out=out, strategy=point.strategy)],
            plain=lambda: [reference.merge_weight(**weights)],
            truth=lambda: [reference.merge_weight(**cases.exactly(weights))],
            least=costs.bound("merge", point.problem()),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, weights),
        )
    )
