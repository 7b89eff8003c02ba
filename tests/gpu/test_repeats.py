"""Every shipped configuration launched 200 times gives the same bits 200 times: ``make gpu-repeat``.

A launch is captured in a CUDA graph together with the poisoning of what it writes and the comparison with its first
results, so that the GPU repeats it without a pause. Needs torch, triton and pytest only.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import configurations, linear_arguments, use_configuration
from torch import Tensor
from torch.utils import deterministic

import pmkernels
from pmkernels import configs
from pmkernels.graphs import capture, warm_up
from pmkernels.kernels import linear, low_rank, merge, preference, weight_grad
from pmkernels.launch import MAX_RANK, MAX_RANK_FROM_TILES
from pmkernels.low_rank import Terms
from pmkernels.reference import preference_core

pytestmark = [pytest.mark.gpu, pytest.mark.repeat]

REPEATS, TASKS = 200, 8
# out and in features with and without alignment: D is cut into parts for few rows, M for many
SHAPES = {True: (768, 1024), False: (387, 1021)}
FEW, MANY = 8, 2056
NO_ROWS = ("merge_grad", "merge", "flat", "vectors")
Launch = Callable[[], list[Tensor]]
INTEGERS = {4: torch.int32, 2: torch.int16}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory is full of NaN until something is written to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize(("name", "entry"), configurations().values(), ids=configurations())
def test_launches_give_the_same_bits(name: str, entry: configs.Entry) -> None:
    with use_configuration(name, entry) as used:
        for what, launch in launches(entry):
            assert different(launch) == 0, what
    assert entry.op in used


def different(launch: Launch) -> int:
    """How many of REPEATS launches, and of two before them, gave other bits than the first one, which is finite."""
    expected = [result.clone() for result in launch()]
    assert expected and all(bool(torch.isfinite(result).all()) for result in expected), "not finite"
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.zeros((), dtype=torch.int64, device=device)

    def step() -> Tensor:
        changed = [(bits(a) != bits(b)).any() for a, b in zip(launch(), expected, strict=True)]
        return count.add_(torch.stack(changed).any())

    warm_up(step, device)
    graph, _ = capture(step, device)
    for _ in range(REPEATS):
        graph.replay()
    return int(count)


def bits(value: Tensor) -> Tensor:
    """The bits of a floating-point tensor as integers."""
    return value.contiguous().view(INTEGERS[value.element_size()])


def launches(entry: configs.Entry) -> Iterator[tuple[str, Launch]]:
    """What a configuration is for, in each of its types and layouts, with few rows and with many."""
    types = {"16-bit": (torch.bfloat16, torch.float16), "any": (torch.bfloat16, torch.float32)}
    rank = min(entry.max_rank or MAX_RANK, MAX_RANK)
    most = entry.max_rows or MANY
    for dtype, aligned in itertools.product(types.get(entry.dtype, (torch.float32,)), (True, False)):
        if entry.aligned in (aligned, None):
            for rows in [1] if entry.op in NO_ROWS else sorted({min(FEW, most), min(MANY, most)}):
                for what, launch in LAUNCHES[entry.op](rows, *SHAPES[aligned], rank, dtype):
                    yield f"{what}, {rows} rows, {dtype}, {'' if aligned else 'un'}aligned", launch


def _values(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of a layer with one preference for every eight rows, and dy."""
    values = linear_arguments(
        (rows,), n, d, tasks=TASKS, rank=rank, gamma_lead=(max(rows // 8, 1),), dtype=dtype, device="cuda"
    )
    values["dy"] = torch.randn(rows, n, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    return {name: value.detach() for name, value in values.items()}


def _linear(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    weights = (v["weight"], v["task_vectors"], v["lam"])
    left = (preference_core(v["G"], v["gamma"][0]).t() @ v["A"].t()).t()
    _, t = low_rank.shrink(v["x"], v["B"], v["G"], v["gamma"])
    _, ds = low_rank.shrink(v["dy"], v["A"], v["G"], v["gamma"], transposed=True)
    assert t is not None and ds is not None
    for what, terms, of_y, of_x in (
        ("shared", Terms(*weights, (left, v["B"])), None, None),
        ("per row", Terms(*weights), (t, v["A"]), (ds, v["B"])),
    ):
        forward, backward = (
            functools.partial(linear.linear_fwd, v["x"], terms, start=of_y, bias=v["bias"]),
            functools.partial(linear.linear_bwd_x, v["dy"], terms, start=of_x),
        )
        yield f"forward, {what}", lambda forward=forward: [forward()]
        yield f"dx, {what}", lambda backward=backward: [backward()]


def _weight_grad(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    # more is not asked for from tiles
    v = _values(rows, n, d, min(rank, MAX_RANK_FROM_TILES), dtype)
    yield (
        "weight_grad",
        lambda: _given(weight_grad.weight_grad(v["dy"], v["x"], v["task_vectors"], A=v["A"], B=v["B"], need_bias=True)),
    )


def _given(reduced: weight_grad.WeightGradients) -> list[Tensor]:
    return [result for result in reduced if result is not None]


def _merge_grad(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, min(rank, MAX_RANK_FROM_TILES), dtype)
    dw, taus = v["weight"], v["task_vectors"]
    yield "merge_grad", lambda: _given(weight_grad.weight_grad_of_merge(dw, taus, A=v["A"], B=v["B"]))


def _merge(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    terms = Terms(v["weight"], v["task_vectors"], v["lam"], (v["A"], v["B"]))
    yield "merge", lambda: [merge.merge_weight(terms, torch.empty_like(v["weight"]))]


def _flat(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(1, 1, n * d, 1, dtype)
    weight, taus, lam = v["weight"], v["task_vectors"], v["lam"]
    yield "flat merge", lambda: [merge.merge_weight(Terms(weight, taus, lam), torch.empty_like(weight))]
    yield "flat reduction", lambda: _given(weight_grad.weight_grad_of_merge(weight, taus, A=None, B=None))


def _vectors(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    sizes = [n, d, 1, 0, 4 * d] * 24
    v = _values(1, 1, sum(sizes), 1, dtype)
    weight, taus = v["weight"][0], v["task_vectors"][:, 0]
    lam = torch.randn(len(sizes), TASKS, generator=torch.Generator().manual_seed(2)).cuda()
    offsets = torch.tensor([0, *sizes], device="cuda").cumsum(0)
    yield "vectors", lambda: [merge.merge_vectors_fwd(weight, taus, lam, offsets)]
    yield "reduction of vectors", lambda: [merge.merge_vectors_bwd(weight, taus, offsets)]


def _sum(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The parts of D of few rows, and the parts of M of many."""
    generator = torch.Generator().manual_seed(3)
    parts, bias = torch.randn(7, rows, n, generator=generator).cuda(), torch.randn(n, generator=generator).cuda()
    like = torch.empty(rows, n, dtype=dtype, device="cuda")
    yield "sum of parts", lambda: [linear.sum_splits(parts, bias, torch.empty_like(like))]
    yield from _weight_grad(rows, n, d, rank, dtype)


def _served(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    v = _values(rows, n, d, rank, dtype)
    return {**v, "wide": pmkernels.widen_weight(v["weight"], v["A"]), "B": v["B"].to(dtype).t().contiguous().t()}


def _preference(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _served(rows, n, d, rank, dtype)
    layer = (v["x"], v["wide"], v["G"], v["B"], v["gamma"], v["bias"])
    yield "preference", lambda: [preference.preference_linear(*layer)]


def _widen(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _served(rows, n, d, rank, dtype)
    yield "widen", lambda: [preference.widen(v["x"], v["G"], v["B"], v["gamma"])]


def _shrink(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    yield "shrink alone", lambda: [low_rank.shrink(v["x"], v["B"], None, None)[0]]
    for transposed in (False, True):
        given = (v["dy"], v["A"]) if transposed else (v["x"], v["B"])

        def launch(given: tuple[Tensor, Tensor] = given, transposed: bool = transposed) -> list[Tensor]:
            s, t = low_rank.shrink(*given, v["G"], v["gamma"], transposed=transposed)
            assert t is not None
            return [s, t]

        yield f"shrink, transposed {transposed}", launch


def _rows_of_the_rank(v: dict[str, Tensor], rows: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    u, s = (torch.randn(rows, rank, generator=generator).cuda() for _ in range(2))
    return u, s


def _factor_grad(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    t, _ = _rows_of_the_rank(v, rows, rank)
    yield "factor_grad", lambda: [low_rank.factor_grad(v["dy"], t, n * d)]


def _core_grad(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    u, s = _rows_of_the_rank(v, rows, rank)
    yield "core_grad", lambda: [low_rank.core_grad(u, s, v["gamma"], dtype, n * d)]


def _preference_grad(rows: int, n: int, d: int, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    v = _values(rows, n, d, rank, dtype)
    u, s = _rows_of_the_rank(v, rows, rank)
    yield "preference_grad", lambda: [low_rank.preference_grad(u, s, v["G"], dtype)]


LAUNCHES: dict[str, Callable[[int, int, int, int, torch.dtype], Iterator[tuple[str, Launch]]]] = {
    "linear": _linear,
    "weight_grad": _weight_grad,
    "merge_grad": _merge_grad,
    "merge": _merge,
    "flat": _flat,
    "vectors": _vectors,
    "sum": _sum,
    "preference": _preference,
    "widen": _widen,
    "shrink": _shrink,
    "factor_grad": _factor_grad,
    "core_grad": _core_grad,
    "preference_grad": _preference_grad,
}
