"""The serving suite, rehearsed; and one tower at one batch: what is right from first to last has a time."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folded_cases import COUNT, CPU, drawn, images, request
from torch import Tensor

from benchmarks import results, run
from benchmarks.serving import folded, layers, suite, summary, variants
from benchmarks.serving import names as variant_names
from pareto_merging import merge


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("quick") / "report.json"
    assert run.main(["--suite", "serving", "--quick", "--out", str(out)]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_a_rehearsal_runs_everything_and_claims_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    on_gpu = torch.cuda.is_available()
    report = quick["suites"]["serving"] if on_gpu else quick
    assert quick["quick"] and quick["environment"]["torch"]
    assert on_gpu or (quick["suite"] == "serving" and report["device"] == "cpu" and report["dtype"] == "float32")
    rows = [row for row in report["rows"] if row["op"] == variant_names.OP]
    cells = {(row["batch"], row["preferences"]) for row in rows}
    assert cells == {(1, 1), (4, 1), (4, 4)}
    for cell in cells:
        names = [row["variant"] for row in rows if (row["batch"], row["preferences"]) == cell]
        left_out = {variant_names.ENGINE_AGAIN} if cell[1] > 1 else set()
        left_out |= set() if on_gpu else {variant_names.ENGINE_DEVICE}
        assert [name for name in names if not name.endswith(variant_names.GRAPH)] == [
            name for name in variants.VARIANTS if name not in left_out
        ]
    unmeasured = {row["variant"] for row in rows if row["ms"] is None and variant_names.GRAPH not in row["variant"]}
    assert unmeasured == (set() if variants.peft_version() else {variant_names.PEFT})
    for row in rows:
        if row["ms"] is not None:
            assert row["matched"] and 0 < row["p20"] <= row["ms"] <= row["p80"] <= row["p99"]
            assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=1e-3)
            assert row["models"] > 0 and row["calls"] == 2
        else:
            assert row["reason"] and row["matched"]
    for cell in cells:
        limits = [
            row["to_limit"]
            for row in rows
            if (row["batch"], row["preferences"]) == cell and row["variant"].startswith("limit")
        ]
        assert min(limits) == 1.0
    of_layers = [row for row in report["rows"] if row["op"] == layers.OP]
    assert {(row["projection"], row["items"], row["cache"]) for row in of_layers} == {
        (name, items, cache)
        for name in ("in-projection", "out-projection")
        for items in (1, 8)
        for cache in ("cold", "warm")
    }
    assert {layers.LIMIT, "auto"} <= {row["variant"] for row in of_layers}
    text = summary.markdown(report)
    assert text.startswith("A rehearsal") and {goal.status for goal in summary.goals(report)} == {"not measured"}
    names = [path.name for path in summary.draw(report, tmp_path)]
    device = report["device"]
    assert names == [f"serving-{device}-tiny-vit.png", f"serving-{device}-layers.png"]


def test_a_rehearsal_does_not_land_among_the_results() -> None:
    for quick, there in ((True, False), (False, True)):
        report = {"suite": "serving", "quick": quick, "date": "2026-01-02"}
        assert (run._default_path(report).parent == results.RESULTS) == there


def report_of(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    about = {"quick": False, "device": device, "dtype": "bfloat16", "tasks": 8, "rank": 16, "peft": None}
    return {**about, "effort": asdict(suite.GPU_EFFORT), "left_out": [], "ceilings": None, "rows": list(rows)}


def test_what_the_cpu_leaves_out_is_said() -> None:
    assert suite.left_out(suite.CPU_BATCHES) == ["ViT-B/32, batch 128", "ViT-L/14, batch 8, 32, 128"]
    assert suite.left_out(suite.GPU_BATCHES) == []
    assert [suite.counts_for(batch, suite.PREFERENCES) for batch in (1, 8, 32, 128)] == [
        [1],
        [1, 4, 8],
        [1, 4, 32],
        [1, 4, 32],
    ]
    report = {**report_of(device="cpu"), "left_out": ["ViT-B/32, batch 128"]}
    assert "Left out on the CPU: ViT-B/32, batch 128." in summary.markdown(report)


def a_cell(case: folded.Case) -> suite.Cell:
    truth = suite.Truth(case, images(), drawn()[0], (1, COUNT))
    return suite.Cell(case, images(), drawn(), truth, COUNT)


def test_only_what_is_right_from_first_to_last_has_a_time(case: folded.Case) -> None:
    cell = a_cell(case)
    calls: dict[str, int] = {}

    def spoilt(name: str, spoil: Callable[[Tensor, int], Tensor]) -> Callable[[], variants.Variant]:
        def make() -> variants.Variant:
            right = variants.looped(case, request(0))

            def answer(x: Tensor, asked: folded.Request) -> Tensor:
                calls[name] = calls.get(name, 0) + 1
                return spoil(right.run(x, asked), calls[name])

            return replace(right, run=answer)

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
    truth = suite.Truth(case, images(), many, (1, 2, 8))
    assert 1e-9 < truth.plain_error < 1e-5
    for items, count in ((1, 1), (2, 2), (4, 4), (3, 2)):
        asked = folded.Request.make(many[:count], items, CPU)
        x = images()[:items]
        found = torch.cat([merge(case.folded, gamma)(item[None]) for item, gamma in zip(x, asked.each, strict=True)])
        assert truth.error(found, items, count) <= 2 * truth.plain_error
        assert count == 1 or truth.error(found, items, 1) > 100 * truth.plain_error
