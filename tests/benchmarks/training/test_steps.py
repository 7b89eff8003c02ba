"""What a wrong gradient, a left-out task or an error does to a row, and the suite rehearsed without a GPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import errors
from benchmarks.common.towers import TINY
from benchmarks.training import models, runners, steps, summary
from benchmarks.training import names as variant_names

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case() -> models.Case:
    return models.build_case(TINY, 2, CPU, torch.float32, batch=2)


@pytest.mark.parametrize("group", ["lam", "A", "G", "B"])
def test_a_gradient_that_is_wrong_in_one_group_has_no_time(case: models.Case, group: str) -> None:
    truth, plain = runners.exact_gradient(case)

    class Wrong(runners.Plain):
        factor = 1.0

        def gradient(self) -> errors.Gradient:
            found = super().gradient()
            return {name: self.factor * g if name.startswith(f"{group}.") else g for name, g in found.items()}

    def make(factor: float) -> runners.Runner:
        runner = Wrong(case, lambda p, g: runners.merged_plainly(p, g, runners.combine_product), case.dtype, True)
        runner.factor = factor
        return runner

    def row(factor: float) -> steps.StepRow:
        blank = steps.blank(case, variant_names.STEP, variant_names.ADAMERGING, case.dtype)
        return steps.measure(blank, lambda: make(factor), truth, plain, CPU, 0.0)

    right, wrong = row(1.0), row(1.001)
    assert right.matched and right.ms is not None and right.reason is None
    assert not wrong.matched and wrong.ms is None and wrong.reason == f"wrong gradient of {group}"
    assert wrong.error == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_that_leaves_a_task_out_has_no_time(dtype: torch.dtype) -> None:
    case = models.build_case(TINY, 2, CPU, dtype, batch=2)
    truth, errors = runners.exact_losses(case)

    class Replayed(runners.Limit):
        """As from a graph: the losses are where they were."""

        tasks = 2

        def step(self) -> None:
            if not self.losses:
                return super().step()
            before = self.losses
            super().step()
            for old, new in zip(before[: self.tasks], self.losses, strict=False):
                old.copy_(new)
            self.losses = before

    class Short(Replayed):
        tasks = 1

    def row(kind: type[runners.Limit]) -> steps.StepRow:
        blank = steps.blank(case, variant_names.STEP, variant_names.LIMIT, dtype)
        return steps.measure(blank, lambda: kind(case, False), truth, errors, CPU, 0.0)

    for right in (row(runners.Limit), row(Replayed)):
        assert right.matched and right.ms is not None and 0 < right.error < 0.02
    short = row(Short)
    assert not short.matched and short.ms is None and short.reason == "wrong loss"


def test_images_of_the_wrong_task_are_noticed(case: models.Case) -> None:
    truth, plain = runners.exact_gradient(case)
    swapped = copy.copy(case)
    swapped.images = case.images[::-1]
    rows = {}
    for name, given in (("right", case), ("swapped", swapped)):
        blank = steps.blank(case, variant_names.STEP, variant_names.AUTO, case.dtype)
        rows[name] = steps.measure(
            blank, lambda given=given: runners.Ours(given, "eager", "off"), truth, plain, CPU, 0.0
        )
    assert rows["right"].matched and not rows["swapped"].matched
    runner = runners.Ours(case, "eager", "off")
    before = {name: parameter.clone() for name, parameter in case.learned.items()}
    for _ in range(3):
        runner.step()
    assert all(torch.equal(before[name], parameter) for name, parameter in case.learned.items()), "nothing has moved"
    kept = 1 - runner.settings.betas[0] ** 3
    moments = [state["exp_avg"].reshape(-1) / kept for state in runner.learner.adam.optimizer.state.values()]
    flat = torch.cat([gradient.reshape(-1) for gradient in runner.gradient().values()])
    assert torch.allclose(torch.cat(moments), flat, rtol=1e-5, atol=1e-9), "what Adam was given is what is judged"


def test_out_of_memory_is_a_reason_and_anything_else_is_wrong(case: models.Case) -> None:
    def fails(error: Exception) -> runners.Runner:
        raise error

    def row(error: Exception) -> steps.StepRow:
        blank = steps.blank(case, variant_names.STEP, "fused", case.dtype)
        return steps.measure(blank, lambda: fails(error), {}, {}, CPU, 0.0)

    full = row(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert full.matched and full.ms is None and full.reason == "out of memory"
    broken = row(ValueError("strategy: expected a GPU"))
    assert not broken.matched and broken.ms is None and broken.reason == "ValueError: strategy: expected a GPU"


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """A rehearsal, and that its rows were saved as they came."""
    saved: list[int] = []
    report = steps.run(True, lambda so_far: saved.append(len(so_far["rows"])))
    assert saved == list(range(1, len(report["rows"]) + 1))
    return report


@pytest.mark.slow
def test_every_variant_of_a_rehearsal_has_the_right_gradient(quick: dict[str, Any]) -> None:
    """Float32 against float64, each group of parameters by itself: nobody's mistake hides behind rounding."""
    assert quick["quick"]
    rows = quick["rows"]
    found = {(row["op"], row["variant"]) for row in rows}
    assert found == {(variant_names.STEP, v) for v in steps.VARIANTS[8] if v != variant_names.LIMIT_GRAPH} | {
        (variant_names.DATA_FREE, variant_names.AUTO)
    }
    assert [(row["variant"], row["reason"], row["error"]) for row in rows if not row["matched"] or row["reason"]] == []
    assert all(row["ms"] > 0 and row["host_ms"] > 0 and row["resident_bytes"] > 0 for row in rows)
    judged = [row for row in rows if row["op"] == variant_names.STEP and not row["variant"].startswith("limit")]
    assert all(0 < row["error"] < 1e-4 for row in judged)
    free = next(row for row in rows if row["op"] == variant_names.DATA_FREE)
    assert free["run_measured"] and free["run_steps"] == 3 and free["run_seconds"] > 0


@pytest.mark.slow
def test_a_rehearsal_claims_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    text = summary.markdown(quick)
    assert "these figures measure nothing" in text
    assert {goal.status for goal in summary.goals(quick)} == {"not measured"}
    for variant in runners.OURS:
        assert f"| {variant} | float32 |" in text
    tables = [line for line in text.splitlines() if line.startswith(("| auto", "| variant"))]
    assert len({line.count("|") for line in tables}) == 1
    assert [path.name for path in summary.draw(quick, tmp_path)] == ["training-tiny-vit.png"]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        steps.run(False)
