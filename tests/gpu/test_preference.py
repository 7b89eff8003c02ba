"""preference_linear on a CUDA GPU: real layers, parts of D, memory, graphs. Needs torch, triton and pytest only."""

from typing import Any

import pytest
import torch
from kernel_cases import Parts, check_served, folded, served
from smoke import smoke
from torch import Tensor

import pmkernels
from pmkernels.graphs import capture, warm_up

pytestmark = pytest.mark.gpu

STRATEGIES = ("fused", "streamed", "auto", "eager")
# out and in features
LAYERS = {
    "ViT-B/32 in-projection": (2304, 768),
    "ViT-B/32 out-projection": (768, 768),
    "ViT-L/14 in-projection": (3072, 1024),
    "ViT-L/14 out-projection": (1024, 1024),
}


@smoke(
    4,
    layer=(LAYERS["ViT-L/14 in-projection"], LAYERS["ViT-L/14 out-projection"]),
    lead=((1, 257), (32, 257)),
    strategy=("fused", "streamed"),
)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lead", [(1,), (7,), (1, 50), (1, 257), (8, 257), (32, 50), (32, 257)], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_real_layers(layer: tuple[int, int], lead: tuple[int, ...], strategy: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for gamma_lead in ((), (lead[0], *(1 for _ in lead[1:]))):
            options: dict[str, Any] = {"tasks": 8, "rank": 16, "gamma_lead": gamma_lead, "dtype": dtype}
            check_served(folded(lead, *layer, **options, device="cuda"), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("tasks", "rank"), [(1, 1), (2, 4), (32, 17), (5, 32), (32, 64)], ids=str)
def test_tasks_ranks_types_and_odd_sizes(tasks: int, rank: int, strategy: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, d in ((131, 77), (256, 320)):
            for lead in ((1,), (3, 35), (700,)):
                gamma_lead = (lead[0], *(1 for _ in lead[1:]))
                values = folded(lead, n, d, tasks=tasks, rank=rank, gamma_lead=gamma_lead, dtype=dtype, device="cuda")
                check_served(values, strategy=strategy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_parts_of_d(parts: Parts, dtype: torch.dtype) -> None:
    values = folded((2, 25), 768, 1000, tasks=8, rank=16, gamma_lead=(2, 1), dtype=dtype, device="cuda")
    for parts.force in (1, 2, 3, 7, 16):
        check_served(values, strategy="fused")
    assert len(set(parts.of_d)) > 2


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
def test_same_bits_twice_and_nothing_unwritten_is_read(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(torch.nan)

    values = folded((4, 50), 768, 768, tasks=8, rank=16, gamma_lead=(4, 1), dtype=torch.bfloat16, device="cuda")
    first = served(values, strategy=strategy)
    assert torch.equal(served(values, strategy=strategy), first)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(served(values, strategy=strategy), first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_sees_its_own_preference_and_nothing_else(strategy: str) -> None:
    values = folded((4, 50), 768, 768, tasks=8, rank=16, gamma_lead=(4, 1), dtype=torch.bfloat16, device="cuda")
    found = served(values, strategy=strategy)
    values["x"][2] = torch.nan
    values["gamma"][2] = torch.nan
    others = served(values, strategy=strategy)
    for item in (0, 1, 3):
        assert torch.equal(others[item], found[item])


@smoke(6, strategy=("auto",))
@pytest.mark.parametrize("strategy", ["fused", "streamed", "auto"])
def test_a_graph_reads_the_preference_that_is_there_now(strategy: str) -> None:
    values = folded((4, 50), 768, 768, tasks=8, rank=16, gamma_lead=(4, 1), dtype=torch.bfloat16, device="cuda")
    wide = pmkernels.widen_weight(values["weight"], values["A"])
    B = values["B"].bfloat16().t().contiguous().t()
    rest = (wide, values["G"], B, values["gamma"], values["bias"])
    device = values["x"].device

    def run() -> Tensor:
        return pmkernels.preference_linear(values["x"], *rest, strategy=strategy)

    warm_up(run, device)
    graph, y = capture(run, device)
    for seed in range(3):
        new = torch.softmax(torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            values["gamma"].copy_(new, non_blocking=True)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert torch.equal(y, run())


def test_nothing_of_the_size_of_a_weight_is_allocated_for_a_few_rows() -> None:
    values = folded((1, 50), 3072, 1024, tasks=8, rank=16, gamma_lead=(1, 1), dtype=torch.bfloat16, device="cuda")
    wide = pmkernels.widen_weight(values["weight"], values["A"])
    B = values["B"].bfloat16()
    for strategy in ("fused", "streamed", "auto"):
        pmkernels.preference_linear(values["x"], wide, values["G"], B, values["gamma"], strategy=strategy)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pmkernels.preference_linear(values["x"], wide, values["G"], B, values["gamma"], strategy=strategy)
        assert torch.cuda.max_memory_allocated() - before < 3072 * 1024 * 2


def test_vmap() -> None:
    values = folded((3, 50), 768, 768, tasks=8, rank=16, dtype=torch.bfloat16, device="cuda")
    gammas = torch.softmax(torch.randn(5, 8, device="cuda"), dim=-1)
    found = torch.vmap(lambda gamma: served({**values, "gamma": gamma}))(gammas)
    for y, gamma in zip(found, gammas, strict=True):
        one = served({**values, "gamma": gamma})
        assert float((y.float() - one.float()).norm()) <= 1e-2 * float(one.float().norm())
