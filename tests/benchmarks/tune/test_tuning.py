"""A whole run of tuning: a rehearsal on tiny shapes, and the order and the end of its phases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.common import towers
from benchmarks.tune import cli, compiling, tuning
from benchmarks.tune import groups as tune_groups
from pmkernels import configs, dispatch
from pmkernels.strategies import choose

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.bfloat16)
TARGET = compiling.Target(90, 132, "sm_90")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file and the full record of a rehearsal, run as a user would."""
    folder = tmp_path_factory.mktemp("tune")
    out, record = folder / "gpu.json", folder / "record.json"
    command = [sys.executable, "-m", "benchmarks.tune", "--quick", "--out", str(out), "--record", str(record)]
    # the command itself has to see to it that kernels are interpreted
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=results.RESULTS.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none of these figures is a measurement" in done.stdout
    assert "WRONG" not in done.stdout and "REJECTED" not in done.stdout
    return out, record


def test_a_rehearsal_writes_a_file_that_the_library_reads(rehearsal: tuple[Path, Path]) -> None:
    text = rehearsal[0].read_text()
    written = json.loads(text)
    assert "nothing was measured" in written["gpu"]
    assert written["tuned"]["untuned"] == []
    assert configs.read_entries(text)
    with compiling.active("made-up", text):
        assert dispatch.rates("made-up", CPU).measured
        assert dispatch.rates("made-up", CPU).memory == written["rates"]["memory"]
        for entry in configs.read_entries(text):
            rank = min(entry.max_rank or 16, 16)
            found = dispatch.lookup("made-up", entry.op, entry.dtype, entry.max_rows or 2**14, rank, True)
            assert found == entry.config
        for choice in dispatch.in_force().choices("made-up"):
            shape = {"n": choice.n, "d": choice.d, "tasks": choice.tasks, "rank": choice.rank}
            assert choose(choice.op, "auto", LIKE, rows=choice.rows, **shape) == choice.best
    assert "made-up" not in dispatch.in_force().files
    assert dispatch.gpu_file(CPU) == "default"


def test_the_record_has_every_candidate_and_its_times(rehearsal: tuple[Path, Path]) -> None:
    report = json.loads(rehearsal[1].read_text())
    assert {group["op"] for group in report["groups"]} == set(tune_groups.TUNED)
    for group in report["groups"]:
        assert group["candidates"][0]["config"] == group["present"]
        assert len(group["candidates"]) == 2
        for candidate in group["candidates"]:
            assert candidate["rejected"] is None and candidate["final"]
            assert candidate["times"] and min(candidate["times"].values()) > 0
    assert {(s["op"], s["n"], s["rank"]) for s in report["strategies"]} == {
        *((op, n, rank) for op in ("forward", "dx", "weight_grad") for n, rank in ((40, 16), (24, 0))),
        ("preference", 40, 16),
    }
    assert all(set(s["times"]) == {"1", "5", "15"} for s in report["strategies"])
    # a rehearsal is nobody's result
    assert report["quick"]


def test_the_hot_path_is_tuned_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The dW reduction, the widening, the served layer, the merge; then strategies of transformers; then linear."""
    with compiling.active("sm_90"):
        batches = tune_groups.groups(TARGET, tune_groups.OPS, None, False)
    order = list(dict.fromkeys(group.op for batch in batches for group in batch if group.kind == "16-bit"))
    assert order == ["merge_grad", "widen", "preference", "merge", "linear", "weight_grad", "shrink", "factor_grad"]
    done: list[str] = []
    monkeypatch.setattr(tuning, "tune", lambda batch, *_: done.extend(group.op for group in batch))
    strategies_of = lambda s, b, among, *_: done.append(f"strategies of {len(among)}")  # noqa: E731
    monkeypatch.setattr(tuning, "measure_strategies", strategies_of)
    assert cli.main(["--quick", "--minutes", "1", "--out", str(tmp_path / "gpu.json")]) == 0
    hot = ["merge_grad", "widen", "preference", "merge"]
    assert done == [*hot, "strategies of 2", "linear", "weight_grad", "shrink", "factor_grad", "strategies of 0"]


def test_when_time_is_up_everything_stays_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert cli.main(["--quick", "--minutes", "0", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    # every group, the strategies of every layer, and those of the one with a low-rank term at a preference per image
    assert len(written["tuned"]["untuned"]) == len(tune_groups.TUNED) + len(towers.TINY_LAYERS) + 1
    assert written["strategies"] == []
    for entry in configs.read_entries(out.read_text()):
        assert entry.config == dispatch.lookup("default", entry.op, "16-bit", entry.max_rows or 1, 16, True)
    assert "UNTUNED linear 16-bit ≤ 32 rows: not reached" in capsys.readouterr().out


def test_other_ops_keep_the_lines_of_the_file(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    kept = {"op": "shrink", "dtype": "16-bit", "config": {"block_m": 64, "block_d": 32}}
    gone = {"op": "merge", "dtype": "16-bit", "config": {"block_n": 1, "block_d": 16}}
    strategy = {"op": "dx", "dtype": "16-bit", "n": 48, "d": 32, "tasks": 2, "rank": 16, "rows": 1, "best": "fused"}
    out.write_text(json.dumps({"entries": [kept, gone], "strategies": [strategy]}))
    assert cli.main(["--quick", "--minutes", "0", "--ops", "merge", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert kept in written["entries"] and gone not in written["entries"]
    assert written["strategies"] == [strategy]


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(tuning.CONFIGS.iterdir())
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "tune: expected a CUDA GPU, got none (--quick rehearses on the CPU)\n"
    assert captured.out == ""
    assert set(tuning.CONFIGS.iterdir()) == before
