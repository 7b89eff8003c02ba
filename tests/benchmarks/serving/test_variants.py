"""Every way to serve a preference per item, against the plain model of each item's own."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.folded_cases import COUNT, ITEMS, build, drawn, images, request
from torch import Tensor

from benchmarks.common import errors
from benchmarks.serving import folded, suite, variants
from benchmarks.serving import names as variant_names
from pareto_merging import merge


@pytest.fixture(scope="module")
def exact_case(tmp_path_factory: pytest.TempPathFactory) -> folded.Case:
    return build(tmp_path_factory.mktemp("exact"), torch.float64)


def one_by_one(case: folded.Case, x: Tensor, of: folded.Request) -> Tensor:
    return torch.cat([merge(case.folded, gamma)(item[None]) for item, gamma in zip(x, of.each, strict=True)])


def makers(count: int) -> list[Any]:
    return [
        pytest.param(
            name, marks=[] if name != variant_names.PEFT or variants.peft_version() else pytest.mark.skip("PEFT")
        )
        for name in variants.VARIANTS
        if name != variant_names.ENGINE_DEVICE and (count == 1 or name != variant_names.ENGINE_AGAIN)
    ]


@pytest.mark.parametrize("name", makers(COUNT))
def test_each_variant_is_the_plain_model_of_each_items_own_preference(name: str, exact_case: folded.Case) -> None:
    variant = variants.VARIANTS[name](exact_case, request(0))
    # made for one request, it answers another, unless it says that it cannot
    for number in (0,) if variant.set_up else (0, 1, 0):
        x, asked = images(torch.float64, number), request(number)
        expected = one_by_one(exact_case, x, replace(asked, each=asked.each[:1].expand(ITEMS, -1)))
        if not variant.single:
            other, expected = expected, one_by_one(exact_case, x, asked)
            # what is asked for can be told from what is not
            assert (other[1] - expected[1]).norm() > 1e-3 * expected[1].norm()
        assert errors.item_error(variant.run(x, asked), expected) < 1e-12


def test_an_engine_that_is_asked_for_the_same_again_is_right_and_holds_more(exact_case: folded.Case) -> None:
    again = variants.engine_again(exact_case, request(0, 1))
    before = again.weight_bytes()
    for _ in range(3):
        found = again.run(images(torch.float64), request(0, 1))
    assert errors.item_error(found, one_by_one(exact_case, images(torch.float64), request(0, 1))) < 1e-12
    merged = sum(part.weight.nbytes for part in projections(exact_case))
    assert again.weight_bytes() - before == pytest.approx(merged, rel=0.1)
    truth = suite.Truth(exact_case, images(torch.float64), drawn()[0], (1,))
    cell = suite.Cell(exact_case, images(torch.float64), drawn(), truth, 1)
    cell.add(variant_names.ENGINE_AGAIN, lambda: variants.engine_again(exact_case, request(0, 1)))
    cell.measure(suite.QUICK_EFFORT)
    assert cell.rows[variant_names.ENGINE_AGAIN].weight_bytes == again.weight_bytes()
    with pytest.raises(variants.Unavailable):
        variants.engine_again(exact_case, request(0))


def projections(case: folded.Case) -> list[folded.Projection]:
    found: list[folded.Projection] = []
    folded.tower(case.folded, lambda part: found.append(part) or torch.nn.Identity())  # type: ignore[func-returns-value]
    return found


def test_bytes_of_weights_are_those_that_a_variant_needs(exact_case: folded.Case) -> None:
    parts = projections(exact_case)
    weights = sum(part.weight.nbytes for part in parts)
    low_rank = sum(t.nbytes for part in parts for t in (part.A, part.G, part.B))
    held = {
        name: variants.VARIANTS[name](exact_case, request(0)).weight_bytes()
        for name in (variant_names.LIMIT, variant_names.REMERGE, variant_names.COPIES, variant_names.LOOP)
    }
    plain = held[variant_names.LIMIT]
    assert plain == sum(p.nbytes for p in merge(exact_case.folded, drawn()[0, 0]).parameters())
    assert held[variant_names.REMERGE] == plain + low_rank + weights
    assert held[variant_names.COPIES] == plain + (COUNT - 1) * weights
    assert held[variant_names.LOOP] == pytest.approx(plain + low_rank, rel=0.02)


def test_merged_copies_that_do_not_fit_are_said_not_to(case: folded.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = COUNT * sum(part.weight.nbytes for part in projections(case))
    for free, fits in ((needed / 0.79, True), (needed / 0.81, False)):
        monkeypatch.setattr(variants, "unused_memory", lambda device, free=free: free)
        cell = a_cell(case)
        cell.add(variant_names.COPIES, lambda: variants.merged_copies(case, request(0)))
        row = cell.rows[variant_names.COPIES]
        assert (variant_names.COPIES in cell.ready) == fits and row.matched
        assert fits or (row.reason is not None and row.reason.startswith("2 merged copies take"))


def test_a_graph_reads_what_every_call_gives_it(exact_case: folded.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the graph is played by one that computes again from the tensors that were captured."""

    class Graph:
        def __init__(self, function: Callable[[], Tensor]) -> None:
            self.function, self.found = function, function()

        def replay(self) -> None:
            self.found.copy_(self.function())

    def capture(function: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
        graph = Graph(function)
        return graph, graph.found

    monkeypatch.setattr(variants, "warm_up", lambda function, device: function())
    monkeypatch.setattr(variants, "capture", capture)
    for name in (variant_names.REMERGE, variant_names.LOOP):
        of = variants.VARIANTS[name](exact_case, request(0))
        variant = variants.graphed(of, images(torch.float64), request(0))
        assert variant.weight_bytes() == of.weight_bytes()
        for number in (1, 0):
            x = images(torch.float64, number)
            expected = one_by_one(exact_case, x, request(number))
            assert errors.item_error(variant.run(x, request(number)), expected) < 1e-12

    def refuse(function: Callable[[], Tensor], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(variants, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(variants.Unavailable, match="no CUDA graph of it: operation not permitted"):
        variants.graphed(of, images(torch.float64), request(0))


def a_cell(case: folded.Case) -> suite.Cell:
    truth = suite.Truth(case, images(), drawn()[0], (1, COUNT))
    return suite.Cell(case, images(), drawn(), truth, COUNT)


def test_bytes_are_found_wherever_they_are_held_and_counted_once() -> None:
    a, b, c, d = (torch.zeros(n) for n in (1, 10, 100, 1000))

    def closure() -> Tensor:
        return b

    held = {"views": [a, a.view(1, 1)], "function": closure, "partial": functools.partial(torch.add, c)}
    module = torch.nn.Module()
    module.register_buffer("d", d)
    assert variants.tensor_bytes(held, module, d) == 4 * 1111
