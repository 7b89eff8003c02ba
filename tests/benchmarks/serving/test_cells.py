"""One tower at one batch: what is right from first to last has a time."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import towers
from benchmarks.serving import cells, folded, suite, summary, variants
from pareto_merging import merge

CPU = torch.device("cpu")
ITEMS, COUNT = 4, 2


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(folder: Path, dtype: torch.dtype) -> folded.Case:
    return folded.build_case(towers.TINY.name, suite.TINY_ENCODER, folder, dtype, CPU)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> folded.Case:
    return build(tmp_path_factory.mktemp("single"), torch.float32)


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(ITEMS, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def drawn() -> Tensor:
    return folded.preferences(COUNT)


def request(number: int, count: int = COUNT) -> folded.Request:
    return folded.Request.make(drawn()[number][:count], ITEMS, CPU)


def a_cell(case: folded.Case) -> cells.Cell:
    truth = cells.Truth.of(case, images(), drawn()[0], (1, COUNT))
    return cells.Cell(case, images(), drawn(), truth, COUNT)


def test_only_what_is_right_from_first_to_last_has_a_time(case: folded.Case) -> None:
    cell = a_cell(case)
    calls: dict[str, int] = {}

    def spoilt(name: str, spoil: Callable[[Tensor, int], Tensor]) -> Callable[[], variants.Variant]:
        def make() -> variants.Variant:
            right = variants.looped(case, request(0))

            def answer(x: Tensor, asked: folded.Request) -> Tensor:
                calls[name] = calls.get(name, 0) + 1
                return spoil(right.run(x, asked), calls[name])

            return replace(right, name=name, run=answer)

        return make

    one_item = torch.tensor([1.0, 1.0, 1.0001, 1.0])[:, None]
    spoil: dict[str, Callable[[Tensor, int], Tensor]] = {
        "right": lambda y, call: y,
        "one item a little off": lambda y, call: y * one_item,
        "mixed up between users": lambda y, call: y[[1, 0, 2, 3]],
        "an item too few": lambda y, call: y[:-1],
        "no number": lambda y, call: y / 0 * 0,
        # the first call is judged before, the second in the first round
        "wrong once it is timed": lambda y, call: y if call == 1 else 2 * y,
    }
    for name, function in spoil.items():
        cell.add(name, spoilt(name, function))
    cell.add("fails", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    cell.measure(suite.QUICK_EFFORT)
    rows = cell.rows
    assert {name for name, row in rows.items() if row.matched} == {"right"}
    assert {name for name, row in rows.items() if row.ms is not None} == {"right"}
    assert rows["one item a little off"].error == pytest.approx(1e-4, rel=0.1)
    assert rows["fails"].reason == "ZeroDivisionError: division by zero"
    assert calls["mixed up between users"] == 1 and calls["wrong once it is timed"] > 1
    found = summary.markdown(report_of(*map(asdict, rows.values())))
    assert "| mixed up between users | wrong (wrong features): error" in found


def test_the_truth_of_fewer_items_and_of_fewer_preferences(case: folded.Case) -> None:
    many = folded.preferences(8)[0]
    truth = cells.Truth.of(case, images(), many, (1, 2, 8))
    assert 1e-9 < truth.plain_error < 1e-5
    for items, count in ((1, 1), (2, 2), (4, 4), (3, 2)):
        asked = folded.Request.make(many[:count], items, CPU)
        x = images()[:items]
        found = torch.cat([merge(case.folded, gamma)(item[None]) for item, gamma in zip(x, asked.each, strict=True)])
        assert truth.error(found, items, count) <= 2 * truth.plain_error
        assert count == 1 or truth.error(found, items, 1) > 100 * truth.plain_error


def report_of(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    about = {"quick": False, "device": device, "dtype": "bfloat16", "tasks": 8, "rank": 16, "peft": None}
    return {**about, "effort": asdict(suite.GPU_EFFORT), "left_out": [], "ceilings": None, "rows": list(rows)}
