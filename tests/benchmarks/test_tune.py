"""Tuning: a rehearsal on tiny shapes, and the choice of configurations and strategies on made-up times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import results
from benchmarks.common import modes, session, towers
from benchmarks.tune import bench as bench_module
from benchmarks.tune import cases as launch_cases
from benchmarks.tune import choosing, cli, compiling, files, judging, strategies, trials, tuning
from benchmarks.tune import groups as tune_groups
from pmkernels import configs, dispatch
from pmkernels.configs import Config
from pmkernels.kernels import merge as merge_kernels
from pmkernels.strategies import choose

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.bfloat16)
TARGET = compiling.Target(90, 132, "sm_90")
PRESENT, OTHER, THIRD = Config(block_m=32), Config(block_m=64), Config(block_m=16)
ONE, TWO = launch_cases.Case("merge", 48, 32), launch_cases.Case("merge", 32, 48)

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
    with trials.active("made-up", text):
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


@pytest.mark.parametrize("op", tune_groups.TUNED)
def test_a_wrong_candidate_is_rejected_however_fast_it_is(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong by a percent, in one column of one result, or NaN in one place: with one configuration only."""
    with trials.active("sm_90"):
        (group,) = (g for batch in tune_groups.groups(TARGET, [op], None, True) for g in batch)
    bench = bench_module.Bench(CPU, compiling.Compiler(0))
    correct, spoil = launch_cases.run, group.candidates[1]

    def percent(found: list[Tensor]) -> None:
        found[-1].mul_(1.01)

    def column(found: list[Tensor]) -> None:
        found[0][..., -1] *= 1.1

    def hole(found: list[Tensor]) -> None:
        found[0].view(-1)[0] = torch.nan

    for wrong in (percent, column, hole):

        def spoiled(case: launch_cases.Case, values: launch_cases.Values, wrong: Any = wrong) -> list[Tensor]:
            found = correct(case, values)
            if dispatch.lookup("sm_90", op, "16-bit", case.rows, case.rank, True) == spoil:
                wrong(found)
            return found

        monkeypatch.setattr(bench_module, "run", spoiled)
        group.rejected.clear()
        group.screened.clear()
        with trials.active("sm_90"):
            choosing.screen(group, bench, time.monotonic() + 3600)
        assert list(group.screened) == [group.present], wrong.__name__
        assert list(group.rejected) == [spoil]
        assert group.rejected[spoil].startswith("wrong: error"), group.rejected[spoil]


def test_what_is_never_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches into memory of NaNs, and where there was a right result before."""
    bench = bench_module.Bench(CPU, compiling.Compiler(0))
    case = launch_cases.Case("merge", 48, 32, tasks=2, dtype="float16")
    prepared = judging.Prepared.make(case, CPU)
    assert bench.attempt(Config(block_n=16, block_d=16), prepared, 0.0) is None
    monkeypatch.setattr(merge_kernels, "merge_weight", lambda *arguments: arguments[-1])
    assert "wrong" in str(bench.attempt(Config(block_n=16, block_d=16), prepared, 0.0))
    with modes.poisoned():
        assert bool(torch.empty(1000).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_launch_that_fails_is_a_reason_and_not_the_end() -> None:
    bench = bench_module.Bench(CPU, compiling.Compiler(0))
    prepared = judging.Prepared.make(launch_cases.Case("merge", 48, 32, tasks=2, dtype="float16"), CPU)
    # no power of two
    reason = bench.attempt(Config(block_n=16, block_d=24), prepared, 0.0)
    assert reason is not None and "merge 48×32" in reason and "wrong" not in reason


@pytest.mark.parametrize("op", tune_groups.TUNED)
def test_what_the_library_has_passes_every_check(op: str) -> None:
    """Otherwise the checks would be at fault."""
    bench = bench_module.Bench(CPU, compiling.Compiler(0))
    cases = tune_groups.check_cases(op, "16-bit", 32 if op == "linear" else None, 32, True)
    assert len({replace(case, dtype="bfloat16") for case in cases}) >= 7
    # the largest take the interpreter longest
    for case in (case for case in cases if case.tasks <= 4 or case.rank < 16 or case.per_row or not case.aligned):
        prepared = judging.Prepared.make(replace(case, dtype="float16"), CPU)
        config = dispatch.lookup("sm_90", op, "16-bit", 32, 16, case.aligned)
        assert bench.attempt(config, prepared, 0.0) is None, case


def test_the_best_is_the_best_on_average_over_shapes() -> None:
    times = {
        PRESENT: {ONE: 10.0, TWO: 1000.0},
        # twice as fast on the small one, a tenth slower on the large one
        OTHER: {ONE: 5.0, TWO: 1100.0},
        THIRD: {ONE: 9.9, TWO: 990.0},
    }
    found = choosing.scores(times)
    assert [config for config, _ in found] == [OTHER, THIRD, PRESENT]
    assert found[0][1] == pytest.approx((1100 / 990) ** 0.5)
    assert found[2][1] == pytest.approx((10 / 5 * 1000 / 990) ** 0.5)
    # a gain of one percent is none
    assert choosing.better(times, PRESENT) == [OTHER]
    assert choosing.better({PRESENT: {ONE: 1.0}, OTHER: {ONE: 0.99}}, PRESENT) == []
    # the present one was rejected: anything that is right will do
    assert choosing.better({OTHER: {ONE: 2.0}, THIRD: {ONE: 1.0}}, PRESENT) == [THIRD, OTHER]
    # only what all have a time for counts
    assert choosing.better({PRESENT: {ONE: 1.0, TWO: 9.0}, OTHER: {ONE: 2.0}}, PRESENT) == []


def made_up(op: str, max_rows: int | None, chosen: Config | None, present: Config = PRESENT) -> tune_groups.Group:
    return tune_groups.Group(op, "16-bit", max_rows, None, [present, OTHER], [], [], [], chosen=chosen)


def test_a_bucket_below_a_tuned_one_keeps_what_it_had() -> None:
    found = [made_up("linear", None, None), made_up("linear", 128, OTHER), made_up("linear", 32, None)]
    assert [(line["max_rows"], line["config"]["block_m"]) for line in files.lines(found)] == [(32, 32), (128, 64)]
    # neighbours that agree are one line
    found[2].chosen = OTHER
    assert [line.get("max_rows") for line in files.lines(found)] == [128]
    found[0].chosen = THIRD
    assert [(line.get("max_rows"), line["config"]["block_m"]) for line in files.lines(found)] == [(128, 64), (None, 16)]
    assert all(line["aligned"] for line in files.lines(found))
    # only what changed is written, unless nothing did
    found = [made_up("linear", None, None), made_up("shrink", None, OTHER)]
    assert [line["op"] for line in files.lines(found)] == ["shrink"]
    assert "aligned" not in files.lines(found)[0]
    assert [line["op"] for line in files.lines([*found[:1], made_up("merge", None, None)])] == ["linear", "merge"]


def test_a_file_that_says_something_else_is_seen() -> None:
    with trials.active("sm_90"):
        of_few = tune_groups.group(TARGET, "linear", "16-bit", 32, None, towers.TINY_LAYERS, None, True)
        of_more = tune_groups.group(TARGET, "linear", "16-bit", 128, None, towers.TINY_LAYERS, None, True)
    of_more.chosen = of_more.candidates[1]
    groups = [of_few, of_more]

    def faults(lines: list[dict[str, Any]], labels: dict[strategies.Point, dict[int, str]]) -> list[str]:
        text = json.dumps({"architectures": ["sm_90"], "entries": lines, "strategies": []})
        return files.validate("made-up", text, groups, "sm_90", labels, LIKE)

    assert faults(files.lines(groups), {}) == []
    assert any("at 8 rows" in fault for fault in faults(files.lines(groups)[1:], {}))
    assert any("at 128 rows" in fault for fault in faults(files.lines(groups)[:1], {}))
    point = strategies.Point("forward", 3072, 1024, 8, 16)
    assert faults(files.lines(groups), {point: {1: "fused", 8224: "streamed"}}) == []
    assert len(faults(files.lines(groups), {point: {1: "streamed", 8224: "streamed"}})) == 1


def test_ties_make_no_crossover() -> None:
    times = {1: (1.0, 2.0), 2: (1.0, 0.99), 4: (1.0, 1.5), 8: (3.0, 3.01), 16: (4.0, 2.0), 32: (4.0, 4.0)}
    best = {1: "fused", 2: "fused", 4: "fused", 8: "fused", 16: "streamed", 32: "streamed"}
    assert strategies.decided(times) == best
    assert strategies.decided({1: (1.0, 1.0), 2: (2.0, 1.0)}) == {1: "streamed", 2: "streamed"}
    assert strategies.decided({1: (1.0, 1.0)}) == {}
    # wrong is slower than anything
    assert strategies.decided({1: (session.FAILED, 5.0)}) == {1: "streamed"}


def test_a_file_has_both_sides_of_each_crossover_where_the_model_is_wrong() -> None:
    rows = [2**power for power in range(15)]
    best = {m: "streamed" if m >= 512 or m == 2 else "fused" for m in rows}
    assert strategies.boundaries(best, best) == {}
    always = dict.fromkeys(rows, "fused")
    found = strategies.boundaries(best, always)
    assert found == {1: "fused", 2: "streamed", 4: "fused", 256: "fused", 512: "streamed"}
    assert list(strategies.boundaries(always, best).values()) == ["fused"]
    # the library then says at every measured number of rows, and between them, what was measured
    point = strategies.Point("forward", 3072, 1024, 8, 16)
    times = {point: {m: (1.0, 2.0) if label == "fused" else (2.0, 1.0) for m, label in best.items()}}
    with trials.active("sm_90"):
        lines, labels = strategies.choices(times, LIKE)
    assert labels == {point: best}
    text = json.dumps({"architectures": ["sm_90"], "entries": [], "strategies": lines})
    with trials.active("made-up", text):
        assert {m: point.choose(m, LIKE) for m in rows} == best
        assert [point.choose(m, LIKE) for m in (300, 400, 10**6)] == ["fused", "streamed", "streamed"]


def test_candidates_are_few_distinct_and_begin_with_what_there_is() -> None:
    previous = {"op": "linear", "dtype": "16-bit", "config": {"block_m": 8, "num_warps": 2}}
    with trials.active("sm_90"):
        batches = tune_groups.groups(TARGET, tune_groups.OPS, json.dumps({"entries": [previous]}), False)
        found = [group for batch in batches for group in batch]
        for group in found:
            assert 2 <= len(group.candidates) == len(set(group.candidates)) <= tune_groups.MOST
            rows = group.max_rows or 2**14
            assert group.present == dispatch.lookup("sm_90", group.op, group.kind, rows, 16, True)
            assert dispatch.lookup("default", group.op, group.kind, rows, 16, True) in group.candidates
            if group.op in ("weight_grad", "merge_grad"):
                # the partial sums of P and Q stay below a weight
                assert all(min(c.block_n, c.block_d) >= 64 for c in group.candidates)
            if (group.op, group.kind) == ("linear", "16-bit"):
                assert group.candidates[1].block_m == 8 or group.candidates[2].block_m == 8
            assert all(case.op == group.op and case.kind == group.kind for case in (*group.cases, *group.checks))
            if group.max_rows is not None:
                assert all(case.rows <= group.max_rows for case in (*group.cases, *group.checks))
    assert {group.op for group in found} == set(tune_groups.TUNED)
    assert [group.kind for group in found] == sorted(
        (group.kind for group in found), key=["16-bit", "tf32", "float32"].index
    )


def test_the_hot_path_is_tuned_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The dW reduction, the widening, the served layer, the merge; then strategies of transformers; then linear."""
    with trials.active("sm_90"):
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


def test_kernels_are_compiled_ahead_as_they_will_be_launched() -> None:
    """In a process that does not interpret: what the meta device records has the keys that a launch has, compiles in
    a forked worker, and what spills is a fault.
    """
    program = """
import time, torch
from benchmarks.common.launches import Launch, instead_of_launches
from benchmarks.tune import cases, compiling, trials
from pmkernels.configs import Config
from pmkernels.kernels import merge as merge_kernels
target = compiling.Target(90, 132, "sm_90")
compiler = compiling.Compiler(1)
compiler.target = target
case = cases.Case("merge", 48, 32, tasks=2)
good, bad = Config(block_n=16, block_d=32, num_warps=4), Config(block_n=64, block_d=128, num_warps=1, unroll=8)
until = time.monotonic() + 100
with trials.active("sm_90"):
    (launch,) = compiling.launches(case, good, target)
    real = []
    record = lambda before, kernel, *a, grid, warmup, **o: real.append(Launch.of(kernel, a, o))
    with instead_of_launches(record), trials.trial("merge", good):
        cases.run(case, cases.inputs(case, torch.device("cpu")))
    assert real == [launch], real
    for config in (good, good, bad):
        compiler.submit(config, [case])
    assert len(compiler.futures) == 2, "the same kernel twice"
    assert compiler.fault(good, case, until) is None
    assert "spill" in compiler.fault(bad, case, until), compiler.fault(bad, case, until)
    compiler.submit(Config(block_n=16, block_d=64), [case])
    assert compiler.fault(Config(block_n=16, block_d=64), case, 0.0).startswith("not reached")
assert not compiler.failed, compiler.failed
compiler.close()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
