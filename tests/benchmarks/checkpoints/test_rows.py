"""Made-up rows, and the committed result."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.checkpoints import rows as checkpoint_rows
from benchmarks.checkpoints import writers

pytest.importorskip("open_clip")
pytest.importorskip("transformers")


DONE = checkpoint_rows.Row(
    "ViT-B-32",
    "huggingface",
    "float32",
    8,
    "done",
    text_tower=True,
    files_bytes=5_000_000_000,
    build_seconds=5.0,
    build_peak_mib=3000.0,
    build_models=9.01,
    bound_mib=3010.0,
    learned_mib=3.0,
    within=True,
    step_seconds=6.0,
    peak_mib=4096.0,
    export_seconds=9.0,
    bit_equal=True,
    features=4.0,
    open_clip_error=0.0,
    transformers_error=1e-6,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_tower": False}, "expected a text tower"),
        ({"within": False}, "building took 3000.0 MiB"),
        ({"peak_mib": 24 * 1024.0}, "peak of 24576.0 MiB"),
        ({"bit_equal": False}, "other numbers"),
        ({"open_clip_error": 1e-3}, "in open_clip are off by 0.001"),
        ({"transformers_error": float("nan")}, "in transformers are off by nan"),
    ],
)
def test_a_finished_row_that_keeps_no_promise_is_said(change: dict[str, Any], said: str) -> None:
    assert DONE.problem(text_tower=True) is None
    assert said in (replace(DONE, **change).problem(text_tower=True) or "")


def test_every_model_is_planned_in_every_format() -> None:
    rows = checkpoint_rows.planned(list(checkpoint_rows.MODELS), list(writers.FORMATS))
    for model, tasks in (("ViT-B-32", 8), ("ViT-L-14", 2)):
        own = [row for row in rows if row.model == model]
        assert {row.format for row in own if row.dtype == "float32"} == set(writers.FORMATS)
        assert {row.tasks for row in own} == {tasks}
    assert [row.dtype for row in rows].count("bfloat16") == 1


def test_the_committed_result_is_whole_and_keeps_its_promises() -> None:
    path = tables.newest("checkpoints", False)
    assert path is not None
    report = json.loads(path.read_text())
    assert report["command"].startswith("python -m benchmarks.checkpoints")
    rows = [checkpoint_rows.Row(**row) for row in report["rows"]]
    planned = checkpoint_rows.planned(list(checkpoint_rows.MODELS), list(writers.FORMATS))
    assert [(r.model, r.format, r.dtype, r.tasks) for r in rows] == [
        (r.model, r.format, r.dtype, r.tasks) for r in planned
    ]
    for row in rows:
        assert (row.status, row.error) == ("done", None)
        assert row.problem(row.format not in writers.NO_TEXT_TOWER) is None
    assert path.name in tables.block("checkpoints")
