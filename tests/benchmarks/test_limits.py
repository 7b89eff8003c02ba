"""The page of limits: what it counts, which measurements it takes, and that the committed one is current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, results
from pmkernels import costs, dispatch

H200 = "nvidia-h200"


def vit(tower: limits.Tower) -> torch.nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    with torch.device("meta"):
        return transformer.VisionTransformer(
            image_size=224,
            patch_size=tower.patch,
            width=tower.width,
            layers=tower.blocks,
            heads=tower.width // 64,
            mlp_ratio=4.0,
            output_dim=tower.output,
        )


def test_the_committed_page_is_what_is_written_now(capsys: pytest.CaptureFixture[str]) -> None:
    assert limits.main(["--check"]) == 0, "run python -m benchmarks.limits"


def test_check_sees_a_change_and_a_missing_page(tmp_path: Path) -> None:
    out = tmp_path / "limits.md"
    assert limits.main(["--check", "--out", str(out)]) == 1
    assert not out.exists()
    assert limits.main(["--out", str(out)]) == 0
    assert limits.main(["--check", "--out", str(out)]) == 0
    out.write_text(out.read_text().replace("65.5", "65.4", 1))
    changed = out.read_text()
    assert limits.main(["--check", "--out", str(out)]) == 1
    assert out.read_text() == changed, "--check writes nothing"


@pytest.mark.parametrize("tower", limits.TOWERS, ids=lambda tower: tower.name)
def test_a_tower_is_what_open_clip_builds_and_torch_counts(tower: limits.Tower) -> None:
    model = vit(tower)
    assert tower.parameters == sum(parameter.numel() for parameter in model.parameters())
    images = torch.empty(limits.BATCH, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    for tasks in (1, 3):
        counted = limits.step(tower, tasks, H200).operations
        assert counted == pytest.approx(tasks * counter.get_total_flops(), rel=1e-9)


def test_bounds_of_the_design_page() -> None:
    """Section 3 of the design: GEMM and assembly of the in-projection of ViT-L/14, K = 8, on two GPUs."""
    layer = limits.TOWERS[1].block_layers(32)[0]
    for gpu, gemm, merge in ((H200, 65.5, 14.6), ("nvidia-rtx-a6000", 334, 82)):
        rates = limits.rates_of(gpu)
        forward, whole = (costs.bound(operation, limits.problem(layer, 8)) for operation in ("forward", "merge"))
        assert forward.seconds(rates, limits.KIND) * 1e6 == pytest.approx(gemm, rel=0.01)
        assert whole.seconds(rates, limits.KIND) * 1e6 == pytest.approx(merge, rel=0.01)


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
@pytest.mark.parametrize("operation", ["forward", "dx", "weight_grad"])
def test_predictions_are_those_that_choose_a_strategy(operation: str, strategy: str) -> None:
    """Off the GPU the dispatcher counts for an H200: the tiles, splits and rates here are the same."""
    for layers in limits.GROUPS.values():
        for layer in layers:
            counted = limits.problem(layer, 8)
            expected = dispatch.predicted_seconds(
                limits.configuration_file(H200), limits.rates_of(H200), operation, strategy, counted
            )
            assert limits.predicted(operation, strategy, counted, H200) == pytest.approx(expected)


def test_a_step_adds_the_assembly_and_the_task_vectors_to_the_limit() -> None:
    tower, tasks = limits.TOWERS[0], 8
    rates, found = limits.rates_of(H200), limits.step(limits.TOWERS[0], tasks, H200)
    extra = 0.0
    for product in limits.products(tower, tasks):
        merge, gradient, plain = (
            costs.bound(name, product.problem, cached=name == "forward").seconds(rates, limits.KIND)
            for name in ("merge", "weight_grad", "forward")
        )
        extra += product.times * (merge + tasks * (gradient - plain))
    assert found.bound - found.limit == pytest.approx(extra)
    assert found.predicted["cached"] < found.predicted["streamed"]


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
    page = limits.page()
    assert line_of(page, "NVIDIA H200").count(limits.NOT_MEASURED) == 2
    assert "No committed `budget-*.json` has this architecture." in page
    results.write(tmp_path / "b.json", kernels_report("2026-01-02", "NVIDIA H200", 0.2))
    results.write(tmp_path / "a.json", kernels_report("2026-01-03", "NVIDIA H200", 0.131))
    results.write(tmp_path / "c.json", {**kernels_report("2026-01-04", "NVIDIA H200", 0.01), "quick": True})
    results.write(tmp_path / "d.json", kernels_report("2026-01-05", "NVIDIA H100 PCIe", 0.02))
    results.write(tmp_path / "e.json", kernels_report("2026-01-06", "NVIDIA H200", 0.03, rank=64))
    page = limits.page()
    cells = line_of(page, "NVIDIA H200")
    assert cells[2:4] == ["65.5", "operations"]
    assert "131 streamed, 2.00×" in cells
    assert cells.count(limits.NOT_MEASURED) == 1, "nothing was measured with a cached weight"
    assert line_of(page, "NVIDIA RTX A6000").count(limits.NOT_MEASURED) == 2
    assert "Measured: [`a.json`](results/a.json).\n" in page
    assert page.count("Measured: nothing yet on this GPU.") == 1


def test_the_layer_grid_is_taken_from_the_training_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"op": "forward", "layer": "ViT-L/14 in-projection", "dtype": "bfloat16", "rows": 8224, "tasks": 8}
    rows = [{**row, "variant": "auto", "ms": 0.0983}, {**row, "variant": "cached", "ms": 0.0786}]
    grid = {"rank": 16, "rows": rows}
    report = {**kernels_report("2026-01-02", "NVIDIA H200", 0.2), "suites": {"training": {"layers": grid}}}
    results.write(tmp_path / "a.json", report)
    cells = line_of(limits.page(), "NVIDIA H200")
    assert "98.3 auto, 1.50×" in cells
    assert cells[-1] == "78.6 cached, 1.20×"


def test_a_committed_budget_is_shown_for_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"kernel": "linear_fwd_kernel", "dtype": "bfloat16", "configuration": "m128 n64 d64 w8 s2", "arch": "sm_86"}
    row |= {"registers": 100, "shared": 10240, "spills": 0, "occupancy": 0.5}
    worse = {**row, "registers": 128, "spills": 3, "occupancy": 0.25}
    other = {**row, "arch": "sm_90", "dtype": "float32"}
    report = {"date": "2026-01-02", "suite": "budget", "rows": [row, worse, other]}
    results.write(tmp_path / "budget-2026-01-02.json", report)
    page = limits.page()
    assert "| linear_fwd | m128 n64 d64 w8 s2 | 128 | 10.0 | 3 | 25% |" in page
    assert "budget-*.json" in page.split("### Compiled for sm_90")[1].split("## NVIDIA RTX")[0]
