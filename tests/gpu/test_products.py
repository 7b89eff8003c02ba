"""Kernels of four warps with several products, and the reductions of a dW: the first look at a GPU and a compiler.

Each kernel is launched by itself at sizes of a real layer, in bfloat16, against float64. Needs torch, triton and pytest
only.
"""

import itertools

import pytest
import torch
from kernel_cases import assert_close, check_served, folded
from smoke import smoke
from torch import Tensor

from pmkernels.kernels import low_rank, preference, weight_grad

pytestmark = pytest.mark.gpu

# K, R
SIZES = {"K=8 R=16": (8, 16), "K=1 R=4": (1, 4), "K=8 R=32": (8, 32)}
OUT, IN, ITEMS = 3072, 1024, 32
# the products over the rank are three TF32 products, which round a little more than float32
TF32X3 = 4.0


def _mixed(s: Tensor, G: Tensor, gamma: Tensor) -> Tensor:
    """t_m = Σ_k γ_mk G[:, :, k]·s_m in the type of ``s``."""
    rows = gamma.to(s.dtype).repeat_interleave(s.shape[0] // gamma.shape[0], dim=0)
    return torch.einsum("mk,ijk,mj->mi", rows, G.to(s.dtype), s)


@smoke(0)
@pytest.mark.parametrize("rows", [32, 257])
@pytest.mark.parametrize(("tasks", "rank"), SIZES.values(), ids=SIZES)
def test_served_few_rows(tasks: int, rank: int, rows: int) -> None:
    """Two products for each tile of x, K + 1 behind them, with D in parts and whole."""
    for items, n in ((1, OUT), (rows, IN)):
        values = folded(
            (rows,), n, IN, tasks=tasks, rank=rank, gamma_lead=(items,), dtype=torch.bfloat16, device="cuda"
        )
        check_served(values, strategy="fused")


@smoke(0)
@pytest.mark.parametrize(("tasks", "rank"), SIZES.values(), ids=SIZES)
def test_widen(tasks: int, rank: int) -> None:
    """[x | t]: x as it was, t against float64."""
    for count in (257, 257 * ITEMS):
        values = _low_rank_values(count, tasks, rank)
        x, G, gamma = values["x"], values["G"], values["gamma"]
        B = values["B"].bfloat16().t().contiguous().t()
        wide = preference.widen(x, G, B, gamma)
        assert torch.equal(wide[:, :IN], x)
        assert not wide[:, IN + rank :].any()
        truth = _mixed(x.double() @ B.double(), G, gamma)
        plain = _mixed((x @ B).float(), G, gamma).bfloat16()
        assert_close("t", wide[:, IN : IN + rank], plain, truth, torch.bfloat16)


@smoke(0)
@pytest.mark.parametrize(("tasks", "rank"), SIZES.values(), ids=SIZES)
def test_shrink(tasks: int, rank: int) -> None:
    """s = x·B and t; and u = dy·A and ds, whose G is transposed."""
    for count, transposed in itertools.product((257, 257 * ITEMS), (False, True)):
        values = _low_rank_values(count, tasks, rank)
        x, B, G, gamma = values["x"], values["B"], values["G"], values["gamma"]
        s, t = low_rank.shrink(x, B, G, gamma, transposed=transposed)
        assert t is not None
        used = G.transpose(0, 1) if transposed else G
        exact, plain, size = x.double() @ B.double(), x.float() @ B, x.double().abs() @ B.double().abs()
        assert_close("s", s, plain, exact, torch.float32, terms=TF32X3 * float(size.max()))
        plain, exact, size = (_mixed(*each, gamma) for each in ((plain, used), (exact, used), (size, used.abs())))
        assert_close("t", t, plain, exact, torch.float32, terms=TF32X3 * float(size.max()))


def _low_rank_values(rows: int, tasks: int, rank: int) -> dict[str, Tensor]:
    groups = rows // 257
    return folded((rows,), 1, IN, tasks=tasks, rank=rank, gamma_lead=(groups,), dtype=torch.bfloat16, device="cuda")


@smoke(1)
@pytest.mark.parametrize("rank", [0, 4, 16, 32], ids=lambda rank: f"R={rank}")
@pytest.mark.parametrize("tasks", [1, 8], ids=lambda tasks: f"K={tasks}")
def test_reduction_of_dw(tasks: int, rank: int) -> None:
    """dλ_k = ⟨dW, τ_k⟩, P = dW·B and Q = dWᵀ·A of the library's dW, of a full layer and of one that fills no tile."""
    for n, d in ((OUT, IN), (1021, 517)):
        generator = torch.Generator().manual_seed(n + rank)
        task_vectors = (0.1 * torch.randn(tasks, n, d, generator=generator)).to("cuda", torch.bfloat16)
        # dλ is a sum that does not cancel
        noise = (0.1 * torch.randn(n, d, generator=generator)).cuda()
        dw = (task_vectors.float().sum(dim=0) + noise).bfloat16()
        A, B = (torch.randn(size, rank, generator=generator).cuda() if rank else None for size in (n, d))
        # a dW that is not contiguous stays a matrix where there is no A or B
        for layout in (dw, dw.t().contiguous().t()):
            found = weight_grad.weight_grad_of_merge(layout, task_vectors, A=A, B=B)
            _check_reduction(found, dw, task_vectors, A, B)


def _check_reduction(
    found: weight_grad.WeightGradients, dw: Tensor, task_vectors: Tensor, A: Tensor | None, B: Tensor | None
) -> None:
    exact, plain, size = dw.double(), dw.float(), dw.double().abs()
    assert found.d_lam is not None
    assert_close(
        "dλ",
        found.d_lam,
        torch.stack([(tau.float() * plain).sum() for tau in task_vectors]),
        torch.stack([(tau.double() * exact).sum() for tau in task_vectors]),
        torch.float32,
        terms=max(float((tau.double().abs() * size).sum()) for tau in task_vectors),
    )
    for name, product, factor, turned in (("P", found.P, B, False), ("Q", found.Q, A, True)):
        assert (product is None) == (factor is None), name
        if product is None or factor is None:
            continue
        left = [value.t() if turned else value for value in (plain, exact, size)]
        terms = float((left[2] @ factor.double().abs()).max())
        assert_close(name, product, left[0] @ factor, left[1] @ factor.double(), torch.float32, terms=TF32X3 * terms)
