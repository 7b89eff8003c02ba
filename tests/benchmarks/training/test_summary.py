"""Goals and tables of made-up figures."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import names as variant_names
from benchmarks.training import steps, summary


def made_up(model: str, variant: str, dtype: str = "bfloat16", **figures: Any) -> dict[str, Any]:
    title = f"{model}, K = 8"
    row = steps.StepRow(op=variant_names.STEP, layer=title, dtype=dtype, variant=variant, model=model, tasks=8)
    for name, value in {"p20": 1.0, "p80": 1.0, "host_ms": 1.0, **figures}.items():
        setattr(row, name, value)
    return vars(row)


def report_of(*rows: dict[str, Any]) -> dict[str, Any]:
    ceilings = {"copy": 1e12, "bfloat16": 1e14, "float32": 1e13}
    about = {"quick": False, "batch": 32, "classes": 100, "rank": 16, "ceilings": ceilings, "sources": {}}
    return {**about, "rows": list(rows), "profiles": {}}


def test_goals_are_met_or_not_or_not_measured(tmp_path: Path) -> None:
    ours = made_up("ViT-B/32", variant_names.AUTO, ms=22.0, peak_bytes=30, run_seconds=88.0)
    limit = made_up("ViT-B/32", variant_names.LIMIT_GRAPH, ms=19.2)
    same = made_up("ViT-B/32", variant_names.ADAMERGING, ms=21.0, peak_bytes=91)
    wide = made_up("ViT-B/32", variant_names.ADAMERGING, "float32", ms=65.0, peak_bytes=200)
    large = made_up("ViT-L/14", variant_names.AUTO, ms=376.0, peak_bytes=100, run_seconds=1504.0)
    full = made_up("ViT-L/14", variant_names.ADAMERGING, "float32", reason="out of memory")
    free = {**made_up("ViT-B/32", variant_names.AUTO, ms=2.0, run_seconds=10.5), "op": variant_names.DATA_FREE}
    report = report_of(ours, limit, same, wide, large, full, {**free, "run_measured": True})
    small = [goal for goal in summary.goals(report) if goal.where == "ViT-B/32"]
    assert [(goal.measured, goal.status) for goal in small] == [
        ("1.15×", "met"),
        ("1.05× the time, 0.33 of the memory", "met"),
        ("3.0×", "not met"),
        ("88 s, computed from the step", "met"),
        ("10.5 s, measured", "not met"),
    ]
    others = [goal for goal in summary.goals(report) if goal.where == "ViT-L/14"]
    assert [(goal.measured, goal.status) for goal in others] == [
        ("", "not measured"),
        ("", "not measured"),
        ("out of memory", "not measured"),
        ("1504 s, computed from the step", "not met"),
    ]
    text = summary.markdown({**report, "profiles": {"ViT-L/14": [{"kernel": "a|b", "calls": 3, "ms": 1, "share": 1}]}})
    assert summary.goals_markdown(report) in text
    assert "| layer-wise AdaMerging's computation | float32 | out of memory |" in text
    assert "| `a\\|b` | 3 | 1.000 | 100.0% |" in text
    # the limit of its own model and K
    assert "| 22.00 | 1.00–1.00 | 1.15× |" in text
    names = [path.name for path in summary.draw(report, tmp_path)]
    assert names == ["training-vit-b-32.png", "training-vit-l-14.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


@pytest.mark.parametrize(
    ("figure", "worse", "goal"), [("ms", 22.1, 0), ("peak_bytes", 31, 1), ("ms", 22.1, 1), ("run_seconds", 90.5, 6)]
)
def test_a_goal_is_missed_by_a_little(figure: str, worse: float, goal: int) -> None:
    ours = {"ms": 22.0, "peak_bytes": 30, "run_seconds": 88.0}
    rest = [made_up("ViT-B/32", variant_names.LIMIT_GRAPH, ms=19.2)]
    rest += [made_up("ViT-B/32", variant_names.ADAMERGING, ms=21.0, peak_bytes=91)]
    status = [
        summary.goals(report_of(made_up("ViT-B/32", variant_names.AUTO, **figures), *rest))[goal].status
        for figures in (ours, {**ours, figure: worse})
    ]
    assert status == ["met", "not met"]


def test_a_wrong_row_is_no_figure_of_a_goal() -> None:
    ours = {**made_up("ViT-B/32", variant_names.AUTO, ms=1.0, run_seconds=1.0), "matched": False, "error": 0.5}
    report = report_of(
        {**ours, "reason": "wrong gradient of G"}, made_up("ViT-B/32", variant_names.LIMIT_GRAPH, ms=20.0)
    )
    assert {goal.status for goal in summary.goals(report)} == {"not measured"}
    without = report_of({**ours, "ms": None, "reason": "wrong gradient of G"})
    assert "wrong (wrong gradient of G): error 5.0e-01" in summary.markdown(without)
