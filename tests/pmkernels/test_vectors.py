"""merge_vectors against float64: pieces of any length, any strides, the eager form and the kernels interpreted."""

import copy
import itertools
from typing import Any

import pytest
import torch
from kernel_cases import assert_close
from torch import Tensor

import pmkernels
from pmkernels import dispatch, launch, reference

KERNELS = dispatch.runs_kernels(torch.device("cpu"))
STRATEGIES = ("eager", "fused") if KERNELS else ("eager",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="kernels run on the GPU here, see tests/gpu")


def arguments(sizes: list[int], tasks: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    return {
        "weight": torch.randn(total, generator=generator).to(dtype),
        "task_vectors": torch.randn(tasks, total, generator=generator).to(dtype),
        "lam": torch.randn(len(sizes), tasks, generator=generator).requires_grad_(),
        "offsets": torch.tensor([0, *sizes]).cumsum(0),
    }


def exactly(values: dict[str, Tensor]) -> dict[str, Tensor]:
    exact = {name: v.detach().double() if v.is_floating_point() else v for name, v in values.items()}
    exact["lam"].requires_grad_(values["lam"].requires_grad)
    return exact


def check(values: dict[str, Tensor], strategy: str, grad: Tensor | None = None) -> None:
    """The merged vector and dλ against float64, in units of plain PyTorch's own error."""
    exact, dtype = exactly(values), values["weight"].dtype
    truth, plain = reference.merge_vectors(**exact), reference.merge_vectors(**values)
    merged = pmkernels.merge_vectors(**values, strategy=strategy)
    assert merged.shape == values["weight"].shape and merged.dtype == dtype
    assert merged.data_ptr() != values["weight"].data_ptr() or not merged.numel()
    sizes = float(reference.merge_vectors(**{k: v.detach().abs() for k, v in exact.items()}).max()) if len(truth) else 0
    assert_close("merged", merged.detach(), plain.detach(), truth.detach(), dtype, terms=sizes)
    if grad is None:
        grad = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (ours,) = torch.autograd.grad(merged, values["lam"], grad)
    (allowed,) = torch.autograd.grad(plain, values["lam"], grad)
    (expected,) = torch.autograd.grad(truth, exact["lam"], grad.double())
    assert ours.dtype == values["lam"].dtype and ours.shape == values["lam"].shape
    terms = float((grad.double().abs() * exact["task_vectors"].abs()).sum(dim=1).max()) if ours.numel() else 0.0
    assert_close("gradient of lam", ours, allowed, expected, torch.float32, terms=terms)


# no pieces, pieces of nothing, one piece, one element, on and off a block of 512, many blocks
PIECES = ([], [0], [0, 0, 0], [1], [5], [1, 1, 1], [0, 7, 0, 3, 0], [511, 512, 513], [1025, 0, 1, 2000], [3] * 9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tasks", [0, 1, 3, 32])
@pytest.mark.parametrize("sizes", PIECES, ids=str)
def test_pieces_and_tasks(sizes: list[int], tasks: int, strategy: str) -> None:
    check(arguments(sizes, tasks), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype, strategy: str) -> None:
    values = arguments([0, 600, 1, 64], 3, dtype)
    check(values, strategy)
    # task vectors kept in another type than the weight
    for other in DTYPES:
        check({**values, "task_vectors": values["task_vectors"].to(other)}, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layouts(strategy: str) -> None:
    plain = arguments([5, 0, 530, 17], 4)
    total = len(plain["weight"])

    def strided(value: Tensor) -> Tensor:
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = value.detach()
        return wide[..., 1::2]

    def columns(value: Tensor) -> Tensor:
        return value.detach().t().contiguous().t()

    def rows_apart(value: Tensor) -> Tensor:
        return torch.cat([value.detach(), torch.full((len(value), 3), torch.nan)], dim=1)[:, : value.shape[1]]

    def expanded(value: Tensor) -> Tensor:
        return value.detach()[:1].expand(value.shape)

    choices = (lambda v: v.detach(), strided, columns, rows_apart, expanded)
    for of_tau, of_lam in itertools.product(choices, choices):
        values = {**plain, "task_vectors": of_tau(plain["task_vectors"]), "weight": strided(plain["weight"])}
        values["lam"] = of_lam(plain["lam"]).requires_grad_()
        check(values, strategy)
    offsets = torch.stack([plain["offsets"], plain["offsets"] * 0 - 1], dim=1)[:, 0]
    negative = {**plain, "weight": torch._neg_view(plain["weight"]), "task_vectors": plain["task_vectors"].flip(1)}
    grads = (torch.ones(()).expand(total), strided(torch.randn(total)), torch._neg_view(torch.randn(total)))
    for values, grad in itertools.product(
        ({**plain, "offsets": offsets}, negative, {**plain, "weight": grads[0]}), grads
    ):
        check(values, strategy, grad)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2])
def test_one_element_with_any_stride(size: int, strategy: str) -> None:
    values = arguments([size], 2)
    far = torch.full((2, 40), torch.nan)
    far[:, ::20][:, :size] = values["task_vectors"]
    check({**values, "task_vectors": far[:, ::20][:, :size]}, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_piece_is_a_merge_of_its_own(strategy: str) -> None:
    values = arguments([700, 3], 3)
    merged = pmkernels.merge_vectors(**values, strategy=strategy)
    for piece, (first, end) in enumerate(((0, 700), (700, 703))):
        alone = pmkernels.merge_weight(
            values["weight"][first:end],
            task_vectors=values["task_vectors"][:, first:end],
            lam=values["lam"][piece],
            strategy=strategy,
        )
        torch.testing.assert_close(merged[first:end], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_needs_no_gradient_has_none_and_what_is_used_twice_has_both(strategy: str) -> None:
    values = arguments([4, 3], 2)
    frozen = {**values, "lam": values["lam"].detach()}
    assert not pmkernels.merge_vectors(**frozen, strategy=strategy).requires_grad
    with torch.no_grad():
        assert not pmkernels.merge_vectors(**values, strategy=strategy).requires_grad
    merged = pmkernels.merge_vectors(**values, strategy=strategy)
    (once,) = torch.autograd.grad(merged.sum(), values["lam"], retain_graph=True)
    (twice,) = torch.autograd.grad(merged.sum() + (merged * 3).sum(), values["lam"], retain_graph=True)
    torch.testing.assert_close(twice, 4 * once)
    # a piece that nobody used
    (part,) = torch.autograd.grad(merged[:4].sum(), values["lam"], retain_graph=True)
    assert torch.equal(part[1], torch.zeros(2))
    torch.testing.assert_close(part[0], once[0])
    copied = copy.deepcopy(values)
    assert torch.equal(pmkernels.merge_vectors(**copied, strategy=strategy), merged)
    (dlam,) = torch.autograd.grad(merged.sum(), values["lam"], create_graph=True)
    with pytest.raises(RuntimeError):
        dlam.sum().backward()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neighbouring_pieces_do_not_reach_each_other(strategy: str) -> None:
    """NaN and infinity in one piece, its λ or its gradient stay in it."""
    for name in ("weight", "task_vectors", "lam", "grad"):
        values = arguments([5, 6, 7], 2)
        grad = torch.ones(18)
        if name == "lam":
            values["lam"] = values["lam"].detach()
            values["lam"][1] = torch.nan
            values["lam"].requires_grad_()
        elif name == "grad":
            grad[5:11] = torch.nan
        else:
            values[name][..., 5:11] = torch.nan
        merged = pmkernels.merge_vectors(**values, strategy=strategy)
        (found,) = torch.autograd.grad(merged, values["lam"], grad)
        assert bool(torch.isfinite(merged[:5]).all() and torch.isfinite(merged[11:]).all()), name
        assert bool(torch.isfinite(found[::2]).all()), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_twice_and_inside_autocast(strategy: str) -> None:
    runs = []
    for fill, autocast in ((0.0, False), (1e30, False), (1e30, True)):
        values = arguments([600, 0, 5, 900], 3)
        freed = [torch.full((1505,), fill) for _ in range(4)]
        del freed
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            merged = pmkernels.merge_vectors(**values, strategy=strategy)
            (found,) = torch.autograd.grad(merged.sum(), values["lam"])
        assert merged.dtype == torch.float32
        runs.append((merged, found))
    for merged, found in runs[1:]:
        assert torch.equal(merged, runs[0][0])
        assert torch.equal(found, runs[0][1])


@needs_kernels
def test_unwritten_and_neighbouring_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, buffers = 64, []
    empty = torch.empty

    def guarded(*size: Any, **options: Any) -> Tensor:
        plain = empty(*size, **options)
        if not plain.is_floating_point():
            return plain
        buffer = torch.full((plain.numel() + 2 * guard,), 12345.0, dtype=plain.dtype)
        buffers.append(buffer)
        return buffer[guard : guard + plain.numel()].fill_(torch.nan).view(plain.shape)

    values = arguments([0, 511, 0, 513, 2, 0], 3)
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t, **o: guarded(t.shape, dtype=o.get("dtype", t.dtype)))
    merged = pmkernels.merge_vectors(**values, strategy="fused")
    (found,) = torch.autograd.grad(merged.sum(), values["lam"])
    monkeypatch.undo()
    assert bool(torch.isfinite(merged).all() and torch.isfinite(found).all())
    assert len(buffers) == 2
    for buffer in buffers:
        assert bool((buffer[:guard] == 12345).all() and (buffer[-guard:] == 12345).all())


@needs_kernels
def test_task_vectors_far_apart() -> None:
    """A stride over 2^31 elements and one that only its product with k takes there."""
    values = arguments([3, 2], 3, torch.float16)
    expected = pmkernels.merge_vectors(**values, strategy="fused")
    (theirs,) = torch.autograd.grad(expected.sum(), values["lam"])
    for stride in (2**31 + 16, 2**30 + 2**29):
        far = torch.empty(2 * stride + 5, dtype=torch.float16).as_strided((3, 5), (stride, 1))
        values["task_vectors"] = far.copy_(values["task_vectors"])
        merged = pmkernels.merge_vectors(**values, strategy="fused")
        assert torch.equal(merged, expected)
        assert torch.equal(torch.autograd.grad(merged.sum(), values["lam"])[0], theirs)


@pytest.mark.parametrize("lam_dtype", [torch.float32, torch.float64], ids=str)
def test_float64_is_eager(lam_dtype: torch.dtype) -> None:
    values = exactly(arguments([4, 0, 3], 2))
    values["lam"] = values["lam"].detach().to(lam_dtype).requires_grad_()
    merged, truth = pmkernels.merge_vectors(**values), reference.merge_vectors(**values)
    torch.testing.assert_close(merged, truth, rtol=1e-13, atol=1e-13)
    (ours,) = torch.autograd.grad(merged.sum(), values["lam"])
    (theirs,) = torch.autograd.grad(truth.sum(), values["lam"])
    assert ours.dtype == lam_dtype
    torch.testing.assert_close(ours, theirs)
    if KERNELS:
        with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16 .*got torch.float64"):
            pmkernels.merge_vectors(**values, strategy="fused")


def test_gradcheck() -> None:
    for sizes in ([4, 0, 3], [5], [0, 0, 2]):
        values = exactly(arguments(sizes, 2))
        lam = values.pop("lam")
        for function in (lambda t, v=values: pmkernels.merge_vectors(lam=t, **v, strategy="eager"),):
            assert torch.autograd.gradcheck(function, (lam,))
        assert torch.autograd.gradcheck(lambda t, v=values: reference.merge_vectors(lam=t, **v), (lam,))


@needs_kernels
def test_opcheck() -> None:
    ops = torch.ops.pmkernels

    for sizes, tasks in (([4, 0, 3], 2), ([5], 1), ([], 2), ([3], 0)):
        values = arguments(sizes, tasks)
        weight, task_vectors, lam, offsets = values.values()
        for strided in (False, True):
            if strided:
                weight, task_vectors = torch.stack([weight] * 2, dim=1)[:, 0], task_vectors.t().contiguous().t()
                lam = lam.detach().t().contiguous().t().requires_grad_()
            torch.library.opcheck(ops.merge_vectors, (weight, task_vectors, lam, offsets))
            for grad in (torch.randn(len(weight)), torch.ones(()).expand(len(weight)), torch.randn(len(weight)).half()):
                torch.library.opcheck(ops.merge_vectors_backward, (grad, task_vectors, offsets))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_without_a_graph_break(strategy: str) -> None:
    def model(**values: Tensor) -> Tensor:
        return pmkernels.merge_vectors(**values, strategy=strategy) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for sizes in ([4, 0, 3], [5, 5], [6, 1, 0, 2]):
        values = arguments(sizes, 2)
        ours, theirs = compiled(**values), model(**values)
        assert torch.equal(ours, theirs)
        (found,) = torch.autograd.grad(ours.sum(), values["lam"])
        (expected,) = torch.autograd.grad(theirs.sum(), values["lam"])
        assert torch.equal(found, expected)


GOOD = arguments([4, 2], 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weight", None, TypeError, "weight: expected a tensor, got NoneType"),
        ("weight", torch.zeros(6, dtype=torch.int32), TypeError, "weight: expected a floating-point tensor"),
        ("weight", torch.zeros(6).to_sparse(), TypeError, "weight: expected a dense tensor"),
        ("weight", torch.zeros(2, 3), ValueError, r"weight: expected shape \[S\], got \[2, 3\]"),
        ("weight", torch.zeros(()), ValueError, r"weight: expected shape \[S\], got \[\]"),
        ("weight", torch.zeros(6, requires_grad=True), ValueError, "weight: expected requires_grad=False"),
        ("task_vectors", [1.0], TypeError, "task_vectors: expected a tensor, got list"),
        ("task_vectors", torch.zeros(3, 6, dtype=torch.int64), TypeError, "task_vectors: expected a floating-point"),
        ("task_vectors", torch.zeros(3, 5), ValueError, r"task_vectors: expected shape \[K, 6\], got \[3, 5\]"),
        ("task_vectors", torch.zeros(6), ValueError, r"task_vectors: expected shape \[K, 6\], got \[6\]"),
        ("task_vectors", torch.zeros(3, 6, requires_grad=True), ValueError, "task_vectors: expected requires_grad=F"),
        ("task_vectors", torch.zeros(3, 6, device="meta"), ValueError, "task_vectors: expected device cpu.* got meta"),
        ("lam", 0.3, TypeError, "lam: expected a tensor, got float"),
        ("lam", torch.zeros(2, 3).half(), TypeError, "lam: expected float32"),
        ("lam", torch.zeros(3, 2), ValueError, r"lam: expected shape \[L, 3\], got \[3, 2\]"),
        ("lam", torch.zeros(3), ValueError, r"lam: expected shape \[L, 3\], got \[3\]"),
        ("lam", torch.zeros(2, 3, device="meta"), ValueError, "lam: expected device cpu, that of weight, got meta"),
        ("offsets", [0, 4, 6], TypeError, "offsets: expected a dense int64 tensor, got list"),
        ("offsets", torch.tensor([0, 4, 6], dtype=torch.int32), TypeError, "offsets: .*int64.* got torch.int32"),
        ("offsets", torch.tensor([0.0, 4, 6]), TypeError, "offsets: expected a dense int64 tensor, got torch.float32"),
        ("offsets", torch.tensor([0, 6]), ValueError, r"offsets: expected \[3\] on cpu, got \[2\] on cpu"),
        ("offsets", torch.tensor([[0, 4, 6]]), ValueError, r"offsets: expected \[3\] on cpu, got \[1, 3\] on cpu"),
        ("offsets", torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, r"offsets: .* got \[3\] on meta"),
    ],
)
def test_errors_name_the_argument(name: str, value: Any, error: type[Exception], message: str, strategy: str) -> None:
    with pytest.raises(error, match=message):
        pmkernels.merge_vectors(**{**GOOD, name: value}, strategy=strategy)


def test_strategies_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="strategy: expected one of auto, fused, streamed, eager, got 'quick'"):
        pmkernels.merge_vectors(**GOOD, strategy="quick")
    many = arguments([4], 33)
    check(many, "auto")
    if KERNELS:
        with pytest.raises(ValueError, match=r"task_vectors: expected K from 1 to 32 .*got K = 33"):
            pmkernels.merge_vectors(**many, strategy="fused")
        check(GOOD, "streamed")
    monkeypatch.setattr(launch, "INTERPRETING", False)
    with pytest.raises(ValueError, match=r"strategy: expected 'eager' or 'auto' .*got device cpu"):
        pmkernels.merge_vectors(**GOOD, strategy="fused")
    check(GOOD, "auto")
