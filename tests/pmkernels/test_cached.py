"""pareto_linear with W(γ) from an earlier call: the result and every gradient are what they are without it."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from kernel_cases import CONSTANT, LOW_RANK, check_linear, exactly, gradients, linear_arguments
from torch import Tensor

import pmkernels
from pmkernels import dispatch, linear, reference
from pmkernels.configs import Configs

KERNELS = dispatch.runs_kernels(torch.device("cpu"))
STRATEGIES = ("eager", "fused", "streamed", "auto") if KERNELS else ("eager",)
PREFERENCES = {"shared": (), "per item": (3, 1), "per row": (3, 5), "one for all": (1, 1)}


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each strategy; ``auto`` as on a GPU, where the operators choose."""
    if request.param == "auto":
        with dispatch.using(Configs(runs=True)):
            yield request.param
    else:
        yield request.param


def merged(values: dict[str, Tensor], strategy: str, dtype: torch.dtype | None = None) -> Tensor:
    """What ``cached`` should be: W(γ), or with one γ per row W without its preference's term, in the compute dtype."""
    parts = {name: v.detach() for name, v in values.items() if name not in ("x", "bias")}
    if "gamma" in parts and parts["gamma"].ndim > 1:
        parts = {name: v for name, v in parts.items() if name not in LOW_RANK}
    dtype = parts["weight"].dtype if dtype is None else dtype
    return pmkernels.merge_weight(**parts, strategy="eager" if strategy == "eager" else "fused").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gamma_lead", PREFERENCES.values(), ids=PREFERENCES)
def test_result_and_every_gradient(gamma_lead: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    values = linear_arguments((3, 5), 20, 33, gamma_lead=gamma_lead, dtype=dtype)
    cached = merged(values, strategy)
    check_linear(values, strategy=strategy, cached=cached)
    check_linear(values, torch.ones((), dtype=dtype).expand(3, 5, 20), strategy=strategy, cached=cached)
    values["lam"].requires_grad_(False)
    check_linear(values, strategy=strategy, cached=cached)


@pytest.mark.parametrize("gamma_lead", [(), (3, 1)])
def test_a_constant_term_is_in_it(gamma_lead: tuple[int, ...], strategy: str) -> None:
    for without in ((), () if gamma_lead else LOW_RANK):
        values = linear_arguments((3, 5), 20, 33, gamma_lead=gamma_lead, constant=3, without=without)
        cached = merged(values, strategy)
        check_linear(values, strategy=strategy, cached=cached)
        values["lam"].requires_grad_(False)
        check_linear(values, strategy=strategy, cached=cached)


@pytest.mark.parametrize("without", [("bias",), ("task_vectors", "lam"), LOW_RANK, ("bias", *LOW_RANK)], ids=str)
def test_optional_arguments(without: Sequence[str], strategy: str) -> None:
    for gamma_lead in ((),) if "gamma" in without else ((), (2, 1)):
        values = linear_arguments((2, 3), 20, 18, gamma_lead=gamma_lead, without=without)
        check_linear(values, strategy=strategy, cached=merged(values, strategy))


def test_no_rows_outputs_or_inputs(strategy: str) -> None:
    for lead, n, d in (((0,), 5, 4), ((3, 0), 5, 4), ((2,), 0, 4), ((2,), 5, 0), ((), 5, 4), ((1,), 1, 1)):
        for gamma_lead in ((), lead):
            values = linear_arguments(lead, n, d, gamma_lead=gamma_lead)
            check_linear(values, strategy=strategy, cached=merged(values, strategy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_task_vectors(dtype: torch.dtype, strategy: str) -> None:
    """K = 0, with and without a cached weight."""
    for gamma_lead in ((), (2,)):
        values = linear_arguments((2,), 5, 4, tasks=0, gamma_lead=gamma_lead, dtype=dtype)
        for cached in (None, merged(values, strategy)):
            check_linear(values, strategy=strategy, cached=cached)


def test_which_gradients_are_wanted_does_not_matter(strategy: str) -> None:
    """Each of the arguments alone, beside λ, and none; the others are frozen."""
    names = ("x", *linear.LEARNED)
    beside = (*((name,) for name in ("A", "B", "gamma", "bias", *CONSTANT)), ("B", "A_c"), ("gamma", "B_c"))
    for wanted in (*((name,) for name in names), *(("lam", *others) for others in beside), ()):
        for gamma_lead in ((), (2, 1)):
            constant = 2 if set(CONSTANT) & set(wanted) else 0
            values = linear_arguments((2, 3), 6, 5, gamma_lead=gamma_lead, constant=constant)
            for name, value in values.items():
                value.requires_grad_(name in wanted)
            check_linear(values, strategy=strategy, cached=merged(values, strategy))


@pytest.mark.parametrize("gamma_lead", [(), (3, 1)])
def test_the_weight_given_is_the_one_used(gamma_lead: tuple[int, ...], strategy: str) -> None:
    """y and dx come from ``cached`` and nothing is put together: another value is taken at its word."""
    values = linear_arguments((3, 5), 20, 18, gamma_lead=gamma_lead, without=("bias",))
    cached = merged(values, strategy)
    ones = torch.ones(3, 5, 20)
    found = []
    for weight in (cached, 2 * cached, torch.zeros_like(cached)):
        y = pmkernels.pareto_linear(**values, cached=weight, strategy=strategy)
        found.append({"y": y, **gradients(y, ones, values)})
    for name in ("y", "x"):
        once, twice, without = (result[name] for result in found)
        torch.testing.assert_close(twice - without, 2 * (once - without), msg=name)
        assert not torch.equal(once, twice), name
    for name in ("lam", "A", "G", "B", "gamma"):
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


@pytest.mark.parametrize("same", ["eager", "streamed"] if KERNELS else ["eager"])
@pytest.mark.parametrize("gamma_lead", [(), (3, 1)])
def test_the_same_bits_as_without_where_the_product_is_the_same(gamma_lead: tuple[int, ...], same: str) -> None:
    for dtype, constant in itertools.product((torch.float32, torch.bfloat16), (0, 3)):
        values = linear_arguments((3, 5), 20, 18, gamma_lead=gamma_lead, dtype=dtype, constant=constant)
        results = []
        for cached in (None, merged(values, same), merged(values, same)):
            y = pmkernels.pareto_linear(**values, cached=cached, strategy=same)
            results.append({"y": y, **gradients(y, torch.ones_like(y), values)})
        for name, first in results[0].items():
            assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_any_layout_and_a_weight_that_is_shared(strategy: str) -> None:
    values = linear_arguments((2, 3), 20, 18)
    cached = merged(values, strategy)
    wide = torch.full((20, 37), torch.nan)
    wide[:, 1::2] = cached
    for layout in (cached.t().contiguous().t(), wide[:, 1::2]):
        check_linear(values, strategy=strategy, cached=layout)
    # nothing to add: W(γ) is W0 itself
    plain = {name: values[name] for name in ("x", "weight", "bias")}
    check_linear(plain, strategy=strategy, cached=values["weight"])
    assert torch.equal(cached, merged(values, strategy))


def test_an_output_used_twice_and_a_graph_kept(strategy: str) -> None:
    values = linear_arguments((2, 3), 20, 18)
    y = pmkernels.pareto_linear(**values, cached=merged(values, strategy), strategy=strategy)
    exact = exactly(values)
    truth = reference.pareto_linear(**exact)
    for _ in range(2):
        learned = [v for v in values.values() if v.requires_grad]
        found = torch.autograd.grad((y * y).sum() + y.sum(), learned, retain_graph=True)
        theirs = torch.autograd.grad(
            (truth * truth).sum() + truth.sum(), [v for v in exact.values() if v.requires_grad], retain_graph=True
        )
        for ours, expected in zip(found, theirs, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_cached_weight_changed_before_the_backward_is_an_error(strategy: str) -> None:
    values = linear_arguments((2, 3), 20, 18)
    cached = merged(values, strategy)
    y = pmkernels.pareto_linear(**values, cached=cached, strategy=strategy)
    cached.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("gamma_lead", [(), (3, 1)])
def test_autocast_wants_the_compute_dtype(gamma_lead: tuple[int, ...], strategy: str) -> None:
    values = linear_arguments((3, 5), 20, 18, gamma_lead=gamma_lead)
    cached = merged(values, strategy, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pmkernels.pareto_linear(**values, cached=cached, strategy=strategy)
        without = pmkernels.pareto_linear(**values, strategy="eager" if strategy == "eager" else "streamed")
        with pytest.raises(ValueError, match=r"cached: expected \[20, 18\] in torch.bfloat16, got .* torch.float32"):
            pmkernels.pareto_linear(**values, cached=cached.float(), strategy=strategy)
    assert y.dtype == torch.bfloat16
    # the interpreter cuts a bfloat16 off where the GPU and PyTorch round
    torch.testing.assert_close(y, without, rtol=0, atol=4 * 2**-8 * float(without.detach().abs().max()))
    found, expected = (gradients(result, torch.ones_like(y), values) for result in (y, without))
    for name in expected:
        assert found[name].dtype == torch.float32, name
        # the fused kernel forms dW in float32, the library in bfloat16
        size = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=8 * 2**-8 * size, msg=name)


def test_float64_is_eager_and_exact() -> None:
    for gamma_lead in ((), (3, 1)):
        values = exactly(linear_arguments((3, 2), 5, 4, gamma_lead=gamma_lead))
        cached = merged(values, "eager")
        assert cached.dtype == torch.float64
        y, truth = pmkernels.pareto_linear(**values, cached=cached), reference.pareto_linear(**values)
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
        found, theirs = (gradients(result, torch.ones_like(y), values) for result in (y, truth))
        for name in theirs:
            torch.testing.assert_close(found[name], theirs[name], rtol=1e-11, atol=1e-11, msg=name)
        for strategy in STRATEGIES[1:3]:
            with pytest.raises(TypeError, match=r"x: expected float32, bfloat16 or float16 .*got torch.float64"):
                pmkernels.pareto_linear(**values, cached=cached, strategy=strategy)
    values = linear_arguments((2,), 5, 4)
    for name in ("lam", "A", "bias") if KERNELS else ():
        mixed = {**values, name: values[name].detach().double()}
        with pytest.raises(TypeError, match=rf"{name}: expected float32, bfloat16 or float16 .*got torch.float64"):
            pmkernels.pareto_linear(**mixed, strategy="fused")


@pytest.mark.parametrize(
    ("cached", "error", "message"),
    [
        ([[1.0]], TypeError, "cached: expected a tensor, got list"),
        (torch.zeros(5, 4, dtype=torch.int64), TypeError, "cached: expected a floating-point tensor, got torch.int64"),
        (torch.zeros(4, 5), ValueError, r"cached: expected \[5, 4\] in torch.float32, got \[4, 5\] in torch.float32"),
        (torch.zeros(5), ValueError, r"cached: expected \[5, 4\] in torch.float32, got \[5\]"),
        (torch.zeros(5, 4).half(), ValueError, r"cached: expected .* in torch.float32, got .* in torch.float16"),
        (torch.zeros(5, 4).double(), ValueError, r"cached: expected .* in torch.float32, got .* in torch.float64"),
        (torch.zeros(5, 4, requires_grad=True), ValueError, "cached: expected requires_grad=False"),
        (torch.zeros(5, 4).to_sparse(), TypeError, "cached: expected a dense tensor, got torch.sparse_coo"),
        (torch.zeros(5, 4, device="meta"), ValueError, "cached: expected device cpu, that of weight, got meta"),
    ],
)
def test_errors_name_the_argument(cached: Tensor, error: type[Exception], message: str, strategy: str) -> None:
    with pytest.raises(error, match=message):
        pmkernels.pareto_linear(**linear_arguments((2,), 5, 4), cached=cached, strategy=strategy)


def test_compiles_without_a_graph_break(strategy: str) -> None:
    values = linear_arguments((4,), 6, 5, gamma_lead=(4,) if strategy == "streamed" else ())
    cached = merged(values, strategy)

    def model(**arguments: Tensor) -> Tensor:
        return pmkernels.pareto_linear(**arguments, strategy=strategy)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(**values, cached=cached), model(**values, cached=cached)
    torch.testing.assert_close(ours, theirs)
    found, expected = (gradients(y, torch.ones_like(y), values) for y in (ours, theirs))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.skipif(not KERNELS, reason="the operators run on the GPU here")
@pytest.mark.parametrize("gamma_lead", [(), (2, 1)])
def test_opcheck(gamma_lead: tuple[int, ...]) -> None:
    ops = torch.ops.pmkernels

    values = linear_arguments((2, 3), 6, 5, gamma_lead=gamma_lead, constant=2)
    cached = merged(values, "fused")
    columns = values["x"].detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    for x, strategy in ((values["x"], "fused"), (columns, "auto")):
        arguments = {**values, "x": x, "cached": cached}
        torch.library.opcheck(ops.pareto_linear, (*(arguments.get(key) for key in linear.INPUTS), strategy))
        frozen = [None if v is None else v.detach() for v in (arguments.get(key) for key in linear.INPUTS)]
        torch.library.opcheck(
            ops.pareto_linear_backward,
            (torch.randn(2, 3, 6), *frozen, [name in values for name in ("x", *linear.LEARNED)], strategy),
        )
