"""The products of a step, and the bound that follows from them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import errors, towers
from benchmarks.common.towers import TINY
from benchmarks.training import models
from pareto_merging import learned_parameters
from pareto_merging.model.layer import pareto_modules

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case() -> models.Case:
    return models.build_case(TINY, 2, CPU, torch.float32, batch=2)


@pytest.mark.parametrize("source", towers.BUILDERS)
def test_every_source_has_low_rank_terms_in_both_projections_and_its_products_are_counted(source: str) -> None:
    pytest.importorskip(source)
    tiny = TINY
    case = models.build_case(tiny, 2, CPU, torch.float32, batch=2, source=source)
    assert case.source == source and case.pareto is not None
    shapes = [
        (module._parameters[name].shape, module.pareto_parameter(name).A)  # type: ignore[union-attr]
        for _, module in pareto_modules(case.pareto)
        for name in module.pareto_names
    ]
    low_rank = sorted(tuple(shape) for shape, A in shapes if A is not None)
    assert low_rank == tiny.blocks * [(tiny.width, tiny.width)] + tiny.blocks * [(3 * tiny.width, tiny.width)]
    assert len(learned_parameters(case.pareto)) == len(case.parts) + 3 * len(low_rank)
    found, operations, _ = models.products(case.skeleton, case.images[0].shape, tiny.width)
    plain = towers.vision_transformer(tiny, source)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain.train()(case.images[0])
    counts = counter.get_flop_counts()["Global"]
    of_products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.convolution"))
    # open_clip's last projection is no layer
    projection = 2 * 2 * tiny.width * tiny.output if source == "open_clip" else 0
    assert sum(2 * rows * n * d for rows, n, d, _ in found) == of_products - projection
    attention = sum(counts.values()) - of_products
    assert attention in (0, operations)


def test_the_bound_of_a_step_follows_from_the_rates(case: models.Case) -> None:
    """With memory that costs nothing, three products per layer and task, one less where no input needs a gradient."""
    rates = {"copy": 1e30, "float32": 1e9, "bfloat16": 1e12}
    found, operations, _ = models.products(case.skeleton, case.images[0].shape, case.tower.width)
    expected = sum((3 if inner else 2) * 2 * rows * n * d for rows, n, d, inner in found) + 3 * operations
    assert models.bound_ms(case, rates, torch.float32) == pytest.approx(1e3 * case.tasks * expected / 1e9)
    rows = [row for row in found if not row[3]]
    assert len(rows) == 1, "the patches of the images"
    assert errors.relative_error([torch.ones(1)], [torch.ones(1)]) == 0
