"""The page of limits: the committed one is current, and says what it predicts."""

from pathlib import Path

import pytest

from benchmarks.limits import goals as predicted_goals
from benchmarks.limits import page as whole_page
from benchmarks.limits import predictions


def test_the_committed_page_is_what_is_written_now(capsys: pytest.CaptureFixture[str]) -> None:
    assert whole_page.main(["--check"]) == 0, "run python -m benchmarks.limits"


def test_check_sees_a_change_and_a_missing_page(tmp_path: Path) -> None:
    out = tmp_path / "limits.md"
    assert whole_page.main(["--check", "--out", str(out)]) == 1
    assert not out.exists()
    assert whole_page.main(["--out", str(out)]) == 0
    assert whole_page.main(["--check", "--out", str(out)]) == 0
    out.write_text(out.read_text().replace("65.5", "65.4", 1))
    changed = out.read_text()
    assert whole_page.main(["--check", "--out", str(out)]) == 1
    assert out.read_text() == changed, "--check writes nothing"


def test_predictions_say_so_and_two_gpus_never_stand_in_one_table() -> None:
    page = whole_page.page()
    titles = [title for title, _ in predictions.DEVICES.values()]
    assert titles[:2] == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]
    rates, _, rest = page.partition("## Whole models: what is counted")
    assert "±25%" in rates
    for section in rest.split("\n## "):
        assert sum(title in section for title in titles) <= 1, section.splitlines()[0]
    for gpu, title in zip(predicted_goals.GOAL_DEVICES, titles, strict=False):
        goals = page.split(f"### {title}: the goals, predicted")[1].split("###")[0]
        assert "**predicted** from counted kernels for this GPU" in goals.replace("\n", " ")
        lines = [line for line in goals.splitlines() if line.startswith("| ")][1:]
        assert len(lines) == len(predicted_goals.goal_lines(gpu)) == 17
        for line in lines:
            predicted = line.split(" | ")[2]
            assert predicted.startswith("*"), line
            assert predicted.endswith(")*"), line
