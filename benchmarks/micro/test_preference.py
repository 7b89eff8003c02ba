"""A served layer: preference_linear at a preference per image and row, and its two widenings.

The rows [x | t] are written by a kernel of their own in the ``streamed`` strategy; [W | A] is laid out once a model.
"""

import torch
from torch import Tensor

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, Measure, Point, offers
from pmkernels import costs, reference
from pmkernels.costs import Bound


def make_served(point: Point, items: int) -> dict[str, Tensor]:
    """Return a folded layer's values by the reference's names. Each of ``items`` parts of the rows has one preference.

    A and B are what their values in the model's type are in float32.
    """
    source = cases.Source(point.device)
    weights = cases.make_weights(point, source)
    served = {name: weights[name] for name in ("weight", "A", "G", "B")}
    for name in ("A", "B"):
        served[name] = served[name].to(point.dtype).float()
    x = source.normal(items, point.rows // items, point.layer.d, dtype=point.dtype)
    gamma = torch.softmax(source.normal(items, 1, point.K), dim=-1)
    return {**served, "x": x, "gamma": gamma, "bias": source.normal(point.layer.n, dtype=point.dtype)}


def laid_out(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B in the model's type, its columns contiguous, as a server holds it."""
    return B.to(dtype).t().contiguous().t()


def measure_served(measure: Measure, point: Point, op: str, items: int) -> None:
    """Measure preference_linear with ``items`` preferences."""
    values = make_served(point, items)
    wide = pmkernels.widen_weight(values["weight"], values["A"])
    arguments = {name: values[name] for name in ("x", "G", "gamma", "bias")}
    arguments |= {"wide": wide, "B": laid_out(values["B"], point.dtype)}
    measure(
        Case(
            op,
            point.layer.name,
            run=lambda: [pmkernels.preference_linear(**arguments, strategy=point.strategy)],
            plain=lambda: [reference.pareto_linear(**values)],
            truth=lambda: [reference.pareto_linear(**cases.exactly(values))],
            least=costs.bound("preference", point.problem()),
            dtype=point.dtype,
            choice=point.choice(values, ["preference"], tasks=0),
        )
    )


@offers("auto", "fused", "streamed", "eager", low_rank=True)
def test_served_per_image(measure: Measure, row_point: Point) -> None:
    measure_served(measure, row_point, "served, a preference per image", row_point.images)


@offers("auto", "fused", "streamed", "eager", low_rank=True)
def test_served_per_row(measure: Measure, row_point: Point) -> None:
    measure_served(measure, row_point, "served, a preference per row", row_point.rows)


@offers("fused", "eager", low_rank=True)
def test_widen_rows(measure: Measure, row_point: Point) -> None:
    point, problem = row_point, row_point.problem(tasks=0)
    values = make_served(point, point.images)
    x, G, B, gamma = values["x"], values["G"], laid_out(values["B"], point.dtype), values["gamma"]
    width = pmkernels.widen_weight(values["weight"], values["A"]).shape[1]

    def plain(x: Tensor, G: Tensor, B: Tensor, gamma: Tensor) -> list[Tensor]:
        t = (x @ B).to(G.dtype) @ reference.preference_core(G, gamma.squeeze(1)).transpose(1, 2)
        zeros = x.new_zeros(*x.shape[:-1], width - x.shape[-1] - t.shape[-1])
        return parts(torch.cat([x, t.to(x.dtype), zeros], dim=-1))

    def parts(wide: Tensor) -> list[Tensor]:
        return [wide[..., : point.layer.d], wide[..., point.layer.d :]]

    def fused() -> list[Tensor]:
        from pmkernels.kernels import preference as kernels

        return parts(kernels.widen(x, G, B, gamma.squeeze(1)))

    measure(
        Case(
            "widening of rows",
            point.layer.name,
            run=fused if point.strategy == "fused" else lambda: plain(x, G, B, gamma),
            plain=lambda: plain(x, G, B, gamma),
            truth=lambda: plain(x.double(), G.double(), B.double(), gamma.double()),
            least=Bound(
                2.0 * problem.rows * problem.d * problem.rank, problem.rows * (problem.d + width) * problem.size
            ),
            dtype=point.dtype,
            choice=point.strategy,
        )
    )


@offers("eager", low_rank=True)
def test_widen_weight(measure: Measure, weight_point: Point) -> None:
    point = weight_point
    weights = cases.make_weights(point, cases.Source(point.device))
    weight, A = weights["weight"], weights["A"]
    wide = pmkernels.widen_weight(weight, A)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        zeros = A.new_zeros(A.shape[0], wide.shape[1] - weight.shape[1] - A.shape[1])
        return [torch.cat([part.to(dtype) for part in (weight, A, zeros)], dim=1)]

    size = weight.element_size()
    measure(
        Case(
            "widening of the weight",
            point.layer.name,
            run=lambda: [pmkernels.widen_weight(weight, A)],
            plain=lambda: plain(point.dtype),
            truth=lambda: plain(torch.float64),
            least=Bound(0.0, float(size * (weight.numel() + wide.numel()) + A.element_size() * A.numel())),
            dtype=point.dtype,
            choice="eager",
        )
    )
