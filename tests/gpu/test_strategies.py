"""Every strategy on a CUDA GPU: real layers, products cut into parts, cached weights, many vectors, CUDA graphs.

Needs torch, triton and pytest only.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import LOW_RANK, Parts, assert_close, check_linear, exactly, gradients, linear_arguments
from smoke import smoke
from torch import Tensor

import pmkernels
from pmkernels import reference
from pmkernels.graphs import capture, warm_up

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STRATEGIES = ("eager", "fused", "streamed", "auto")
# out and in features
LAYERS = {
    "ViT-B/32 in-projection": (2304, 768),
    "ViT-B/32 out-projection": (768, 768),
    "ViT-L/14 in-projection": (3072, 1024),
    "ViT-L/14 MLP": (1024, 4096),
}


@smoke(5, layer=(LAYERS["ViT-L/14 in-projection"],), lead=((1, 257), (32, 50)), strategy=("streamed",))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (7,), (50,), (1, 257), (32, 50)], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_real_layers(layer: tuple[int, int], lead: tuple[int, ...], strategy: str) -> None:
    """bfloat16, K = 8, r = 16; one row is a constant of 1 to the compiler."""
    for gamma_lead in ((), (lead[0], *(1 for _ in lead[1:]))) if lead else ((),):
        values = linear_arguments(
            lead, *layer, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=torch.bfloat16, device="cuda"
        )
        check_linear(values, strategy=strategy)
        values["lam"].requires_grad_(False)
        check_linear(values, strategy=strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 8, 32])
def test_few_rows_split_d(m: int, dtype: torch.dtype, parts: Parts) -> None:
    for (n, d), gamma_lead in itertools.product(((768, 768), (1000, 777), (1, 1024), (1024, 1)), ((), (m,))):
        values = linear_arguments((m,), n, d, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=dtype, device="cuda")
        check_linear(values, strategy="fused")
    assert max(parts.of_d) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_split_m(dtype: torch.dtype, parts: Parts) -> None:
    for (n, d), without in itertools.product(((768, 768), (300, 513), (64, 64)), ((), LOW_RANK)):
        values = linear_arguments((32, 257), n, d, tasks=8, rank=16, dtype=dtype, device="cuda", without=without)
        check_linear(values, strategy="fused")
        check_linear(values, torch.ones((), dtype=dtype, device="cuda").expand(32, 257, n), strategy="fused")
    assert max(parts.of_rows) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 17, 32, 64])
def test_any_number_of_parts(rank: int, dtype: torch.dtype, parts: Parts) -> None:
    """Odd remainders, a last part that is short, ranks that are padded, K of 1 to 8, every gradient."""
    for force, m, tasks in itertools.product((2, 3, 16), (1, 65, 300), (1, 3, 8)):
        parts.force = force
        for gamma_lead in ((), (m,)):
            values = linear_arguments(
                (m,), 131, 263, tasks=tasks, rank=rank, gamma_lead=gamma_lead, dtype=dtype, device="cuda"
            )
            check_linear(values, strategy="fused")
    assert min(parts.of_d) > 1 and max(parts.of_rows) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice_in_parts(dtype: torch.dtype, parts: Parts) -> None:
    for lead, force in (((4,), None), ((32, 257), None), ((300,), 5)):
        parts.force = force
        runs = []
        for _ in range(3):
            values = linear_arguments(lead, 768, 768, tasks=8, rank=16, dtype=dtype, device="cuda")
            torch.full((64, 1024, 1024), torch.nan, device="cuda")
            y = pmkernels.pareto_linear(**values, strategy="fused")
            runs.append({"y": y, **gradients(y, torch.ones_like(y), values)})
        for other, name in itertools.product(runs[1:], runs[0]):
            assert torch.equal(runs[0][name], other[name]), name
    assert max(parts.of_d) > 1 and max(parts.of_rows) > 1


def test_unwritten_memory_is_not_read_in_parts(parts: Parts) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        # torch.empty is filled with NaN now
        for force, gamma_lead in itertools.product((None, 3), ((), (9, 1))):
            parts.force = force
            values = linear_arguments((9, 31), 130, 520, rank=5, gamma_lead=gamma_lead, device="cuda")
            check_linear(values, strategy="fused")
            check_linear(linear_arguments((1,), 130, 520, device="cuda"), strategy="fused")
        check_vectors(vectors([0, 511, 0, 513], 3))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_of_the_size_of_a_weight_is_allocated_in_parts(parts: Parts) -> None:
    for lead, n, d in (((1,), 1024, 1024), ((8,), 768, 3072), ((200,), 1024, 1024)):
        values = linear_arguments(lead, n, d, tasks=8, rank=16, device="cuda")
        pmkernels.pareto_linear(**values, strategy="fused").sum().backward()
        torch.cuda.synchronize()
        torch.cuda.memory._record_memory_history(max_entries=10_000)
        try:
            pmkernels.pareto_linear(**values, strategy="fused").sum().backward()
            torch.cuda.synchronize()
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        # in float32 a byte count says how many elements
        assert max((event["size"] for event in trace if event["action"] == "alloc"), default=0) < n * d * 4
    assert max(parts.of_d) > 1


def cached_weight(values: dict[str, Tensor], strategy: str) -> Tensor:
    parts = {name: v.detach() for name, v in values.items() if name not in ("x", "bias")}
    if parts["gamma"].ndim > 1:
        parts = {name: v for name, v in parts.items() if name not in LOW_RANK}
    return pmkernels.merge_weight(**parts, strategy=strategy)


@smoke(6, dtype=(torch.bfloat16,), strategy=("streamed", "auto"), gamma_lead=((), (4, 1)))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", [(), (4, 1), (4, 50)], ids=["shared", "per item", "per row"])
def test_cached(gamma_lead: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    values = linear_arguments((4, 50), 768, 512, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=dtype, device="cuda")
    cached = cached_weight(values, strategy)
    check_linear(values, strategy=strategy, cached=cached)
    values["lam"].requires_grad_(False)
    check_linear(values, strategy=strategy, cached=cached)
    if strategy in ("eager", "streamed"):
        # the same products of the same weight
        results = []
        for weight in (None, cached):
            y = pmkernels.pareto_linear(**values, strategy=strategy, cached=weight)
            results.append({"y": y, **gradients(y, torch.ones_like(y), values)})
        for name, first in results[0].items():
            assert torch.equal(first, results[1][name]), name


def test_float16_does_not_underflow_in_any_strategy_that_runs_kernels() -> None:
    for strategy in ("fused", "streamed", "auto"):
        x, dy = (torch.full((1, size), 2.0**-13, dtype=torch.float16, device="cuda") for size in (256, 128))
        lam = torch.zeros(1, device="cuda", requires_grad=True)
        frozen = torch.zeros(128, 256, dtype=torch.float16, device="cuda")
        y = pmkernels.pareto_linear(x, frozen, task_vectors=(frozen + 1)[None], lam=lam, strategy=strategy)
        assert float(torch.autograd.grad(y, lam, dy)[0]) == 128 * 256 * 2.0**-26, strategy


def captured(step: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    device = torch.device("cuda", torch.cuda.current_device())
    warm_up(step, device)
    return capture(step, device)


@smoke(6, strategy=("fused", "streamed"), lead=((4, 257),))
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("lead", [(1,), (3, 2), (4, 257)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_captured_step_gives_the_same_bits(strategy: str, lead: tuple[int, ...], cached: bool) -> None:
    """Forward and backward, D cut into parts and M too, replayed twice with new values in the same memory."""
    for gamma_lead in ((), (lead[0], *(1 for _ in lead[1:]))):
        first, second = (
            linear_arguments(
                lead, 768, 512, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=torch.bfloat16, device="cuda", seed=seed
            )
            for seed in (0, 1)
        )
        kept = [cached_weight(values, strategy) if cached else None for values in (first, second)]
        dy = torch.randn(*lead, 768, device="cuda").bfloat16()

        def step(values: dict[str, Tensor], weight: Tensor | None, upstream: Tensor = dy) -> dict[str, Tensor]:
            y = pmkernels.pareto_linear(**values, cached=weight, strategy=strategy)
            return {"y": y, **gradients(y, upstream, values)}

        expected = [
            {name: found.detach().clone() for name, found in step(values, weight).items()}
            for values, weight in zip((first, second), kept, strict=True)
        ]
        graph, found = captured(lambda step=step, values=first, weight=kept[0]: step(values, weight))
        graph.replay()
        for name, value in expected[0].items():
            assert torch.equal(found[name], value), name
        with torch.no_grad():
            for name, value in first.items():
                value.copy_(second[name])
            if kept[0] is not None:
                kept[0].copy_(kept[1])
        graph.replay()
        for name, value in expected[1].items():
            assert torch.equal(found[name], value), name


# --- merge_vectors ----------------------------------------------------------------------------------------------------


def vectors(sizes: list[int], tasks: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    return {
        "weight": torch.randn(total, generator=generator).to("cuda", dtype),
        "task_vectors": torch.randn(tasks, total, generator=generator).to("cuda", dtype),
        "lam": torch.randn(len(sizes), tasks, generator=generator).cuda().requires_grad_(),
        "offsets": torch.tensor([0, *sizes], device="cuda").cumsum(0),
    }


def check_vectors(values: dict[str, Tensor], grad: Tensor | None = None, **options: Any) -> None:
    exact = {name: v.detach().double() if v.is_floating_point() else v for name, v in values.items()}
    exact["lam"].requires_grad_()
    truth, plain = reference.merge_vectors(**exact), reference.merge_vectors(**values)
    merged, dtype = pmkernels.merge_vectors(**values, **options), values["weight"].dtype
    assert merged.dtype == dtype
    absolute = {name: v.detach().abs() for name, v in exact.items()}
    terms = float(reference.merge_vectors(**absolute).max()) if merged.numel() else 0.0
    assert_close("merged", merged.detach(), plain.detach(), truth.detach(), dtype, terms=terms)
    if grad is None:
        grad = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    (ours,) = torch.autograd.grad(merged, values["lam"], grad)
    (allowed,) = torch.autograd.grad(plain, values["lam"], grad)
    (expected,) = torch.autograd.grad(truth, exact["lam"], grad.double())
    terms = float((grad.double().abs() * exact["task_vectors"].abs()).sum(dim=1).max()) if ours.numel() else 0.0
    assert_close("gradient of lam", ours, allowed, expected, torch.float32, terms=terms)


@smoke(8, dtype=(torch.bfloat16,), strategy=("auto", "fused"))
@pytest.mark.parametrize("strategy", ["auto", "fused", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_vectors(dtype: torch.dtype, strategy: str) -> None:
    # the biases and norms of a ViT-L/14, and what is empty, one element, or off a block
    network = [1024] * 3 + [3072, 1024, 1024, 1024, 4096, 1024, 1024] * 24
    for sizes, tasks in itertools.product((network, [0, 1, 511, 513, 0], [1], [0], []), (1, 8)):
        values = vectors(sizes, tasks, dtype)
        check_vectors(values, strategy=strategy)
        check_vectors(values, torch.ones((), dtype=dtype, device="cuda").expand(sum(sizes)), strategy=strategy)
    wide = vectors([700, 3], 4, dtype)
    wide["task_vectors"] = torch.stack([wide["task_vectors"]] * 2, dim=-1)[..., 0]
    wide["weight"] = torch.stack([wide["weight"]] * 2, dim=-1)[..., 0]
    wide["lam"] = wide["lam"].detach().t().contiguous().t().requires_grad_()
    check_vectors(wide, torch.randn(703, 2, device="cuda").to(dtype)[:, 1], strategy=strategy)


@smoke(6, strategy=("auto",))
@pytest.mark.parametrize("strategy", ["auto", "eager"])
def test_merge_vectors_captured(strategy: str) -> None:
    first, second = (vectors([1024, 0, 3072, 5], 8, torch.bfloat16, seed) for seed in (0, 1))
    grad = torch.randn(4101, device="cuda").bfloat16()

    def step(values: dict[str, Tensor] = first) -> dict[str, Tensor]:
        merged = pmkernels.merge_vectors(**values, strategy=strategy)
        return {"merged": merged, "lam": torch.autograd.grad(merged, values["lam"], grad)[0]}

    expected = {name: found.detach().clone() for name, found in step(second).items()}
    graph, found = captured(step)
    with torch.no_grad():
        for name, value in first.items():
            value.copy_(second[name])
    for _ in range(2):
        graph.replay()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_float64_goes_eager_on_the_gpu_too() -> None:
    values = {name: v.cuda() for name, v in exactly(linear_arguments((3,), 20, 18)).items()}
    values = {name: v.detach().requires_grad_(name not in ("weight", "task_vectors")) for name, v in values.items()}
    y, truth = pmkernels.pareto_linear(**values), reference.pareto_linear(**values)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    found, theirs = (gradients(result, torch.ones_like(y), values) for result in (y, truth))
    for name in theirs:
        torch.testing.assert_close(found[name], theirs[name], rtol=1e-10, atol=1e-10, msg=name)
    doubled = {name: v.detach().double() if v.is_floating_point() else v for name, v in vectors([4, 0, 3], 2).items()}
    torch.testing.assert_close(pmkernels.merge_vectors(**doubled), reference.merge_vectors(**doubled))
    with pytest.raises(TypeError, match="weight: expected float32, bfloat16 or float16"):
        pmkernels.merge_vectors(**doubled, strategy="fused")
