"""Every operator against its fake: shapes, strides, dtypes and memory of its own, whatever is left out of a call.

A compiled program lays out its memory by the fakes: an operator that returns other strides is read wrongly there.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import LOW_RANK, folded, gradients, linear_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pmkernels
from pmkernels import dispatch, linear
from pmkernels.low_rank import Parts
from pmkernels.operators import OPERATORS

ops = torch.ops.pmkernels

if not dispatch.runs_kernels(torch.device("cpu")):
    pytest.skip("kernels run on the GPU here, see tests/gpu", allow_module_level=True)


RANKS = (1, 4, 16, 17, 32)
# each optional argument, with what must go with it
DROPPED: tuple[tuple[str, ...], ...] = (
    (),
    ("bias",),
    ("G", "gamma"),
    LOW_RANK,
    ("task_vectors", "lam"),
    ("task_vectors", "lam", "G", "gamma"),
    ("task_vectors", "lam", *LOW_RANK),
)
GRADIENTS = ("x", *linear.LEARNED)
# the rank of the constant term, by turns
CONSTANTS = (0, 5)
N, D = 20, 24
Layout = Callable[[Tensor], Tensor]


def transposed(value: Tensor) -> Tensor:
    """The same values with the last dimension outermost in memory."""
    return value.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(value: Tensor) -> Tensor:
    """One row for all of them, without memory for each."""
    return value[(slice(0, 1),) * (value.ndim - 1)].expand(value.shape) if value.ndim > 1 else value


def same(value: Tensor) -> Tensor:
    return value


LAYOUTS: tuple[Layout, ...] = (same, transposed, expanded)


def assert_as_faked(operator: Any, arguments: Sequence[Any]) -> None:
    """The results are what the fake says, in every stride, and share no memory with an argument or each other."""
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in arguments))
    real, fake = ([found] if isinstance(found, Tensor) else list(found or ()) for found in (real, fake))
    assert [(r.shape, r.stride(), r.dtype) for r in real] == [(f.shape, f.stride(), f.dtype) for f in fake]
    given = {v.untyped_storage().data_ptr() for v in arguments if isinstance(v, Tensor)}
    own = [r.untyped_storage().data_ptr() for r in real if r.numel()]
    assert given.isdisjoint(own)
    assert len(set(own)) == len(own)


Call = tuple[Any, tuple[Any, ...]]


def calls_of_linear(
    rank: int, without: Sequence[str], layout: Layout = same, dtype: torch.dtype = torch.float32, turn: int = 0
) -> Iterator[Call]:
    """pareto_linear and its backward: γ one and per row, both strategies, W(γ) and A_c given or not, by turns."""
    options: dict[str, Any] = {"tasks": 2, "rank": rank, "dtype": dtype, "without": without}
    for index, gamma_lead in enumerate(((), (2, 1))):
        if gamma_lead and "gamma" in without:
            continue
        values = linear_arguments((2, 3), N, D, gamma_lead=gamma_lead, constant=CONSTANTS[turn % 2], **options)
        values = {name: value.detach() for name, value in values.items()}
        if (turn // 2 + index) % 2:
            values["cached"] = torch.randn(N, D).to(dtype)
        inputs = [None if name not in values else layout(values[name]) for name in linear.INPUTS]
        strategy = ("fused", "streamed")[(turn + index) % 2]
        yield ops.pareto_linear, (*inputs, strategy)
        dy = layout(torch.randn(2, 3, N).to(dtype))
        yield ops.pareto_linear_backward, (dy, *inputs, [name in values for name in GRADIENTS], strategy)


def calls_of_merge(
    rank: int, without: Sequence[str], layout: Layout = same, dtype: torch.dtype = torch.float32, turn: int = 0
) -> Iterator[Call]:
    """merge_weight, into a new tensor and into one that is there, and its backward."""
    options: dict[str, Any] = {"tasks": 2, "rank": rank, "dtype": dtype, "without": ("x", "bias", *without)}
    values = linear_arguments((2,), N, D, constant=CONSTANTS[turn % 2], **options)
    inputs = [None if name not in values else layout(values[name].detach()) for name in Parts._fields]
    yield ops.merge_weight, (*inputs, "fused")
    yield ops.merge_weight_out, (*inputs, torch.empty(N, D, dtype=dtype), "fused")
    needs = [name in values for name in Parts._fields[2:]]
    yield ops.merge_weight_backward, (layout(torch.randn(N, D).to(dtype)), *inputs[1:], needs, "fused")


def calls_of_the_others(rank: int, layout: Layout = same, dtype: torch.dtype = torch.float32) -> Iterator[Call]:
    """Vectors, shrink, entropies and served layers; ``rank`` pieces or classes where there is no rank."""
    offsets = torch.arange(rank + 1) * 3
    weight, task_vectors = torch.randn(3 * rank).to(dtype), layout(torch.randn(2, 3 * rank).to(dtype))
    yield ops.merge_vectors, (weight, task_vectors, layout(torch.randn(rank, 2)), offsets)
    yield ops.merge_vectors_backward, (torch.ones((), dtype=dtype).expand(3 * rank), task_vectors, offsets)
    task_vectors, A, B = torch.randn(2, N, D).to(dtype), torch.randn(N, rank), torch.randn(D, rank)
    yield ops.project_task_vectors, (layout(task_vectors), layout(A), layout(B))
    grad, right = torch.randn(2, rank, rank), torch.randn(2, N, rank)
    yield ops.project_task_vectors_backward, (layout(grad), layout(task_vectors), layout(A), right)
    logits = layout(torch.randn(2, 3, rank).to(dtype))
    yield ops.softmax_entropy, (logits,)
    yield ops.softmax_entropy_backward, (layout(torch.randn(2, 3)), logits, *(torch.randn(2, 3) for _ in range(3)))
    for index, (gamma_lead, strategy) in enumerate(itertools.product(((), (2, 1)), ("eager", "fused", "streamed"))):
        values = folded((2, 3), N, D, tasks=2, rank=rank, gamma_lead=gamma_lead, dtype=dtype)
        wide = pmkernels.widen_weight(values["weight"], values["A"])
        left = (layout(values["x"]), wide, layout(values["G"]), layout(values["B"].to(dtype)), layout(values["gamma"]))
        yield ops.preference_linear, (*left, values["bias"] if index % 2 else None, strategy)


def opcheck(operator: Any, arguments: Sequence[Any]) -> None:
    torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("without", DROPPED, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_opcheck_of_linear_and_merge(rank: int, without: tuple[str, ...]) -> None:
    turn = RANKS.index(rank) + DROPPED.index(without)
    for operator, arguments in itertools.chain(
        calls_of_linear(rank, without, turn=turn), calls_of_merge(rank, without, turn=turn)
    ):
        opcheck(operator, arguments)


@pytest.mark.parametrize("rank", RANKS)
def test_opcheck_of_the_others(rank: int) -> None:
    for operator, arguments in calls_of_the_others(rank):
        opcheck(operator, arguments)


def test_no_operator_is_left_out() -> None:
    calls = itertools.chain(calls_of_linear(4, ()), calls_of_merge(4, ()), calls_of_the_others(4))
    assert {operator for operator, _ in calls} == {getattr(ops, name) for name in OPERATORS}


def test_gradients_are_registered() -> None:
    values = linear_arguments((2, 3), N, D, tasks=2, rank=4, constant=5)
    learned = {name: values.get(name) for name in linear.INPUTS}
    logits, lam = torch.randn(3, 5, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    for operator, arguments in (
        (ops.pareto_linear, (*learned.values(), "fused")),
        (ops.merge_weight, (*(learned[name] for name in Parts._fields), "fused")),
        (ops.merge_vectors, (torch.randn(6), torch.randn(2, 6), lam, torch.tensor([0, 2, 6]))),
        (ops.softmax_entropy, (logits,)),
        (ops.project_task_vectors, (torch.randn(2, N, D), learned["A"], learned["B"])),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_autograd_registration")


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(same, torch.float16), (transposed, torch.float32), (transposed, torch.bfloat16), (expanded, torch.float32)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_stride_is_as_the_fake_says(layout: Layout, dtype: torch.dtype) -> None:
    rank = 17
    for turn, without in enumerate(((), ("G", "gamma"), ("task_vectors", "lam"))):
        calls = (
            *calls_of_linear(rank, without, layout, dtype, turn),
            *calls_of_merge(rank, without, layout, dtype, turn),
        )
        for operator, arguments in calls:
            assert_as_faked(operator, arguments)
    for operator, arguments in calls_of_the_others(rank, layout, dtype):
        assert_as_faked(operator, arguments)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_sizes_of_one(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "N", size[0])
    monkeypatch.setitem(globals(), "D", size[1])
    for turn, without in enumerate(((), ("G", "gamma"), ())):
        for operator, arguments in (*calls_of_linear(4, without, turn=turn), *calls_of_merge(4, without, turn=turn)):
            assert_as_faked(operator, arguments)
    for operator, arguments in calls_of_the_others(1):
        assert_as_faked(operator, arguments)


@pytest.mark.parametrize("without", [(), ("G", "gamma"), ("task_vectors", "lam", "G", "gamma")], ids=str)
@pytest.mark.parametrize("rank", [4, 17])
def test_compiled_gradients_have_the_same_values_and_strides(rank: int, without: tuple[str, ...]) -> None:
    values = linear_arguments((2, 3), N, D, tasks=2, rank=rank, without=without, constant=5 if rank == 17 else 0)

    def model(values: dict[str, Tensor], strategy: str) -> Tensor:
        y = pmkernels.pareto_linear(**values, strategy=strategy)
        x, bias, rest = values["x"], values["bias"], {k: v for k, v in values.items() if k not in ("x", "bias")}
        return y + x @ pmkernels.merge_weight(**rest, strategy="fused").t() + bias

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    strategy = "fused" if rank == 4 else "streamed"
    found, expected = (gradients(run(values, strategy), torch.ones(2, 3, N), values) for run in (compiled, model))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
        assert found[name].stride() == expected[name].stride(), name
