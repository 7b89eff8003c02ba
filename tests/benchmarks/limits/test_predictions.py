"""What is counted of layers and whole models, against other counts of the same."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import towers
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
            name, rates = predictions.configuration_file(H200), predictions.rates_of(H200)
            kernels = strategies.predicted_passes(name, rates, operation, strategy, counted)
            expected = costs.seconds(kernels, rates, counted.kind)
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
