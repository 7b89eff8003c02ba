"""The page of limits: what it counts, which measurements it takes, and that the committed one is current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results
from benchmarks.common import towers
from benchmarks.limits import goals as predicted_goals
from benchmarks.limits import layers as layer_tables
from benchmarks.limits import page as whole_page
from benchmarks.limits import predictions
from pmkernels import costs, strategies

H200, H100 = "nvidia-h200", "nvidia-h100-80gb-hbm3"
VIT_B, VIT_L = towers.TOWERS


def vit(tower: towers.Tower) -> torch.nn.Module:
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


@pytest.mark.parametrize("tower", towers.TOWERS, ids=lambda tower: tower.name)
def test_a_tower_is_what_open_clip_builds_and_torch_counts(tower: towers.Tower) -> None:
    model = vit(tower)
    assert tower.parameters == sum(parameter.numel() for parameter in model.parameters())
    images = torch.empty(towers.BATCH, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    for tasks in (1, 3):
        counted = predictions.step(tower, tasks, H200).operations
        assert counted == pytest.approx(tasks * counter.get_total_flops(), rel=1e-9)


def test_bounds_of_the_design_page() -> None:
    """Section 3 of the design: GEMM and assembly of the in-projection of ViT-L/14, K = 8, on two GPUs."""
    layer = towers.TOWERS[1].block_layers(32)[0]
    for gpu, gemm, merge in ((H200, 65.5, 14.6), ("nvidia-rtx-a6000", 334, 82)):
        rates = predictions.rates_of(gpu)
        forward, whole = (costs.bound(operation, predictions.problem(layer, 8)) for operation in ("forward", "merge"))
        assert forward.seconds(rates, towers.KIND) * 1e6 == pytest.approx(gemm, rel=0.01)
        assert whole.seconds(rates, towers.KIND) * 1e6 == pytest.approx(merge, rel=0.01)


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
@pytest.mark.parametrize("operation", ["forward", "dx", "weight_grad"])
def test_predictions_are_those_that_choose_a_strategy(operation: str, strategy: str) -> None:
    """Off the GPU the dispatcher counts for an H200: the tiles, splits and rates here are the same."""
    for layers in predictions.GROUPS.values():
        for layer in layers:
            counted = predictions.problem(layer, 8)
            expected = strategies.predicted_seconds(
                predictions.configuration_file(H200), predictions.rates_of(H200), operation, strategy, counted
            )
            assert predictions.predicted(operation, strategy, counted, H200) == pytest.approx(expected)


def test_a_step_adds_the_assembly_and_the_task_vectors_to_the_limit() -> None:
    tower, tasks = towers.TOWERS[0], 8
    rates, found = predictions.rates_of(H200), predictions.step(towers.TOWERS[0], tasks, H200)
    extra = 0.0
    for product in predictions.products(tower, tasks):
        merge, gradient, plain = (
            costs.bound(name, product.problem, cached=name == "forward").seconds(rates, towers.KIND)
            for name in ("merge", "weight_grad", "forward")
        )
        extra += product.times * (merge + tasks * (gradient - plain))
    assert found.bound - found.limit == pytest.approx(extra)
    assert found.predicted["cached"].seconds < found.predicted["streamed"].seconds


def test_db_of_a_block_and_task_reads_151_megabytes() -> None:
    """dy of the four linear layers of ViT-L/14, 32 images of 257 tokens, in bfloat16."""
    by_hand = 8224 * (3072 + 1024 + 4096 + 1024) * 2
    assert by_hand == 151_584_768
    assert layer_tables.db_bytes(VIT_L) == by_hand
    step = list(predictions.step_kernels(VIT_L, 8, H200, "cached"))
    sums = [(times, kernel) for times, kernel in step if kernel.name == "column sums"]
    assert sum(times for times, _ in sums) == 8 * 24 * 4
    assert sum(times * kernel.memory for times, kernel in sums) == 8 * 24 * by_hand
    seconds = 8 * 24 * (by_hand / (0.8 * 4.3e12) + 4 * 2e-6) + 8 * 24 * 4 * 2e-6
    assert predictions.prediction(step, H200).parts["db"] == pytest.approx(seconds), "sums, and a cast of each"
    assert not any(kernel.name == "column sums" for _, kernel in predictions.limit_kernels(VIT_L, 8, H200))
    assert "| **ViT-L/14, a block and task** |" in whole_page.page()
    assert "**152** |" in whole_page.page().split("| **ViT-L/14, a block and task** |")[1].splitlines()[0]


def test_partial_sums_of_a_step_are_written_and_read_again() -> None:
    step = list(predictions.step_kernels(VIT_L, 8, H200, "cached"))
    # P, Q of the in-projection and the out-projection, and dλ of all four, in tiles of 64 × 64
    low_rank = 4 * 16 * (16 * 3072 + 48 * 1024) + 4 * 16 * (16 * 1024 + 16 * 1024)
    lambdas = 4 * 8 * (768 + 256 + 1024 + 1024)
    # the patches in tiles of 64 × 64; 32 rows of the final projection from rows, in tiles of 128 × 128
    ends = 4 * 8 * (16 * 10 + 6 * 8)
    whole = 8 * (24 * (low_rank + lambdas) + ends)
    assert sum(times * kernel.cache for times, kernel in step if kernel.name == "partial sums") == whole
    # dW of the patch embedding and all others fit into L2, so what the reduction moves besides is every τ
    task_vectors = 8 * 8 * 2 * (24 * 12 * 1024**2 + 588 * 1024 + 1024 * 768)
    assert sum(times * kernel.memory for times, kernel in step if kernel.name == "reduction") == whole + task_vectors


@pytest.mark.parametrize("way", predictions.WAYS)
def test_a_prediction_is_the_sum_of_its_kernels(way: str) -> None:
    rates = predictions.rates_of(H200)
    kernels = list(predictions.step_kernels(VIT_B, 2, H200, way))
    found = predictions.prediction(kernels, H200)
    assert found.seconds == pytest.approx(sum(times * kernel.seconds(rates, towers.KIND) for times, kernel in kernels))
    assert found.launches == sum(times * kernel.launches for times, kernel in kernels)
    assert predictions.step(VIT_B, 2, H200).predicted[way] == found
    assert found.counted_alone == pytest.approx(found.seconds - found.parts[predictions.REST])


def test_a_step_is_the_limit_and_ours_besides() -> None:
    found = predictions.step(VIT_L, 8, H200)
    limit, cached = found.predicted_limit, found.predicted["cached"]
    assert set(limit.parts) == {"products", "attention", predictions.REST}
    besides = {"merge", "reduction of dW", "partial sums", "db", "normalisations' own gradients"}
    assert set(cached.parts) == {*limit.parts, *besides}
    # auto takes dW by the library, but for the 32 rows of the final projection
    assert all(cached.parts[part] == pytest.approx(limit.parts[part], rel=1e-3) for part in limit.parts)
    assert cached.apart(limit) == pytest.approx(sum(cached.parts[part] for part in besides), rel=1e-3)
    # of 98 products two have no bias, all but one are reduced in a launch of their own, and all partial sums are added
    merges, reductions, sums, of_biases, norms = 98, 8 * 97, 8 * 98, 2 * 8 * 96, 8 * 48
    assert cached.launches - limit.launches == merges + reductions + sums + of_biases + norms


def test_all_at_once_reads_every_task_vector_once() -> None:
    steps = {way: predictions.step_kernels(VIT_L, 8, H200, way) for way in ("cached", "all at once")}
    read = {
        way: sum(times * kernel.cache for times, kernel in kernels if kernel.name == "reduction")
        for way, kernels in steps.items()
    }
    assert read["cached"] == 8 * read["all at once"]


def test_at_the_memorys_full_rate_ratios_are_those_of_the_design() -> None:
    """Section 9 counts 1.12–1.14 and 1.4–1.5 of the limit; the forms of the kernels come on top."""
    for tower, least, most in ((VIT_L, 1.12, 1.14), (VIT_B, 1.4, 1.5)):
        ours = predictions.at_full_rate(predictions.step_kernels(tower, 8, H200, "cached"))
        limit = predictions.at_full_rate(predictions.limit_kernels(tower, 8, H200))
        ratio = predictions.prediction(ours, H200).seconds / predictions.prediction(limit, H200).seconds
        assert least < ratio < most
        assert predictions.step(tower, 8, H200).ratio("cached") > ratio
    served, plain = predictions.served_and_plain(predictions.forward_kernels, VIT_L, 32, H200)
    assert 1.045 < served.seconds / plain.seconds < 1.065


def test_what_an_h100_takes_longer_is_bound_by_memory() -> None:
    """Both multiply alike; 4.3 and 3.0 TB/s are 1.43 apart."""
    parts = {}
    for gpu in (H200, H100):
        step = predictions.step(VIT_L, 8, gpu)
        parts[gpu] = {**step.predicted["cached"].parts, "limit": step.predicted_limit.parts["products"]}
    ratio = {part: parts[H100][part] / parts[H200][part] for part in parts[H200]}
    assert ratio["products"] == pytest.approx(1.0, rel=0.01)
    assert ratio["limit"] == pytest.approx(1.0, rel=0.01)
    # launches take the same time on both
    launches = 2 * 8 * 96 * 2e-6
    assert (parts[H100]["db"] - launches) / (parts[H200]["db"] - launches) == pytest.approx(4.3 / 3.0)
    assert 1.3 < ratio["reduction of dW"] < 4.3 / 3.0


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


def test_a_goal_says_what_it_may_be_off() -> None:
    (line,) = (line for line in predicted_goals.goal_lines(H200) if line[0] == "training step ViT-L/14 ÷ limit")
    step = predictions.step(VIT_L, 8, H200)
    besides = step.ratio("cached") - 1
    expected = (step.ratio("cached"), 1 + 0.75 * besides, 1 + 1.25 * besides)
    assert line[2] == "*{:.2f}× ({:.2f}–{:.2f})*".format(*expected)


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
