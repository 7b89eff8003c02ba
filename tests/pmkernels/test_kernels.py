"""The kernels against float64, interpreted on the CPU: every gradient, odd shapes and strides, memory, same bits."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import CONSTANT, LOW_RANK, assert_close, check_linear, exactly, gradients, linear_arguments
from torch import Tensor

import pmkernels
from pmkernels import dispatch, linear, reference, strategies

if not dispatch.runs_kernels(torch.device("cpu")):
    pytest.skip("kernels run on the GPU here, see tests/gpu", allow_module_level=True)

from pmkernels.kernels import linear as linear_kernels
from pmkernels.kernels import low_rank as low_rank_kernels
from pmkernels.kernels import rows as row_layout
from pmkernels.kernels import weight_grad as weight_grad_kernels
from pmkernels.low_rank import Parts

ops = torch.ops.pmkernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_STRATEGIES = ("fused", "streamed")
PREFERENCES = {"shared": (), "per item": (3, 1), "per position": (1, 5), "per row": (3, 5), "one for all": (1, 1)}


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", PREFERENCES.values(), ids=PREFERENCES)
def test_forward_and_every_gradient(gamma_lead: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    check_linear(linear_arguments((3, 5), 70, 67, gamma_lead=gamma_lead, dtype=dtype), strategy=strategy)


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", [(), (3, 1), (3, 5)], ids=["shared", "per item", "per row"])
def test_a_constant_term_and_every_gradient(gamma_lead: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    values = linear_arguments((3, 5), 20, 35, gamma_lead=gamma_lead, dtype=dtype, constant=5)
    check_linear(values, strategy=strategy)
    values["lam"].requires_grad_(False)
    check_linear(values, strategy=strategy)


# 0, 1, a prime, one less than a block, a block, one more: of rows, N and D (blocks are 16 to 128 wide)
@pytest.mark.parametrize("m", [0, 1, 13, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (13, 17), (63, 127), (64, 128), (65, 129), (16, 16)])
def test_shapes_on_and_off_the_blocks(m: int, n: int, d: int) -> None:
    constant = 3 if (n, d) in ((1, 1), (13, 17), (65, 129)) else 0
    for gamma_lead in ((), (m,)) if m in (1, 33) else ((),):
        check_linear(linear_arguments((m,), n, d, gamma_lead=gamma_lead, constant=constant), strategy="fused")


@pytest.mark.parametrize("tasks", [1, 2, 31, 32])
@pytest.mark.parametrize("gamma_lead", [(), (4,)])
def test_numbers_of_tasks(tasks: int, gamma_lead: tuple[int, ...]) -> None:
    check_linear(linear_arguments((4,), 20, 18, tasks=tasks, gamma_lead=gamma_lead), strategy="fused")


@pytest.mark.parametrize("rank", [1, 3, 15, 16, 17, 32, 33, 63, 64])
@pytest.mark.parametrize("gamma_lead", [(), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ranks(rank: int, gamma_lead: tuple[int, ...], dtype: torch.dtype) -> None:
    for frozen in ((), ("lam",)):
        values = linear_arguments((4,), 72, 68, rank=rank, gamma_lead=gamma_lead, dtype=dtype)
        for name in frozen:
            values[name].requires_grad_(False)
        check_linear(values, strategy="fused")


# rank of the constant term and of the preference's; together from tiles of dW, or one of them
@pytest.mark.parametrize(("constant", "rank"), [(16, 16), (32, 16), (48, 16)])
@pytest.mark.parametrize("gamma_lead", [(), (4,)])
def test_ranks_together(constant: int, rank: int, gamma_lead: tuple[int, ...]) -> None:
    values = linear_arguments((4,), 36, 34, rank=rank, gamma_lead=gamma_lead, constant=constant)
    check_linear(values, strategy="fused")


@pytest.mark.parametrize("constant", [0, 2])
def test_no_rows_no_tasks_no_outputs_no_inputs(constant: int) -> None:
    for lead, n, d in (((0,), 5, 4), ((0, 3), 5, 4), ((3, 0), 5, 4), ((2,), 0, 4), ((2,), 5, 0), ((), 5, 4)):
        values = linear_arguments(lead, n, d, constant=constant)
        check_linear(values, strategy="fused")
        y = pmkernels.pareto_linear(**values, strategy="streamed")
        assert y.shape == (*lead, n)
    for gamma_lead in ((), (3,), (1,)):
        values = linear_arguments((3,), 5, 4, tasks=0, gamma_lead=gamma_lead, constant=constant)
        for strategy in KERNEL_STRATEGIES:
            check_linear(values, strategy=strategy)
            check_linear({k: v for k, v in values.items() if k not in ("task_vectors", "lam")}, strategy=strategy)
    values = linear_arguments((3,), 5, 4, tasks=0, without=LOW_RANK)
    y = pmkernels.pareto_linear(**values, strategy="fused")
    assert gradients(y, torch.ones_like(y), values)["lam"].shape == (0,)
    torch.testing.assert_close(y, torch.nn.functional.linear(values["x"], values["weight"], values["bias"]))


SUBSETS = [("bias",), ("task_vectors", "lam"), LOW_RANK, ("bias", *LOW_RANK), ("task_vectors", "lam", *LOW_RANK)]


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
@pytest.mark.parametrize("without", SUBSETS, ids=str)
def test_optional_arguments(without: Sequence[str], strategy: str) -> None:
    for constant, gamma_lead in itertools.product((0, 3), ((),) if "gamma" in without else ((), (2, 1))):
        values = linear_arguments((2, 3), 20, 18, gamma_lead=gamma_lead, without=without, constant=constant)
        check_linear(values, strategy=strategy)


# --- fuzz -------------------------------------------------------------------------------------------------------------


def _scatter(value: Tensor, rng: random.Random) -> Tensor:
    """The same values in another layout: permuted in memory, every second element of a larger tensor, or offset."""
    kind = rng.choice(("as it is", "permuted", "strided", "offset"))
    plain = value.detach()
    if kind == "permuted" and plain.ndim > 1:
        order = list(range(plain.ndim))
        rng.shuffle(order)
        back = sorted(range(plain.ndim), key=order.__getitem__)
        plain = plain.permute(order).contiguous().permute(back)
    elif kind == "strided" and plain.ndim > 0:
        wide = torch.full((*plain.shape[:-1], 2 * plain.shape[-1] + 1), torch.nan, dtype=plain.dtype)
        wide[..., 1::2] = plain
        plain = wide[..., 1::2]
    elif kind == "offset" and plain.ndim > 0:
        wide = torch.full((*plain.shape[:-1], plain.shape[-1] + 3), torch.nan, dtype=plain.dtype)
        wide[..., 1:-2] = plain
        plain = wide[..., 1:-2]
    return plain.requires_grad_(value.requires_grad)


def _upstream(kind: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if kind == "expanded" and dy.numel():
        return dy.reshape(-1)[0].expand(shape)
    if kind == "transposed" and dy.ndim > 2:
        return dy.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "column" and dy.ndim:
        return dy.movedim(-1, 0).contiguous().movedim(0, -1)
    return dy


SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 23, 32, 33)


@pytest.mark.parametrize("chunk", range(30))
def test_fuzz(chunk: int) -> None:
    """20 seeded cases a chunk, 600 in all, over shapes, layouts, types, optional and frozen arguments, strategies."""
    for seed in range(chunk * 20, chunk * 20 + 20):
        rng = random.Random(seed)
        lead = tuple(rng.choice((0, 1, 2, 3, 5, 7, 16, 17)) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3))))
        # 0 now and then, not mostly
        lead = tuple(max(length, 1) if rng.random() < 0.8 else length for length in lead)
        if math.prod(lead) > 400:
            lead = lead[:2]
        n, d = (
            (rng.choice((63, 64, 65, 80)), rng.choice((31, 64, 65)))
            if rng.random() < 0.2
            else (rng.choice(SIZES), rng.choice(SIZES))
        )
        tasks = rng.choice((1, 2, 3, 3, 8, 11, 32))
        rank = rng.choice((1, 2, 4, 5, 16, 17, 33, 64))
        per_row = len(lead) > 0 and rng.random() < 0.45
        gamma_lead = tuple(rng.choice((1, length)) for length in lead) if per_row else ()
        dtype = rng.choice(DTYPES)
        without = [*rng.choice(((), (), ("bias",))), *rng.choice(((), (), (), ("task_vectors", "lam"), LOW_RANK))]
        constant = min((0, 0, 0, 1, 5)[seed % 5], 64 - rank)
        sizes = {"tasks": tasks, "rank": rank, "constant": constant, "gamma_lead": gamma_lead}
        values = linear_arguments(lead, n, d, dtype=dtype, seed=seed, without=without, **sizes)
        for name in values:
            if values[name].requires_grad and rng.random() < 0.25:
                values[name].requires_grad_(False)
        values = {name: _scatter(value, rng) for name, value in values.items()}
        strategy = rng.choice(("fused", "fused", "streamed"))
        kind = rng.choice(("plain", "expanded", "transposed", "column"))
        dy = _upstream(kind, torch.Size((*lead, n)), dtype, seed)
        try:
            check_linear(values, dy, strategy=strategy)
        except Exception as error:
            shapes = {name: (list(v.shape), v.stride(), v.requires_grad) for name, v in values.items()}
            raise AssertionError(f"seed {seed}, {strategy}, {dtype}, dy {kind}: {shapes}") from error


# --- layouts and addresses --------------------------------------------------------------------------------------------


def test_rows_of_two_strides_are_not_copied_and_of_three_are() -> None:
    x = torch.randn(6, 5, 4)
    for view in (x, x.transpose(0, 1), x[::2], x[:, ::2], x.expand(2, 6, 5, 4)[0], torch.ones(()).expand(3, 2, 4)):
        rows = row_layout.as_rows(view)
        assert rows.tensor.data_ptr() == view.data_ptr()
        for m, expected in enumerate(view.reshape(-1, 4)):
            offset = m // rows.inner * rows.stride_outer + m % rows.inner * rows.stride_inner
            row = view.as_strided((4,), (rows.stride_feature,), view.storage_offset() + offset)
            assert torch.equal(row, expected)
    awkward = torch.randn(2, 3, 4, 5).permute(2, 0, 1, 3)[:, :, ::2]
    assert row_layout.as_rows(awkward).tensor.is_contiguous()


def _far_apart(value: Tensor, dim: int, stride: int) -> Tensor:
    """``value`` in memory that puts neighbours along ``dim`` ``stride`` elements apart; only touched pages are real."""
    strides = list(value.stride())
    strides[dim] = stride
    length = 1 + sum((size - 1) * s for size, s in zip(value.shape, strides, strict=True))
    view = torch.empty(length, dtype=value.dtype).as_strided(value.shape, strides)
    return view.copy_(value.detach()).requires_grad_(value.requires_grad)


def test_offsets_of_the_rank_beyond_int32() -> None:
    values = linear_arguments((3,), 3, 4, rank=64)
    expected = pmkernels.pareto_linear(**values, strategy="fused")
    for name in ("A", "B"):
        # 63 · 40,000,000 is more than 2^31
        far = {**values, name: _far_apart(values[name], 1, 40_000_000)}
        for strategy in KERNEL_STRATEGIES:
            y = pmkernels.pareto_linear(**far, strategy=strategy)
            torch.testing.assert_close(y, expected)
            gradients(y, torch.ones_like(y), far)


@pytest.mark.parametrize("name", ["x", "weight", "task_vectors"])
def test_offsets_beyond_int32(name: str) -> None:
    """Strides and products of strides over 2^31 elements: 4 to 8 GB of address space, a few touched pages."""
    values = linear_arguments((3,), 3, 4, tasks=3, dtype=torch.float16)
    expected = linear_arguments((3,), 3, 4, tasks=3, dtype=torch.float16)
    # the second is below 2^31 by itself: only its product with an index overflows
    for stride in (2**31 + 16, 2**30 + 2**29):
        values[name] = _far_apart(expected[name], 0, stride)
        y, other = (pmkernels.pareto_linear(**v, strategy="fused") for v in (values, expected))
        assert torch.equal(y, other)
        ours, theirs = gradients(y, torch.ones_like(y), values), gradients(other, torch.ones_like(y), expected)
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], msg=key)


@pytest.mark.parametrize("gamma_lead", [(), (4,)])
def test_unwritten_and_neighbouring_memory(gamma_lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel allocates starts as NaN between two guards: all of it is written, nothing beside it."""
    guard, buffers = 64, []
    empty = torch.empty

    def guarded(*size: Any, **options: Any) -> Tensor:
        plain = empty(*size, **options)
        if not plain.is_floating_point():
            return plain
        buffer = torch.full((plain.numel() + 2 * guard,), 12345.0, dtype=plain.dtype)
        buffers.append(buffer)
        inside = buffer[guard : guard + plain.numel()].fill_(torch.nan)
        return inside.view(plain.shape)

    values = linear_arguments((4,), 70, 67, rank=5, gamma_lead=gamma_lead, constant=3)
    for frozen in ((), ("lam",)):
        for name in frozen:
            values[name].requires_grad_(False)
        check_linear(values, strategy="fused")
        monkeypatch.setattr(torch, "empty", guarded)
        monkeypatch.setattr(torch, "empty_like", lambda t, **o: guarded(t.shape, dtype=o.get("dtype", t.dtype)))
        y = pmkernels.pareto_linear(**values, strategy="fused")
        found = gradients(y, torch.ones_like(y), values)
        logits = torch.randn(5, 11).requires_grad_()
        entropy = pmkernels.softmax_entropy(logits, strategy="fused")
        (d_logits,) = torch.autograd.grad(entropy.sum(), logits)
        parts = {name: v for name, v in values.items() if name not in ("x", "bias")}
        if not gamma_lead:
            merged = pmkernels.merge_weight(**parts, strategy="fused")
            found.update({f"{n} of merge": g for n, g in gradients(merged, torch.ones_like(merged), parts).items()})
            found["merged"] = merged
        monkeypatch.undo()
        for name, tensor in {**found, "y": y, "entropy": entropy, "logits": d_logits}.items():
            assert bool(torch.isfinite(tensor).all()), name
        assert len(buffers) > 5
        for buffer in buffers:
            assert bool((buffer[:guard] == 12345).all() and (buffer[-guard:] == 12345).all())


def test_reads_stay_inside_their_tensors() -> None:
    """Every argument lies between NaNs: one read too many would show in the result."""
    for gamma_lead in ((), (4,)):
        values = linear_arguments((4,), 33, 35, rank=5, gamma_lead=gamma_lead, constant=3)
        fenced = {}
        for name, value in values.items():
            buffer = torch.full((value.numel() + 4096,), torch.nan, dtype=value.dtype)
            inside = buffer[2048 : 2048 + value.numel()].copy_(value.detach().reshape(-1))
            fenced[name] = inside.view(value.shape).requires_grad_(value.requires_grad)
        check_linear(fenced, strategy="fused")


@pytest.mark.parametrize("gamma_lead", [(), (6, 1)])
def test_same_bits_twice(gamma_lead: tuple[int, ...]) -> None:
    runs = []
    for fill in (0.0, 1e30):
        values = linear_arguments((6, 11), 70, 140, gamma_lead=gamma_lead, constant=2)
        # whatever lies in freed memory must not matter
        del_me = [torch.full((70, 140), fill) for _ in range(8)]
        del del_me
        y = pmkernels.pareto_linear(**values, strategy="fused")
        runs.append([y, *gradients(y, torch.ones_like(y), values).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fused_equals_a_product_with_the_merged_weight() -> None:
    """W is summed in float32 and rounded once: in float16 the tile and merge_weight's result are the same bits."""
    values = linear_arguments((40,), 40, 40, dtype=torch.float16, without=("bias",), constant=5)
    identity = torch.eye(40, dtype=torch.float16)
    parts = {name: v.detach() for name, v in values.items() if name != "x"}
    tile = pmkernels.pareto_linear(identity, **parts, strategy="fused").t()
    assert torch.equal(tile, pmkernels.merge_weight(**parts, strategy="fused"))


# --- what is computed and what is kept --------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launchers that ran, in order."""
    names: list[str] = []

    def note(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = [key for key in ("A", "B") if kwargs.get(key) is not None]
            names.append("+".join([name, *given]) if name == "weight_grad" else name)
            return launcher(*args, **kwargs)

        return noted

    for module, launchers in (
        (linear_kernels, ("linear_fwd", "linear_bwd_x")),
        (weight_grad_kernels, ("weight_grad",)),
        (low_rank_kernels, ("shrink", "factor_grad", "core_grad", "preference_grad")),
    ):
        for name in launchers:
            monkeypatch.setattr(module, name, note(name, getattr(module, name)))
    noted = {"forward": linear_kernels.linear_fwd, "dx": linear_kernels.linear_bwd_x}
    noted["weight_grad"] = weight_grad_kernels.weight_grad
    monkeypatch.setitem(strategies.TABLE, "fused", dataclasses.replace(strategies.TABLE["fused"], **noted))
    return names


@pytest.mark.parametrize(
    ("gamma_lead", "wanted", "expected"),
    [
        ((), ("x",), ["linear_bwd_x", "linear_fwd"]),
        ((), ("bias",), []),
        ((), ("lam",), ["weight_grad"]),
        ((), ("A",), ["shrink", "factor_grad"]),
        ((), ("B",), ["shrink", "factor_grad"]),
        ((), ("G",), ["shrink", "shrink", "core_grad"]),
        ((), ("gamma",), ["shrink", "shrink", "core_grad"]),
        ((), ("lam", "A"), ["weight_grad+B"]),
        ((), ("lam", "B"), ["weight_grad+A"]),
        ((), ("lam", "A", "G", "B"), ["weight_grad+A+B"]),
        ((3, 1), ("x",), ["shrink", "linear_bwd_x", "linear_fwd"]),
        ((3, 1), ("lam",), ["weight_grad"]),
        ((3, 1), ("bias",), []),
        ((3, 1), ("A",), ["shrink", "factor_grad"]),
        ((3, 1), ("B",), ["shrink", "factor_grad"]),
        ((3, 1), ("G",), ["shrink", "shrink", "core_grad"]),
        ((3, 1), ("gamma",), ["shrink", "shrink", "preference_grad"]),
        ((), ("lam", "A_c"), ["weight_grad+B"]),
        ((), ("lam", "B_c"), ["weight_grad+A"]),
        ((), ("lam", "A", "G", "B", "A_c", "B_c"), ["weight_grad+A+B"]),
        ((), ("A_c",), ["shrink", "factor_grad"]),
        ((), ("B_c",), ["shrink", "factor_grad"]),
        # x·B_c stands beside t, dy·A_c beside ds
        ((3, 1), ("x", "lam", "A_c"), ["shrink", "linear_bwd_x", "linear_fwd", "shrink", "weight_grad+B"]),
        ((3, 1), ("lam", "A_c", "B_c"), ["weight_grad+A+B"]),
        ((3, 1), ("A_c", "B_c"), ["shrink", "shrink", "factor_grad", "factor_grad"]),
    ],
)
def test_nothing_is_computed_that_nobody_asked_for(
    gamma_lead: tuple[int, ...], wanted: Sequence[str], expected: list[str], launched: list[str]
) -> None:
    constant = 2 if set(CONSTANT) & set(wanted) else 0
    values = linear_arguments((3, 5), 20, 18, gamma_lead=gamma_lead, constant=constant)
    for name, value in values.items():
        value.requires_grad_(name in wanted)
    y = pmkernels.pareto_linear(**values, strategy="fused")
    launched.clear()
    found = torch.autograd.grad(y.sum(), [values[name] for name in wanted])
    assert launched == expected
    exact = exactly(values)
    theirs = torch.autograd.grad(reference.pareto_linear(**exact).sum(), [exact[name] for name in wanted])
    for name, a, b in zip(wanted, found, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=name)


def _largest_allocation(run: Callable[[], None]) -> int:
    """Bytes of the largest single allocation PyTorch makes in ``run``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("gamma_lead", [(), (8,)])
@pytest.mark.parametrize(("rank", "constant", "frozen"), [(4, 4, False), (64, 0, False), (4, 4, True)])
def test_nothing_of_the_size_of_a_weight_is_allocated(
    gamma_lead: tuple[int, ...], rank: int, constant: int, frozen: bool
) -> None:
    n, d = 192, 160
    # in float32, where a byte count says how many elements: a 16-bit weight would hide below float32 partial sums
    values = linear_arguments((8,), n, d, rank=rank, tasks=4, gamma_lead=gamma_lead, constant=constant)
    values["lam"].requires_grad_(not frozen)
    limit = n * d * 4

    def run(strategy: str) -> None:
        y = pmkernels.pareto_linear(**values, strategy=strategy)
        y.sum().backward()

    assert _largest_allocation(lambda: run("fused")) < limit
    # the measurement itself sees what others allocate
    assert _largest_allocation(lambda: run("eager")) >= limit
    assert _largest_allocation(lambda: run("streamed")) >= limit


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
def test_the_graph_keeps_the_input_and_the_parameters(strategy: str) -> None:
    saved: list[int] = []
    for gamma_lead in ((), (8, 1)):
        values = linear_arguments((8, 3), 20, 18, gamma_lead=gamma_lead, constant=2)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            pmkernels.pareto_linear(**values, strategy=strategy)
        assert set(saved) <= {value.data_ptr() for value in values.values()}
        for name in values:
            values[name].requires_grad_(name == "x")
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            pmkernels.pareto_linear(**values, strategy=strategy)
        assert values["x"].data_ptr() not in saved


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "constant"), [("fused", 2), ("streamed", 0)])
@pytest.mark.parametrize("gamma_lead", [(), (2, 1)])
@pytest.mark.parametrize("without", [(), *SUBSETS], ids=str)
def test_opcheck_of_pareto_linear(
    without: Sequence[str], gamma_lead: tuple[int, ...], strategy: str, constant: int
) -> None:
    if "gamma" in without and gamma_lead:
        pytest.skip("no preference to vary")
    values = linear_arguments((2, 3), 6, 5, gamma_lead=gamma_lead, without=without, constant=constant)
    inputs = tuple(values.get(name) for name in linear.INPUTS)
    torch.library.opcheck(ops.pareto_linear, (*inputs, strategy))
    x, *rest = (None if value is None else value.detach() for value in inputs)
    dy = torch.randn(2, 3, 6)
    needs = [name in values for name in ("x", *linear.LEARNED)]
    for wanted in (needs, [True, *[False] * len(linear.LEARNED)]):
        torch.library.opcheck(ops.pareto_linear_backward, (dy, x, *rest, wanted, strategy))


@pytest.mark.parametrize(
    ("without", "constant"),
    [((), 2), (("task_vectors", "lam"), 0), (LOW_RANK, 2), (("task_vectors", "lam", *LOW_RANK), 0)],
    ids=str,
)
def test_opcheck_of_merge_weight(without: Sequence[str], constant: int) -> None:
    values = linear_arguments((2,), 6, 5, without=("x", "bias", *without), constant=constant)
    inputs = tuple(values.get(name) for name in Parts._fields)
    torch.library.opcheck(ops.merge_weight, (*inputs, "fused"))
    frozen = tuple(None if value is None else value.detach() for value in inputs)
    torch.library.opcheck(ops.merge_weight_out, (*frozen, torch.empty(6, 5), "fused"))
    needs = [name in values for name in Parts._fields[2:]]
    torch.library.opcheck(ops.merge_weight_backward, (torch.randn(6, 5), *frozen[1:], needs, "fused"))


def test_opcheck_of_softmax_entropy() -> None:
    logits = torch.randn(3, 4, 5, requires_grad=True)
    torch.library.opcheck(ops.softmax_entropy, (logits,))
    entropy, largest, normaliser = ops.softmax_entropy(logits.detach())
    inputs = (torch.randn(3, 4), logits.detach(), entropy, largest, normaliser)
    torch.library.opcheck(ops.softmax_entropy_backward, inputs)


@pytest.mark.parametrize(("strategy", "constant"), [("fused", 2), ("streamed", 0)])
@pytest.mark.parametrize("gamma_lead", [(), (4,)])
def test_compiles_without_a_graph_break(gamma_lead: tuple[int, ...], strategy: str, constant: int) -> None:
    values = linear_arguments((4,), 6, 5, gamma_lead=gamma_lead, constant=constant)

    def model(**arguments: Tensor) -> Tensor:
        return pmkernels.softmax_entropy(pmkernels.pareto_linear(**arguments, strategy=strategy), strategy=strategy)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(**values), model(**values)
    torch.testing.assert_close(ours, theirs)
    found, expected = (gradients(h, torch.ones_like(h), values) for h in (ours, theirs))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize("strategy", KERNEL_STRATEGIES)
@pytest.mark.parametrize("gamma_lead", [(), (4, 1)])
def test_autocast_casts_x_only(gamma_lead: tuple[int, ...], strategy: str) -> None:
    values = linear_arguments((4, 3), 20, 18, gamma_lead=gamma_lead)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pmkernels.pareto_linear(**values, strategy=strategy)
    assert y.dtype == torch.bfloat16
    exact = exactly(values)
    truth = reference.pareto_linear(**exact)
    assert float((y.double() - truth).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
    found = gradients(y, torch.ones_like(y), values)
    theirs = gradients(truth, torch.ones_like(truth), exact)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert_close(name, gradient, gradient, theirs[name], torch.bfloat16, times=0, ulps=8)


@pytest.mark.parametrize("strategy", [*KERNEL_STRATEGIES, "eager"])
@pytest.mark.parametrize("without", [(), ("task_vectors", "lam")], ids=str)
def test_a_backward_inside_the_autocast_region_is_as_exact_as_outside(without: Sequence[str], strategy: str) -> None:
    for gamma_lead in ((), (4, 1)):
        values = linear_arguments((4, 3), 20, 18, gamma_lead=gamma_lead, without=without)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = pmkernels.pareto_linear(**values, strategy=strategy)
            inside = torch.autograd.grad(y.sum(), [v for v in values.values() if v.requires_grad], retain_graph=True)
        outside = torch.autograd.grad(y.sum(), [v for v in values.values() if v.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    parts = linear_arguments((1,), 20, 18, without=("x", "bias", *without))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = pmkernels.merge_weight(**parts, strategy=strategy)
        dw = torch.ones_like(merged)
        inside = torch.autograd.grad(merged, [v for v in parts.values() if v.requires_grad], dw, retain_graph=True)
    outside = torch.autograd.grad(merged, [v for v in parts.values() if v.requires_grad], dw)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_float16_gradients_from_tiles_of_dw_are_rounded_to_tf32_not_cut_off() -> None:
    """A tensor core cuts float32 operands off to TF32; rounded first, P and Q are within twice a float16 dW's error."""
    values = linear_arguments((60,), 64, 128, rank=16, dtype=torch.float16)
    y, exact = pmkernels.pareto_linear(**values, strategy="fused"), exactly(values)
    truth = reference.pareto_linear(**exact)
    dy = torch.randn(60, 64, generator=torch.Generator().manual_seed(1)).half()
    found, theirs = gradients(y, dy, values), gradients(truth, dy.double(), exact)
    for name in ("A", "B", "G"):
        error = float((found[name].double() - theirs[name]).norm() / theirs[name].norm())
        # something is rounded, to 11 bits
        assert 1e-6 < error < 4e-4, name
    # NaN stays NaN
    parts = linear_arguments((1,), 6, 5, dtype=torch.float16, without=("x", "bias", "task_vectors", "lam"))
    merged = pmkernels.merge_weight(**parts, strategy="fused")
    assert bool(torch.isnan(torch.autograd.grad(merged, parts["A"], merged.detach() * torch.nan)[0]).all())


def test_gradients_of_gradients_are_refused() -> None:
    values = linear_arguments((4,), 6, 5)
    y = pmkernels.pareto_linear(**values, strategy="fused")
    (dx,) = torch.autograd.grad(y.sum(), values["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


# --- merge_weight -----------------------------------------------------------------------------------------------------


def _layouts(shape: tuple[int, ...]) -> list[Callable[[Tensor], Tensor]]:
    def fortran(t: Tensor) -> Tensor:
        order = list(reversed(range(t.ndim)))
        return t.permute(order).contiguous().permute(order)

    def every_second(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype) if t.ndim else t
        if t.ndim:
            wide[..., ::2] = t
            return wide[..., ::2]
        return t

    return [lambda t: t, fortran, every_second]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2500,), (6, 5), (70, 130), (4, 3, 2, 2), (2, 3, 4, 5), (0, 4)])
def test_merge_weight_of_any_dimension_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=generator).to(dtype)
    tau = torch.randn(3, *shape, generator=generator).to(dtype)
    dw = torch.randn(shape, generator=generator).to(dtype)
    lam = torch.randn(3, generator=generator).requires_grad_()
    for weight, task_vectors, upstream in itertools.product(_layouts(shape), _layouts(shape), _layouts(shape)):
        values = {"weight": weight(plain), "task_vectors": task_vectors(tau), "lam": lam}
        merged = pmkernels.merge_weight(**values, strategy="fused")
        exact = exactly(values)
        truth = reference.merge_weight(**exact)
        assert merged.dtype == dtype
        assert merged.shape == shape
        assert_close("W", merged, merged, truth, dtype, times=0, ulps=1 if dtype != torch.float32 else 8)
        (ours,) = torch.autograd.grad(merged, lam, upstream(dw))
        (theirs,) = torch.autograd.grad(truth, exact["lam"], dw.double())
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "constant"), [(1, 0), (16, 5), (40, 0), (0, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_weight_with_low_rank_terms(rank: int, constant: int, dtype: torch.dtype) -> None:
    without = ("x", "bias", *(() if rank else LOW_RANK))
    values = linear_arguments((1,), 70, 67, rank=max(rank, 1), constant=constant, dtype=dtype, without=without)
    exact = exactly(values)
    merged, truth = pmkernels.merge_weight(**values, strategy="fused"), reference.merge_weight(**exact)
    assert_close("W", merged, merged, truth, dtype, times=0, ulps=1 if dtype != torch.float32 else 8)
    dw = torch.randn(70, 67, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layout in (dw, dw.t().contiguous().t(), dw[:1, :1].expand(70, 67)):
        found, theirs = (
            gradients(merged_again(values), layout, values),
            gradients(reference.merge_weight(**exact), layout.double(), exact),
        )
        for name in theirs:
            assert_close(name, found[name], found[name], theirs[name], torch.float32, times=0, ulps=64)


def merged_again(values: dict[str, Tensor]) -> Tensor:
    """A new graph over the same arguments."""
    return pmkernels.merge_weight(**values, strategy="fused")


def test_merge_weight_out_and_cached() -> None:
    values = linear_arguments((1,), 20, 18, without=("x", "bias"), constant=2)
    frozen = {name: value.detach() for name, value in values.items()}
    expected = pmkernels.merge_weight(**frozen, strategy="fused")
    out = torch.full((18, 20), torch.nan).t()
    assert pmkernels.merge_weight(**frozen, out=out, strategy="fused") is out
    assert torch.equal(out, expected)
    cached = pmkernels.merge_weight(**values, cached=expected, strategy="fused")
    assert cached.data_ptr() == expected.data_ptr()
    found, theirs = (
        gradients(cached.sum(), torch.ones(()), values),
        gradients(merged_again(values).sum(), torch.ones(()), values),
    )
    for name in theirs:
        assert torch.equal(found[name], theirs[name]), name
    nothing = pmkernels.merge_weight(frozen["weight"], strategy="fused")
    assert nothing.data_ptr() != frozen["weight"].data_ptr()
    assert torch.equal(nothing, frozen["weight"])


# --- softmax_entropy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 17, 1000, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_entropy(classes: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(3, 7, classes, generator=torch.Generator().manual_seed(0))).to(dtype)
    grad = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    for layout in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1), logits.mT.contiguous().mT):
        z = layout.detach().requires_grad_()
        entropy = pmkernels.softmax_entropy(z, strategy="fused")
        exact = layout.detach().double().requires_grad_()
        truth = reference.softmax_entropy(exact)
        assert entropy.dtype == torch.float32
        torch.testing.assert_close(entropy.double(), truth, rtol=1e-5, atol=1e-5)
        # one number for all rows arrives with stride 0
        for upstream in (grad, grad[:1, :1].expand(3, 7)):
            (ours,) = torch.autograd.grad(entropy, z, upstream, retain_graph=True)
            (theirs,) = torch.autograd.grad(truth, exact, upstream.double(), retain_graph=True)
            assert ours.dtype == dtype
            assert_close("dz", ours, ours, theirs, dtype, times=0, ulps=4 if dtype != torch.float32 else 64)


def test_softmax_entropy_at_the_edges() -> None:
    inf = math.inf
    rows = torch.tensor(
        [
            [1e4, -1e4, 0.0],
            [1e4, 1e4, -1e4],
            [0.0, -inf, 0.0],
            [-inf, -1e4, -inf],
            [-1e4, -1e4, -1e4],
            [-inf, -inf, 0.0],
        ]
    )
    # −inf blocks before, between and after the finite ones
    wide = torch.full((6, 5000), -inf)
    for columns in (slice(0, 3), slice(2500, 2503), slice(4997, 5000)):
        spread = wide.clone()
        spread[:, columns] = rows
        for case in (rows, spread):
            z = case.clone().requires_grad_()
            entropy = pmkernels.softmax_entropy(z, strategy="fused")
            torch.testing.assert_close(
                entropy, torch.tensor([0.0, math.log(2), math.log(2), 0.0, math.log(3), 0.0]), rtol=1e-6, atol=1e-6
            )
            assert bool((entropy >= 0).all())
            (grad,) = torch.autograd.grad(entropy.sum(), z)
            assert bool(torch.isfinite(grad).all())
    masked = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    masked[0, :2048] = torch.finfo(torch.float32).min
    masked[1, :2048] = -1e36
    z, exact = masked.clone().requires_grad_(), masked.double().requires_grad_()
    entropy, truth = pmkernels.softmax_entropy(z, strategy="fused"), reference.softmax_entropy(exact)
    torch.testing.assert_close(entropy.double(), truth, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(entropy.sum(), z)[0], torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    odd = torch.tensor([[math.nan, 0.0], [-inf, -inf], [inf, 0.0]])
    assert bool(torch.isnan(pmkernels.softmax_entropy(odd, strategy="fused")).all())
    assert bool(torch.isnan(pmkernels.softmax_entropy(odd, strategy="eager")).all())
    assert pmkernels.softmax_entropy(torch.zeros(0, 4), strategy="fused").shape == (0,)
    assert pmkernels.softmax_entropy(torch.zeros(4), strategy="fused").shape == ()


def test_softmax_entropy_keeps_logits_and_three_numbers_a_row() -> None:
    logits = torch.randn(6, 50, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pmkernels.softmax_entropy(logits, strategy="fused")
    assert sorted(t.numel() for t in saved) == [6, 6, 6, 300]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": 33}, ValueError, r"task_vectors: expected K from 1 to 32 .*got K = 33"),
        (
            {"tasks": 33, "without": ("task_vectors", "lam")},
            ValueError,
            r"G: expected K from 1 to 32 .*got K = 33",
        ),
        ({"rank": 65}, ValueError, r"^A: expected a rank from 1 to 64 .*got rank 65"),
        ({"rank": 33, "constant": 32}, ValueError, "^A_c and A: expected ranks that sum up to .* 64 .*got rank 65"),
        ({"constant": 65, "without": LOW_RANK}, ValueError, "^A_c: expected a rank from 1 to 64 .*got rank 65"),
        ({"dtype": torch.float64}, TypeError, r"x: expected float32, bfloat16 or float16 .*got torch.float64"),
    ],
)
def test_what_the_kernels_cannot_do_is_named_and_auto_goes_eager(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = linear_arguments((2,), 6, 5, **options)
    for strategy in KERNEL_STRATEGIES:
        with pytest.raises(error, match=message):
            pmkernels.pareto_linear(**values, strategy=strategy)
    torch.testing.assert_close(pmkernels.pareto_linear(**values), reference.pareto_linear(**values))
