"""The page of limits: the committed one is current, says what it predicts, and which measurements it takes."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.limits import layers as layer_tables
from benchmarks.limits import models as predicted_goals
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


def kernels_report(date: str, gpu: str, ms: float, **changes: Any) -> dict[str, Any]:
    row = {
        "op": "forward",
        "layer": "ViT-L/14 in-projection",
        "dtype": "bfloat16",
        "variant": "streamed",
        "rows": 8224,
        "ms": ms,
    }
    slower = {**row, "variant": "fused", "ms": 9.0}
    limit = {**row, "variant": "limit: merged beforehand", "ms": 0.001}
    wrong = {**row, "variant": "auto", "ms": None}
    other_type = {**row, "dtype": "float32", "ms": 0.001}
    suite = {"tasks": 8, "rank": 16, "rows": [slower, row, limit, wrong, other_type], **changes}
    return {"date": date, "quick": False, "suites": {"kernels": suite}, "environment": {"gpu": gpu}}


def line_of(page: str, title: str) -> list[str]:
    """The cells of that layer's forward at K = 8 in a GPU's section."""
    section = page.split(f"### {title}: ViT-L/14, 32 images")[1].split("**K = 8**")[1]
    line = next(line for line in section.splitlines() if "in-projection" in line and "| forward |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_measured_figures_are_the_newest_of_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = whole_page.page()
    assert line_of(page, "NVIDIA H200").count(layer_tables.NOT_MEASURED) == 2
    assert "No committed `budget-*.json` has this architecture." in page
    results.write(tmp_path / "b.json", kernels_report("2026-01-02", "NVIDIA H200", 0.2))
    results.write(tmp_path / "a.json", kernels_report("2026-01-03", "NVIDIA H200", 0.131))
    results.write(tmp_path / "c.json", {**kernels_report("2026-01-04", "NVIDIA H200", 0.01), "quick": True})
    results.write(tmp_path / "d.json", kernels_report("2026-01-05", "NVIDIA H100 PCIe", 0.02))
    results.write(tmp_path / "e.json", kernels_report("2026-01-06", "NVIDIA H200", 0.03, rank=64))
    page = whole_page.page()
    cells = line_of(page, "NVIDIA H200")
    assert cells[2:4] == ["65.5", "operations"]
    assert "131 streamed, 2.00×" in cells
    assert cells.count(layer_tables.NOT_MEASURED) == 1, "nothing was measured with a cached weight"
    assert line_of(page, "NVIDIA RTX A6000").count(layer_tables.NOT_MEASURED) == 2
    assert line_of(page, "NVIDIA H100 80GB HBM3").count(layer_tables.NOT_MEASURED) == 2, "a PCIe card is another GPU"
    assert "Measured: [`a.json`](results/a.json).\n" in page
    assert page.count("Measured: nothing yet on this GPU.") == 2


@pytest.mark.parametrize("place", ["its own suite", "the training suite"])
def test_the_layer_grid_is_taken_from_either_place(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"op": "forward", "layer": "ViT-L/14 in-projection", "dtype": "bfloat16", "rows": 8224, "tasks": 8}
    rows = [{**row, "variant": "auto", "ms": 0.0983}, {**row, "variant": "cached", "ms": 0.0786}]
    grid = {"rank": 16, "rows": rows}
    suites = {"layers": grid} if place == "its own suite" else {"training": {"layers": grid}}
    results.write(tmp_path / "a.json", {**kernels_report("2026-01-02", "NVIDIA H200", 0.2), "suites": suites})
    cells = line_of(whole_page.page(), "NVIDIA H200")
    assert "98.3 auto, 1.50×" in cells
    assert cells[-1] == "78.6 cached, 1.20×"
    other = {**grid, "rank": 64}
    suites = {"layers": other} if place == "its own suite" else {"training": {"layers": other}}
    results.write(tmp_path / "a.json", {**kernels_report("2026-01-02", "NVIDIA H200", 0.2), "suites": suites})
    assert line_of(whole_page.page(), "NVIDIA H200").count(layer_tables.NOT_MEASURED) == 2, "another rank"


def test_a_committed_budget_is_shown_for_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"kernel": "linear_fwd_kernel", "dtype": "bfloat16", "configuration": "m128 n64 d64 w8 s2", "arch": "sm_86"}
    row |= {"registers": 100, "shared": 10240, "spills": 0, "occupancy": 0.5}
    worse = {**row, "registers": 128, "spills": 3, "occupancy": 0.25}
    other = {**row, "arch": "sm_90", "dtype": "float32"}
    report = {"date": "2026-01-02", "suite": "budget", "rows": [row, worse, other]}
    results.write(tmp_path / "budget-2026-01-02.json", report)
    page = whole_page.page()
    assert "| linear_fwd | m128 n64 d64 w8 s2 | 128 | 10.0 | 3 | 25% |" in page
    assert page.count("### Compiled for sm_90") == 1, "two GPUs of one architecture"
    assert "budget-*.json" in page.split("### Compiled for sm_90")[1].split("### Compiled for sm_86")[0]
