"""The serving suite, rehearsed."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, run
from benchmarks.serving import cells, layers, suite, summary, variants
from benchmarks.serving import names as variant_names


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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
    assert [cells.counts_for(batch, suite.PREFERENCES) for batch in (1, 8, 32, 128)] == [
        [1],
        [1, 4, 8],
        [1, 4, 32],
        [1, 4, 32],
    ]
    report = {**report_of(device="cpu"), "left_out": ["ViT-B/32, batch 128"]}
    assert "Left out on the CPU: ViT-B/32, batch 128." in summary.markdown(report)
