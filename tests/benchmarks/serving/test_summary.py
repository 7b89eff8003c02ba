"""Goals, tables and pictures of made-up figures."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, tables
from benchmarks.common.pages import Goal
from benchmarks.serving import layers, suite, summary
from benchmarks.serving import names as variant_names


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made_up(variant: str, ms: float | None, model: str = "ViT-L/14", **figures: Any) -> dict[str, Any]:
    title = f"{model}, batch 32"
    row = suite.CellRow(op=variant_names.OP, layer=title, dtype="bfloat16", variant=variant, model=model)
    row.plain_error, row.batch, row.preferences = 1e-2, 32, 32
    row.ms = row.p20 = row.p80 = row.p99 = ms
    row.calls, row.images_per_second, row.weight_bytes = 100, 1.0, 100
    return {**asdict(row), **figures}


def made_up_layer(ms: float, projection: str = "in-projection", **figures: Any) -> dict[str, Any]:
    row = layers.ServedRow(
        op=layers.OP,
        layer=f"ViT-L/14 {projection}",
        dtype="bfloat16",
        variant="auto",
        plain_error=1e-2,
        model="ViT-L/14",
        projection=projection,
        items=32,
        rows=8224,
        cache="cold",
    )
    row.ms = row.p20 = row.p80 = ms
    row.bound_ms, row.chosen = 1.0, "streamed"
    return {**asdict(row), **figures}


def report_of(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    about = {"quick": False, "device": device, "dtype": "bfloat16", "tasks": 8, "rank": 16, "peft": None}
    return {**about, "effort": asdict(suite.GPU_EFFORT), "left_out": [], "ceilings": None, "rows": list(rows)}


def gpu_rows(ms: float = 10.3, held: float = 1.01, again: float = 103.0) -> list[dict[str, Any]]:
    ours = made_up(variant_names.ENGINE, ms, to_limit=ms / 10, models=held, peak_models=1.5)
    return [
        made_up(variant_names.LIMIT, 10.0, to_limit=1.0, models=1.0, peak_models=1.2),
        ours,
        made_up(variant_names.REMERGE, 2 * again, to_limit=2 * again / 10),
        made_up(f"{variant_names.REMERGE}{variant_names.GRAPH}", again, to_limit=again / 10),
        made_up(variant_names.COPIES, None, reason="32 merged copies take 6.4 GB of 1.0 GB that are free"),
        # no layer by itself is part of a goal
        made_up_layer(9.0, "out-projection"),
    ]


def test_goals_are_met_or_not_or_not_measured() -> None:
    found = summary.goals(report_of(*gpu_rows()))
    assert [(goal.measured, goal.status) for goal in found] == [
        ("1.030×", "met"),
        ("10.0×", "met"),
        ("1.0100 models", "met"),
    ]
    nothing = summary.goals({"rows": []})
    assert len(nothing) == 4 and {goal.status for goal in nothing} == {"not measured"}
    cpu = report_of(made_up(variant_names.ENGINE, 11.6, "ViT-B/32", to_limit=1.16), device="cpu")
    assert [(goal.measured, goal.status) for goal in summary.goals(cpu)] == [("1.160×", "not met")]
    wrong = {**made_up(variant_names.ENGINE, 1.0, to_limit=0.1), "matched": False, "reason": "wrong features"}
    assert summary.goals(report_of(wrong))[0] == Goal(
        goal="at most 1.03× the plain merged model",
        measured="wrong features",
        status="not measured",
        where="GPU, ViT-L/14, batch 32, 32 preferences",
    )


@pytest.mark.parametrize(
    ("worse", "goals"),
    [({"ms": 10.31}, {0, 1}), ({"again": 102.0}, {1}), ({"held": 1.0101}, {2})],
)
def test_a_goal_is_missed_by_a_little(worse: dict[str, float], goals: set[int]) -> None:
    found = summary.goals(report_of(*gpu_rows(**worse)))
    assert {index for index, goal in enumerate(found) if goal.status == "not met"} == goals


def test_tables_and_pictures_of_a_report(tmp_path: Path) -> None:
    report = report_of(*gpu_rows(), made_up(variant_names.ENGINE, 9.0, to_limit=0.9, preferences=4))
    text = summary.markdown(report)
    assert summary.goals_markdown(report) in text
    assert "| 32 | engine | 10.30 | 10.30–10.30 | 10.30 | 1 | 1.03× | 1.010 | 1.500 |" in text
    assert "| 32 | batched product over merged copies | 32 merged copies take 6.4 GB of 1.0 GB" in text
    tables_of = [line for line in text.splitlines() if line.startswith(("| 32 |", "| 4 |", "| preferences"))]
    assert len({line.count("|") for line in tables_of}) == 1
    shown = [made_up_layer(1.0, items=1, cache=cache) for cache in ("cold", "warm")]
    names = [path.name for path in summary.draw({**report, "rows": [*report["rows"], *shown]}, tmp_path)]
    assert names == ["serving-cuda-vit-l-14.png", "serving-cuda-layers.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_documents_show_the_gpu_and_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    found = tables.block("serving_goals")
    assert "Times on a GPU: **not measured** yet" in found and found.count("| not measured |") == 3
    about = {"command": "c", "quick": False, "environment": {"gpu": "a GPU", "cpu": "a CPU", "torch": "2"}}
    cpu = report_of(made_up(variant_names.ENGINE, 11.0, "ViT-B/32", to_limit=1.1), device="cpu")
    results.write(tmp_path / "serving-2026-01-02.json", {**about, **cpu, "suite": "serving", "date": "2026-01-02"})
    found = tables.block("serving_goals")
    assert "Times on a GPU: **not measured** yet" in found and "| 1.100× | met |" in found and "a CPU" in found
    gpu = {"suites": {"serving": report_of(*gpu_rows())}, "date": "2026-01-01"}
    results.write(tmp_path / "a-gpu-2026-01-01.json", {**about, **gpu})
    found = tables.block("serving_goals")
    # an older result of a GPU is not hidden by a newer one of the CPU
    assert "| 1.030× | met |" in found and "| 1.100× | met |" in found and "**not measured**" not in found
    assert tables.newest("serving") == tmp_path / "serving-2026-01-02.json"
    assert tables.newest("serving", on_gpu=True) == tmp_path / "a-gpu-2026-01-01.json"
