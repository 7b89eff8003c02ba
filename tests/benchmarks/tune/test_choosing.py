"""What is wrong, fails or is never written is seen; configurations are chosen on made-up times."""

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import modes
from benchmarks.tune import cases as launch_cases
from benchmarks.tune import choosing, compiling
from benchmarks.tune import groups as tune_groups
from pmkernels import dispatch
from pmkernels.configs import Config
from pmkernels.kernels import merge as merge_kernels

CPU = torch.device("cpu")
TARGET = compiling.Target(90, 132, "sm_90")
PRESENT, OTHER, THIRD = Config(block_m=32), Config(block_m=64), Config(block_m=16)
ONE, TWO = launch_cases.Case("merge", 48, 32), launch_cases.Case("merge", 32, 48)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


@pytest.mark.parametrize("op", tune_groups.TUNED)
def test_a_wrong_candidate_is_rejected_however_fast_it_is(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong by a percent, in one column of one result, or NaN in one place: with one configuration only."""
    with compiling.active("sm_90"):
        (group,) = (g for batch in tune_groups.groups(TARGET, [op], None, True) for g in batch)
    bench = choosing.Bench(CPU, compiling.Compiler(0))
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

        monkeypatch.setattr(choosing, "run", spoiled)
        group.rejected.clear()
        group.screened.clear()
        with compiling.active("sm_90"):
            choosing.screen(group, bench, time.monotonic() + 3600)
        assert list(group.screened) == [group.present], wrong.__name__
        assert list(group.rejected) == [spoil]
        assert group.rejected[spoil].startswith("wrong: error"), group.rejected[spoil]


def test_what_is_never_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches into memory of NaNs, and where there was a right result before."""
    bench = choosing.Bench(CPU, compiling.Compiler(0))
    case = launch_cases.Case("merge", 48, 32, tasks=2, dtype="float16")
    prepared = launch_cases.Prepared.make(case, CPU)
    assert bench.attempt(Config(block_n=16, block_d=16), prepared, math.inf) is None
    monkeypatch.setattr(merge_kernels, "merge_weight", lambda *arguments: arguments[-1])
    assert "wrong" in str(bench.attempt(Config(block_n=16, block_d=16), prepared, math.inf))
    with modes.poisoned():
        assert bool(torch.empty(1000).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_launch_that_fails_is_a_reason_and_not_the_end() -> None:
    bench = choosing.Bench(CPU, compiling.Compiler(0))
    prepared = launch_cases.Prepared.make(launch_cases.Case("merge", 48, 32, tasks=2, dtype="float16"), CPU)
    # no power of two
    reason = bench.attempt(Config(block_n=16, block_d=24), prepared, math.inf)
    assert reason is not None and "merge 48×32" in reason and "wrong" not in reason


@pytest.mark.parametrize("op", tune_groups.TUNED)
def test_what_the_library_has_passes_every_check(op: str) -> None:
    """Otherwise the checks would be at fault."""
    bench = choosing.Bench(CPU, compiling.Compiler(0))
    cases = tune_groups.check_cases(op, "16-bit", 32 if op == "linear" else None, 32, True)
    assert len({replace(case, dtype="bfloat16") for case in cases}) >= 7
    # the largest take the interpreter longest
    for case in (case for case in cases if case.tasks <= 4 or case.rank < 16 or case.per_row or not case.aligned):
        prepared = launch_cases.Prepared.make(replace(case, dtype="float16"), CPU)
        config = dispatch.lookup("sm_90", op, "16-bit", 32, 16, case.aligned)
        assert bench.attempt(config, prepared, math.inf) is None, case


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
