"""A tiny model from files to exports and back, and broken files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import cli, writers
from benchmarks.checkpoints import rows as checkpoint_rows

pytest.importorskip("open_clip")
pytest.importorskip("transformers")


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
        paths = writers.FORMATS[name](config, folder, tasks)
        content = paths[-1].read_bytes()
        paths[-1].write_bytes(content[: len(content) // 2])
        return paths

    return write


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writers.FORMATS, "broken", broken("open_clip-pt"))
    code, report = quick(tmp_path, "--formats", "broken")
    (row,) = report["rows"]
    assert code == 1 and row["status"] == "failed"
    assert "UserError: " in row["error"] and "t2.pt" in row["error"] and row["error"].endswith("(exit code 1)")
    assert row["files_bytes"] > 0 and row["build_seconds"] is None


def test_a_format_that_cannot_be_written_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(config: Mapping[str, Any], folder: Path, tasks: int) -> list[Path]:
        raise OSError("No space left on device")

    monkeypatch.setitem(writers.FORMATS, "full", write)
    code, report = quick(tmp_path, "--formats", "full")
    (row,) = report["rows"]
    assert code == 1 and (row["status"], row["error"]) == ("failed", "OSError: No space left on device")
    assert "failed: OSError: No space left on device" in checkpoint_rows.markdown(report)
