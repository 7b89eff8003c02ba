"""The checkpoints suite on a tiny model, on broken files and made-up rows, and its committed result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.checkpoints import cli, writers
from benchmarks.checkpoints import rows as checkpoint_rows

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


def quick(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a run with --quick; nothing but the report is left in ``folder``."""
    out, work = folder / "result.json", folder / "work"
    work.mkdir()
    code = cli.main(["--quick", "--work", str(work), "--out", str(out), *arguments])
    assert list(work.iterdir()) == [], "checkpoints are deleted"
    return code, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_quick_run_goes_from_files_to_exports_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = quick(tmp_path)
    assert [(row["format"], row["status"], row["error"]) for row in report["rows"]] == [
        (name, "done", None) for name in cli.QUICK_FORMATS
    ]
    assert code == 0
    assert report["suite"] == "checkpoints" and report["quick"] and report["environment"]["torch"]
    for row in report["rows"]:
        assert all(value is not None for name, value in row.items() if name != "error"), row
        # K + 1 models are there afterwards: a smaller rise was not measured
        assert row["tasks"] == 2 and row["build_models"] >= 3
        assert row["bound_mib"] >= 3 * row["build_peak_mib"] / row["build_models"]
        assert row["features"] > 0
    assert [row["text_tower"] for row in report["rows"]] == [True, False]
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.QUICK_FORMATS) and "same bits" in shown


def broken(name: str) -> Callable[[Mapping[str, Any], Path, int], list[Path]]:
    """The writer of a format, whose last checkpoint is then cut off."""

    def write(config: Mapping[str, Any], folder: Path, tasks: int) -> list[Path]:
        paths = writers.FORMATS[name].write(config, folder, tasks)
        content = paths[-1].read_bytes()
        paths[-1].write_bytes(content[: len(content) // 2])
        return paths

    return write


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writers.FORMATS, "broken", writers.Format(broken("open_clip-pt")))
    code, report = quick(tmp_path, "--formats", "broken")
    (row,) = report["rows"]
    assert code == 1 and row["status"] == "failed"
    assert "UserError: " in row["error"] and "t2.pt" in row["error"] and row["error"].endswith("(exit code 1)")
    assert row["files_bytes"] > 0 and row["build_seconds"] is None


def test_a_format_that_cannot_be_written_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(config: Mapping[str, Any], folder: Path, tasks: int) -> list[Path]:
        raise OSError("No space left on device")

    monkeypatch.setitem(writers.FORMATS, "full", writers.Format(write))
    code, report = quick(tmp_path, "--formats", "full")
    (row,) = report["rows"]
    assert code == 1 and (row["status"], row["error"]) == ("failed", "OSError: No space left on device")
    assert "failed: OSError: No space left on device" in checkpoint_rows.markdown(report)


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
        assert row.problem(writers.FORMATS[row.format].text_tower) is None
    assert path.name in tables.block("checkpoints")
