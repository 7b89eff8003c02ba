"""Shared factors of matrices against tensors that have them exactly, and against plain least squares."""

import pytest
import torch
from torch import Tensor

from pareto_merging.methods.tucker import balanced, tucker


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metrics(count: int, size: int) -> list[Tensor]:
    inputs = [random(3 * size, size, seed=20 + k) for k in range(count)]
    return [x.t() @ x for x in inputs]


def distance(maps: list[Tensor], own: list[Tensor], A: Tensor, G: Tensor, B: Tensor) -> float:
    """Σ_k ‖(M_k − A·G_k·Bᵀ)·C_k^{1/2}‖²."""
    errors = [m - A @ G[:, :, k] @ B.t() for k, m in enumerate(maps)]
    return float(sum(torch.trace(e @ c @ e.t()) for e, c in zip(errors, own, strict=True)))


@pytest.mark.parametrize(("rows", "columns", "rank", "count"), [(13, 7, 3, 4), (7, 13, 3, 2), (30, 20, 4, 5)])
def test_exact_tensors_are_recovered(rows: int, columns: int, rank: int, count: int) -> None:
    A, B, G = random(rows, rank), random(columns, rank, seed=1), random(rank, rank, count, seed=2)
    G -= G.mean(dim=2, keepdim=True)
    maps = [A @ G[:, :, k] @ B.t() for k in range(count)]
    factors = tucker(maps, metrics(count, columns), rank)
    assert factors is not None
    for k, exact in enumerate(maps):
        torch.testing.assert_close(factors.A @ factors.G[:, :, k] @ factors.B.t(), exact, rtol=1e-9, atol=1e-9)
    for factor in (factors.A, factors.B):
        torch.testing.assert_close(factor.t() @ factor, 2 * torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "sizes"), [(50, (5, 3)), (4, (4, 3))])
def test_a_rank_beyond_the_sizes(rank: int, sizes: tuple[int, int]) -> None:
    """Each dimension has its own; what is lost along the other is what singular values say."""
    maps, own = [random(5, 3, seed=k) for k in range(2)], metrics(2, 3)
    factors = tucker(maps, [own[0]] * 2, rank)
    assert factors is not None and (factors.A.shape, factors.B.shape) == ((5, sizes[0]), (3, sizes[1]))
    maps = list(balanced(torch.stack(maps), torch.stack([own[0]] * 2)))
    columns = torch.cat([m @ torch.linalg.cholesky(own[0]) for m in maps], dim=1)
    lost = float(torch.linalg.svdvals(columns)[sizes[0] :].square().sum())
    assert abs(distance(maps, [own[0]] * 2, *factors) - lost) < 1e-9 * float(columns.square().sum())


def test_balanced_maps_are_the_nearest() -> None:
    """With sum zero, and no others of sum zero are nearer; balanced ones stay. Equal metrics: the mean is gone."""
    maps, own = torch.stack([random(4, 3, seed=k) for k in range(3)]), metrics(3, 3)
    near = balanced(maps, torch.stack(own))
    torch.testing.assert_close(near.sum(dim=0), torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(balanced(near, torch.stack(own)), near)

    def far(others: Tensor) -> float:
        return float(sum(torch.trace((m - o) @ c @ (m - o).t()) for m, o, c in zip(maps, others, own, strict=True)))

    for seed in range(5):
        change = 1e-3 * random(3, 4, 3, seed=seed)
        assert far(near + change - change.mean(dim=0)) > far(near)
    torch.testing.assert_close(balanced(maps, torch.stack([own[0]] * 3)), maps - maps.mean(dim=0))


def test_nothing_near_is_better() -> None:
    """The cores are least squares in each own metric; with equal metrics, no A or B near is better either."""
    maps = list(balanced(torch.stack([random(9, 6, seed=k) for k in range(4)]), torch.stack(metrics(4, 6))))
    own = metrics(4, 6)
    factors = tucker(maps, own, 2)
    assert factors is not None
    A, G, B = factors
    torch.testing.assert_close(G.sum(dim=2), torch.zeros(2, 2, dtype=torch.float64))
    best = distance(maps, own, A, G, B)
    for seed in range(5):
        change = 1e-3 * random(*G.shape, seed=seed)
        assert distance(maps, own, A, G + change - change.mean(dim=2, keepdim=True), B) > best
    maps, same = [m - sum(maps) / 4 for m in maps], [own[0]] * 4
    factors = tucker(maps, same, 2)
    assert factors is not None
    best = distance(maps, same, *factors)
    for seed in range(5):
        A, B = (factor + 1e-3 * random(*factor.shape, seed=seed) for factor in (factors.A, factors.B))
        # with the cores that are best for those
        right = same[0] @ B
        cores = [
            torch.linalg.solve(A.t() @ A, torch.linalg.solve(B.t() @ right, A.t() @ m @ right, left=False))
            for m in maps
        ]
        assert distance(maps, same, A, torch.stack(cores, dim=-1), B) > best


def test_zero_and_no_metric() -> None:
    assert tucker([torch.zeros(3, 2)] * 2, metrics(2, 2), 1) is None
    with pytest.raises(ValueError, match="metrics: expected positive definite ones, got one that is not"):
        tucker([random(3, 2)], [torch.zeros(2, 2)], 1)
