"""Products cut into parts, over D for few rows and over M for few tiles, and dW by the library's product.

Interpreted on the CPU; what the interpreter cannot see, that the kernels compile where a size is 1, in a process.
"""

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import (
    LOW_RANK,
    Parts,
    check_linear,
    gradients,
    linear_arguments,
    note_parts,
)
from torch import Tensor

import pmkernels
from pmkernels import configs, dispatch, linear, strategies

if not dispatch.runs_kernels(torch.device("cpu")):
    pytest.skip("kernels run on the GPU here, see tests/gpu", allow_module_level=True)

from pmkernels import products as library
from pmkernels.kernels import weight_grad as weight_grad_kernels

ops = torch.ops.pmkernels

DTYPES = (torch.float32, torch.float16)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return note_parts(monkeypatch)


def with_config(*ops: str, **changed: Any) -> contextlib.AbstractContextManager[configs.Configs]:
    """The shipped configurations of ``ops`` with some fields changed."""

    def found(asked: configs.Asked, entry: configs.Entry) -> configs.Config:
        return dataclasses.replace(entry.config, **changed) if asked.op in ops else entry.config

    return dispatch.using(configs.Configs(launch=found))


# --- over D -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", [(), (3,)], ids=["shared", "per row"])
@pytest.mark.parametrize(("n", "d"), [(35, 300), (300, 35), (1, 257)])
def test_few_rows_split_d_by_the_shipped_rules(
    n: int, d: int, gamma_lead: tuple[int, ...], dtype: torch.dtype, parts: Parts
) -> None:
    check_linear(linear_arguments((3,), n, d, gamma_lead=gamma_lead, dtype=dtype), strategy="fused")
    # forward contracts over D, dx over N
    forward, dx = parts.of_d
    assert forward > 1 or d < 200
    assert dx > 1 or n < 200
    assert max(forward, dx) > 1


@pytest.mark.parametrize(("force", "rank"), [(2, 1), (3, 17), (16, 33)])
def test_every_part_of_d_counts_once(rank: int, force: int, parts: Parts) -> None:
    """One column left over, a short last part, more parts than blocks; the bias and the low-rank term once."""
    parts.force = force
    for (m, d), gamma_lead, without in itertools.product(
        ((1, 65), (5, 47)), ((), (1,)), ((), ("bias", "task_vectors", "lam"))
    ):
        check_linear(linear_arguments((m,), 18, d, rank=rank, gamma_lead=gamma_lead, without=without), strategy="fused")
    assert max(parts.of_d) > 1


@pytest.mark.parametrize("tasks", [1, 8])
def test_numbers_of_tasks_in_parts(tasks: int, parts: Parts) -> None:
    for gamma_lead, dtype in (((), DTYPES[0]), ((4,), DTYPES[1]), ((1,), DTYPES[0])):
        parts.force = 3
        check_linear(linear_arguments((4,), 40, 130, tasks=tasks, gamma_lead=gamma_lead, dtype=dtype), strategy="fused")
    assert min(parts.of_d) > 1


@pytest.mark.parametrize("layout", ["expanded", "transposed", "columns", "strided"])
def test_layouts_in_parts(layout: str, parts: Parts) -> None:
    """x, dy, W0 and τ of any strides; dy of ``y.sum()`` is one number for all."""
    values = linear_arguments((2, 3), 70, 150, gamma_lead=(2, 1))
    plain = {name: value.detach() for name, value in values.items()}
    dy = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))

    def arranged(value: Tensor) -> Tensor:
        if layout == "expanded":
            return value[:1].expand(value.shape) if value.ndim > 2 else value
        if layout == "transposed":
            return value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim > 1 else value
        if layout == "columns":
            return value.movedim(-1, 0).contiguous().movedim(0, -1)
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = value
        return wide[..., 1::2]

    for force, shared in ((None, True), (4, False)):
        parts.force = force
        scattered = {name: arranged(value).requires_grad_(values[name].requires_grad) for name, value in plain.items()}
        if shared:
            scattered["gamma"] = plain["gamma"][0, 0].requires_grad_()
        upstream = dy.flatten()[0].expand(dy.shape) if layout == "expanded" else arranged(dy)
        check_linear(scattered, upstream, strategy="fused")
    assert max(parts.of_d) > 1
    assert max(parts.of_rows) == 1


def test_parts_are_rounded_once(parts: Parts) -> None:
    """Partial results stay in float32: in float16 a split product equals the whole one up to the order of the sum."""
    values = {name: v.detach() for name, v in linear_arguments((4,), 64, 320, dtype=torch.float16).items()}
    whole, split = [], []
    for force, found in ((1, whole), (4, split)):
        parts.force = force
        found.append(pmkernels.pareto_linear(**values, strategy="fused"))
    assert parts.of_d[0] == 1 and parts.of_d[1] > 2
    # rounded partial results would differ in a third of the elements
    assert float((whole[0] != split[0]).float().mean()) < 0.03
    torch.testing.assert_close(split[0], whole[0], rtol=2**-10, atol=1e-6)


# --- over M -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [541])
def test_many_rows_split_m_by_the_shipped_rules(m: int, dtype: torch.dtype, parts: Parts) -> None:
    """λ alone: the shipped tiles leave no room for partial sums of P and Q."""
    check_linear(linear_arguments((m,), 70, 33, tasks=2, dtype=dtype, without=LOW_RANK), strategy="fused")
    check_linear(linear_arguments((m,), 40, 20, gamma_lead=(m,), dtype=dtype), strategy="fused")
    assert min(parts.of_rows) > 1


@pytest.mark.parametrize("rank", [4])
def test_wide_tiles_split_m_with_a_low_rank_term(rank: int, parts: Parts) -> None:
    with with_config("weight_grad", block_m=16, block_n=128, block_d=128):
        check_linear(linear_arguments((257,), 128, 128, rank=rank), strategy="fused")
    assert parts.of_rows == [2]


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, DTYPES[1]), (16, DTYPES[1]), (17, DTYPES[0]), (32, DTYPES[1]), (64, DTYPES[1])],
)
def test_every_gradient_in_parts_of_m(rank: int, dtype: torch.dtype, parts: Parts) -> None:
    """Ranks that are padded, that are whole, and from 33 on only λ's and the bias's gradient are from tiles."""
    for force, wanted in ((3, True), (2, False)):
        parts.force = force
        values = linear_arguments((65,), 20, 67, rank=rank, dtype=dtype)
        if wanted:
            check_linear(values, strategy="fused")
            continue
        values["G"].requires_grad_(False)
        values["A"].requires_grad_(rank % 2 == 0)
        values["B"].requires_grad_(rank % 2 == 1)
        check_linear(values, strategy="fused")
    assert min(parts.of_rows) > 1


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
@pytest.mark.parametrize("wanted", [("bias",), ("lam", "bias"), ("gamma",), ("lam", "gamma"), ("lam", "B"), ("x",)])
def test_gradients_by_themselves(wanted: Sequence[str], strategy: str, parts: Parts) -> None:
    parts.force = 3
    for gamma_lead, dtype in (((), DTYPES[0]), ((70,), DTYPES[1]), ((1,), DTYPES[0])):
        values = linear_arguments((70,), 20, 35, gamma_lead=gamma_lead, dtype=dtype)
        for name, value in values.items():
            value.requires_grad_(name in wanted)
        check_linear(values, strategy=strategy)


def test_the_bias_gradient_comes_with_dw(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ_m dy by extra programs of the one launch: any number of rows, columns and parts, float32 from start to end."""
    given: list[Tensor | None] = []
    fused = strategies.TABLE["fused"]

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append((found := fused.weight_grad(*args, **kwargs)).d_bias)
        return found

    monkeypatch.setitem(strategies.TABLE, "fused", dataclasses.replace(fused, weight_grad=noted))
    sizes = ((0, 5, 4), (1, 1, 1), (3, 64, 1), (33, 65, 3), (127, 63, 9), (129, 130, 2))
    for (m, n, d), (force, dtype) in itertools.product(sizes, ((None, torch.float32), (5, torch.float16))):
        parts.force = force
        values = linear_arguments((m,), n, d, dtype=dtype, without=LOW_RANK)
        check_linear(values, strategy="fused")
        check_linear(values, torch.ones((), dtype=dtype).expand(m, n), strategy="fused")
    assert len(given) == 2 * 2 * len(sizes)
    assert all(d_bias is not None and d_bias.dtype == torch.float32 for d_bias in given)
    given.clear()
    y = pmkernels.pareto_linear(**linear_arguments((3,), 0, 4), strategy="fused")
    y.sum().backward()
    # no columns at all
    assert given == [None]


def test_a_bias_gradient_beyond_float16_is_summed_in_float32() -> None:
    values = linear_arguments((600,), 1, 1, tasks=1, dtype=torch.float16, without=LOW_RANK)
    values["bias"] = torch.zeros(1, requires_grad=True)
    y = pmkernels.pareto_linear(**values, strategy="fused")
    assert float(gradients(y, torch.full_like(y, 200), values)["bias"]) == 120_000


# --- memory and bits --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """torch.empty is NaN between two guards; at the end nothing was written beside what was asked for."""
    guard, buffers = 64, []
    empty = torch.empty

    def guarded(*size: Any, **options: Any) -> Tensor:
        plain = empty(*size, **options)
        if not plain.is_floating_point():
            return plain
        buffer = torch.full((plain.numel() + 2 * guard,), 12345.0, dtype=plain.dtype)
        buffers.append(buffer)
        return buffer[guard : guard + plain.numel()].fill_(torch.nan).view(plain.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t, **o: guarded(t.shape, dtype=o.get("dtype", t.dtype)))
    yield buffers
    monkeypatch.undo()
    for buffer in buffers:
        # in its own precision: 12345 is not a float16
        mark = torch.tensor(12345.0, dtype=buffer.dtype)
        assert bool((buffer[:guard] == mark).all() and (buffer[-guard:] == mark).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unwritten_memory_in_parts(dtype: torch.dtype, parts: Parts, poisoned: list[Tensor]) -> None:
    for force, gamma_lead, rank in ((2, (), 17), (3, (1,), 1), (3, (70,), 4)):
        parts.force = force
        values = linear_arguments((70,), 33, 90, rank=rank, gamma_lead=gamma_lead, dtype=dtype)
        y = pmkernels.pareto_linear(**values, strategy="fused")
        for name, found in {"y": y, **gradients(y, torch.ones_like(y), values)}.items():
            assert bool(torch.isfinite(found).all()), name
    assert min(parts.of_d) > 1 and min(parts.of_rows) > 1
    assert any(buffer.numel() > 2 * 70 * 33 for buffer in poisoned)


@pytest.mark.parametrize("gamma_lead", [(), (1,)])
def test_reads_stay_inside_their_tensors_in_parts(gamma_lead: tuple[int, ...], parts: Parts) -> None:
    parts.force = 3
    values = linear_arguments((70,), 33, 51, rank=5, gamma_lead=gamma_lead)
    fenced = {}
    for name, value in values.items():
        buffer = torch.full((value.numel() + 4096,), torch.nan, dtype=value.dtype)
        inside = buffer[2048 : 2048 + value.numel()].copy_(value.detach().reshape(-1))
        fenced[name] = inside.view(value.shape).requires_grad_(value.requires_grad)
    check_linear(fenced, strategy="fused")


@pytest.mark.parametrize("strategy", ["fused", "streamed"])
@pytest.mark.parametrize("gamma_lead", [(), (1,)])
def test_same_bits_twice_in_parts(gamma_lead: tuple[int, ...], strategy: str, parts: Parts) -> None:
    parts.force = 4
    runs = []
    for fill in (0.0, 1e30):
        values = linear_arguments((97,), 40, 70, gamma_lead=gamma_lead)
        freed = [torch.full((4, 97, 40), fill) for _ in range(4)]
        del freed
        y = pmkernels.pareto_linear(**values, strategy=strategy)
        runs.append({"y": y, **gradients(y, torch.ones_like(y), values)})
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]), name


def _largest_allocation(run: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    ("lead", "n", "d", "rank", "without"),
    [
        ((4,), 64, 640, 4, ()),
        ((1,), 640, 64, 8, ()),
        ((520,), 128, 64, 0, LOW_RANK),
    ],
)
def test_nothing_of_the_size_of_a_weight_is_allocated_in_parts(
    lead: tuple[int, ...], n: int, d: int, rank: int, without: Sequence[str], parts: Parts
) -> None:
    """By the shipped rules and in float32, where a byte count says how many elements."""
    values = linear_arguments(lead, n, d, tasks=1, rank=max(rank, 1), without=without)
    if without:
        values["x"].requires_grad_(False)
    y = torch.zeros(*lead, n, requires_grad=True) if without else pmkernels.pareto_linear(**values, strategy="fused")

    def run() -> None:
        if without:
            # dW alone: y and its gradient have M·N elements
            reduced = weight_grad_kernels.weight_grad(
                y, values["x"], values["task_vectors"], A=None, B=None, need_bias=True
            )
            assert reduced.d_lam is not None
        else:
            pmkernels.pareto_linear(**values, strategy="fused").sum().backward()

    assert _largest_allocation(run) < n * d * 4
    assert max(parts.of_d + parts.of_rows) > 1


# --- several task vectors at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [3, 8])
def test_loading_several_task_vectors_at_a_time_changes_no_bit(unroll: int) -> None:
    for tasks, gamma_lead in ((1, ()), (8, ()), (11, ()), (11, (4,))):
        values = linear_arguments((4,), 20, 35, tasks=tasks, gamma_lead=gamma_lead)
        parts_of = {name: v.detach() for name, v in values.items() if name not in ("x", "bias")}
        results = []
        for factor in (1, unroll):
            with with_config("linear", "merge", unroll=factor):
                y = pmkernels.pareto_linear(**values, strategy="fused")
                merged = y if gamma_lead else pmkernels.merge_weight(**parts_of, strategy="fused")
                results.append([y, merged, gradients(y, torch.ones_like(y), values)["x"]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- dW by the library's product --------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every dW that was formed by the library."""
    seen: list[torch.dtype] = []
    product = library.dense_gradient

    def noted(dy: Tensor, x: Tensor) -> Tensor:
        seen.append(dy.dtype)
        return product(dy, x)

    monkeypatch.setattr(library, "dense_gradient", noted)
    return seen


@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, DTYPES[0]), (16, torch.bfloat16), (17, DTYPES[0]), (33, torch.bfloat16)]
)
def test_streamed_reduces_a_dw_that_is_there(rank: int, dtype: torch.dtype, products: list[torch.dtype]) -> None:
    for tasks, gamma_lead in ((1, ()), (3, (7, 1)), (3, ())):
        values = linear_arguments((7, 9), 35, 40, tasks=tasks, rank=rank, gamma_lead=gamma_lead, dtype=dtype)
        check_linear(values, strategy="streamed")
        check_linear(values, torch.ones((), dtype=dtype).expand(7, 9, 35), strategy="streamed")
    assert products == [dtype] * 6


def test_streamed_without_rows_or_inputs_or_outputs(products: list[torch.dtype]) -> None:
    shapes = (((0,), 5, 4), ((0, 3), 5, 4), ((3, 0), 5, 4), ((2,), 0, 4), ((2,), 5, 0), ((2,), 0, 0), ((), 5, 4))
    for (lead, n, d), (tasks, dtype) in itertools.product(shapes, ((0, torch.bfloat16), (3, torch.float32))):
        for gamma_lead in ((), lead):
            values = linear_arguments(lead, n, d, tasks=tasks, gamma_lead=gamma_lead, dtype=dtype)
            check_linear(values, strategy="streamed")
    assert len(products) == len(shapes) * 4


def test_float16_keeps_dw_in_registers_even_if_streamed(products: list[torch.dtype]) -> None:
    """A dW of 16 bits underflows: here every element is 2⁻²⁶."""
    for dtype in (torch.float16, torch.bfloat16):
        x, dy = (torch.full((1, size), 2.0**-13, dtype=dtype) for size in (20, 18))
        task_vectors, lam = torch.ones(1, 18, 20, dtype=dtype), torch.zeros(1, requires_grad=True)
        y = pmkernels.pareto_linear(
            x, torch.zeros(18, 20, dtype=dtype), task_vectors=task_vectors, lam=lam, strategy="streamed"
        )
        (d_lam,) = torch.autograd.grad(y, lam, dy)
        assert float(d_lam) == 360 * 2.0**-26
    assert products == [torch.bfloat16]


def test_a_choice_for_each_operation(monkeypatch: pytest.MonkeyPatch, products: list[torch.dtype]) -> None:
    for chosen in itertools.product(("fused", "streamed"), repeat=3):
        by_operation = dict(zip(("forward", "dx", "weight_grad"), chosen, strict=True))
        asked: list[str] = []

        def choose(operation: str, *_: Any, table: dict[str, str] = by_operation, **options: Any) -> str:
            asked.append(operation)  # noqa: B023
            return table[operation]

        monkeypatch.setattr(strategies, "choose", choose)
        products.clear()
        for gamma_lead in ((), (2, 1)):
            check_linear(linear_arguments((2, 3), 20, 18, gamma_lead=gamma_lead), strategy="fused")
        assert asked == ["forward", "dx", "weight_grad"] * 2
        assert len(products) == (2 if by_operation["weight_grad"] == "streamed" else 0)


def test_auto_on_the_kernels_is_right_whatever_it_takes() -> None:
    for lead, gamma_lead in (((1,), ()), ((3, 5), (3, 1)), ((270,), ()), ((0,), ())):
        for dtype in DTYPES:
            with dispatch.using(configs.Configs(runs=True)):
                check_linear(linear_arguments(lead, 40, 66, gamma_lead=gamma_lead, dtype=dtype))


def test_strided_arguments_match_their_fakes() -> None:
    for strategy, gamma_lead in itertools.product(("fused", "streamed"), ((), (2, 1))):
        values = {name: v.detach() for name, v in linear_arguments((2, 3), 6, 5, gamma_lead=gamma_lead).items()}
        inputs = [values.get(name) for name in linear.INPUTS]
        for dy in (torch.randn(()).expand(2, 3, 6), torch.randn(6, 2, 3).movedim(0, -1)):
            arguments = (
                dy,
                inputs[0].movedim(-1, 0).contiguous().movedim(0, -1),
                *inputs[1:],
                [name in values for name in ("x", *linear.LEARNED)],
                strategy,
            )
            torch.library.opcheck(ops.pareto_linear_backward, arguments, test_utils=("test_schema", "test_faketensor"))


# --- what only a compiler sees ----------------------------------------------------------------------------------------

FRONT_END = """
import torch, triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
import pmkernels
from pmkernels import configs, dispatch

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

seen, faults, now = set(), set(), None

def translate(kernel, key, signature, device, constexprs, options, attrs, warmup):
    if (kernel.__name__, key) in seen:
        return None
    seen.add((kernel.__name__, key))
    _, _, target, backend, _ = kernel.device_caches[device]
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = kernel.ASTSource(kernel, signature, constexprs, attrs)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    try:
        source.make_ir(target, options, functions, modules, context)
    except Exception as error:
        faults.add(f"{kernel.__name__} for {now}: {str(error).strip().splitlines()[-1]}")

triton.runtime.driver.set_active(Driver())
JITFunction._do_compile = translate
SHAPES = (((), 64, 768), ((1,), 768, 64), ((1, 1), 1, 1), ((3,), 1, 700), ((600,), 3, 5), ((1,), 1, 700))
calls = [(name, *shape, 3, per_row) for name in ("default", "sm_90") for shape in SHAPES for per_row in (False, True)]
for name, lead, n, d, tasks, per_row in [*calls, ("default", (1, 2), 7, 700, 1, False)]:
    now = f"rows {lead}, N = {n}, D = {d}, K = {tasks} ({name})"
    make = lambda *shape, grad=True: torch.empty(*shape, dtype=torch.float32).requires_grad_(grad)
    learned = dict(lam=make(tasks), A=make(n, 4), G=make(4, 4, tasks), B=make(d, 4), x=make(*lead, d), bias=make(n))
    learned["gamma"] = make(*(lead if per_row else ()), tasks)
    frozen = dict(weight=make(n, d, grad=False), task_vectors=make(tasks, n, d, grad=False))
    with dispatch.using(configs.Configs(file=name, runs=True)):
        y = pmkernels.pareto_linear(**learned, **frozen, strategy="fused")
        torch.autograd.grad(y, list(learned.values()), torch.empty(()).expand(y.shape))
for pieces, size, tasks in ((1, 1, 1), (1, 16, 1), (3, 4000, 8)):
    now = f"L = {pieces}, S = {size}, K = {tasks}"
    lam = torch.empty(pieces, tasks, requires_grad=True)
    offsets = torch.empty(pieces + 1, dtype=torch.int64)
    with dispatch.using(configs.Configs(runs=True)):
        merged = pmkernels.merge_vectors(torch.empty(size), torch.empty(tasks, size), lam, offsets, strategy="fused")
        torch.autograd.grad(merged, lam, torch.empty(()).expand(size))
assert len(seen) > 40, len(seen)
print("; ".join(sorted(faults)))
"""


def test_kernels_translate_where_a_size_is_one() -> None:
    """Triton makes a constant of an argument that is 1, and a constant lacks what a tensor has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FRONT_END], capture_output=True, text=True, cwd=root, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == ""
