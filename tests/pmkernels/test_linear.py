"""pareto_linear and merge_weight against the float64 definition: forward, every gradient, what is kept and refused."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from pmkernels import reference

K, N, D, R, R_C = 3, 7, 5, 2, 3
PARTS = ("lam", "A", "G", "B", "gamma", "A_c", "B_c")
LEARNED = (*PARTS, "bias")
CONSTANT = ("A_c", "B_c")
CASES = [
    ((4,), None),
    ((2, 3), None),
    ((), None),
    ((0,), None),
    ((4,), (4,)),
    ((2, 3), (2, 1)),
    ((2, 3), (1, 3)),
    ((2, 3), (2, 3)),
    ((2, 3), (1, 1)),
    ((2, 3, 2), (2, 1, 1)),
    ((2, 3, 2), (1, 3, 1)),
    ((0, 3), (1, 3)),
    ((0, 3), (0, 1)),
]


def arguments(
    lead: Sequence[int],
    gamma_lead: Sequence[int] | None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tasks: int = K,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    values = {
        "x": make(*lead, D).to(dtype),
        "weight": make(N, D).to(dtype),
        "task_vectors": make(tasks, N, D).to(dtype),
        "lam": make(tasks).to(wide),
        "A": make(N, R).to(wide),
        "G": make(R, R, tasks).to(wide),
        "B": make(D, R).to(wide),
        "gamma": torch.softmax(make(*(gamma_lead or ()), tasks), dim=-1).to(wide),
        "bias": make(N).to(dtype),
        "A_c": make(N, R_C).to(wide),
        "B_c": make(D, R_C).to(wide),
    }
    for name in ("x", *LEARNED):
        values[name].requires_grad_()
    return values


def gradients(y: Tensor, dy: Tensor, inputs: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, [inputs[name] for name in names], dy, allow_unused=True)
    return {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def call(function: object, values: dict[str, Tensor], without: Sequence[str] = ()) -> Tensor:
    return function(**{name: value for name, value in values.items() if name not in without})  # type: ignore[operator]


@pytest.mark.parametrize("without", [(), CONSTANT], ids=str)
@pytest.mark.parametrize(("lead", "gamma_lead"), CASES)
def test_forward_and_every_gradient_match_the_definition(
    lead: Sequence[int], gamma_lead: Sequence[int] | None, without: Sequence[str]
) -> None:
    values = {name: value for name, value in arguments(lead, gamma_lead).items() if name not in without}
    y, expected = call(pmkernels.pareto_linear, values), call(reference.pareto_linear, values)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    names = [name for name in ("x", *LEARNED) if name not in without]
    ours, theirs = gradients(y, dy, values, names), gradients(expected, dy, values, names)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize(("lead", "gamma_lead"), [((6,), None), ((2, 3), (2, 1))])
@pytest.mark.parametrize(
    "frozen",
    [
        *(("lam",), ("A",), ("G",), ("B",), ("gamma",), ("A_c",), ("B_c",), ("x", "lam"), ("A", "G", "B", "gamma")),
        *(("lam", "A_c"), ("lam", *CONSTANT), CONSTANT, ("A", "G", "gamma", "B_c"), ("B", "A_c")),
    ],
)
def test_frozen_arguments_do_not_change_the_other_gradients(
    lead: Sequence[int], gamma_lead: Sequence[int] | None, frozen: Sequence[str]
) -> None:
    values = arguments(lead, gamma_lead)
    names = [name for name in ("x", *LEARNED) if name not in frozen]
    expected = call(reference.pareto_linear, values)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = gradients(expected, dy, values, names)
    for name in frozen:
        values[name].requires_grad_(False)
    y = call(pmkernels.pareto_linear, values)
    ours = gradients(y, dy, values, names)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize(
    "without",
    [
        ("bias",),
        ("task_vectors", "lam"),
        ("A", "G", "B", "gamma"),
        ("task_vectors", "lam", "A", "G", "B", "gamma"),
        ("G", "gamma"),
        ("task_vectors", "lam", "G", "gamma", "bias"),
    ],
)
@pytest.mark.parametrize("also", [(), CONSTANT], ids=str)
def test_optional_arguments(without: Sequence[str], also: Sequence[str]) -> None:
    values = {name: value for name, value in arguments((4,), None).items() if name not in (*without, *also)}
    y, expected = call(pmkernels.pareto_linear, values), call(reference.pareto_linear, values)
    torch.testing.assert_close(y, expected)
    names = [name for name in ("x", *LEARNED) if name in values]
    ours, theirs = (gradients(each, torch.ones_like(y), values, names) for each in (y, expected))
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_gradcheck_of_the_definition_and_of_ours() -> None:
    for gamma_lead in (None, (2, 1)):
        values = arguments((2, 3), gamma_lead)
        names = list(values)
        for function in (reference.pareto_linear, pmkernels.pareto_linear):
            torch.autograd.gradcheck(
                lambda *tensors, f=function, names=names: f(**dict(zip(names, tensors, strict=True))),
                tuple(values.values()),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma_lead", [None, (2, 1)])
def test_low_precision_error_is_that_of_plain_pytorch(dtype: torch.dtype, gamma_lead: Sequence[int] | None) -> None:
    values = arguments((2, 3), gamma_lead, dtype)
    exact = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in values.items()}
    y, truth = call(pmkernels.pareto_linear, values), call(reference.pareto_linear, exact)
    assert y.dtype == dtype
    plain = F.linear(values["x"], reference.merge_weight(**_without_x(values, gamma_lead)), values["bias"])
    if gamma_lead is None:
        bound = 2 * (plain.double() - truth).abs().max()
    else:
        # W rounded once plus t·Aᵀ rounded once
        bound = 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= bound
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    names = ("x", *LEARNED)
    ours, theirs = gradients(y, dy, values, names), gradients(truth, dy.double(), exact, names)
    for name in names:
        error = (ours[name].double() - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error <= 32 * torch.finfo(dtype).eps, name
        assert ours[name].dtype == values[name].dtype, name


def _without_x(values: dict[str, Tensor], gamma_lead: object) -> dict[str, Tensor]:
    kept = {name: value.detach() for name, value in values.items() if name not in ("x", "bias")}
    if gamma_lead is not None:
        kept["gamma"] = kept["gamma"].reshape(-1, K)[0]
    return kept


@pytest.mark.parametrize("gamma_lead", [None, (2, 1)])
def test_strides_and_expanded_gradients(gamma_lead: Sequence[int] | None) -> None:
    values = arguments((2, 3), gamma_lead)
    contiguous = call(pmkernels.pareto_linear, values)
    strided = dict(values)
    strided["x"] = values["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["weight"] = values["weight"].t().contiguous().t()
    strided["task_vectors"] = values["task_vectors"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided["lam"] = values["lam"].repeat_interleave(2)[::2]
    strided["A_c"] = values["A_c"].t().contiguous().t()
    strided["B_c"] = values["B_c"].repeat_interleave(2, dim=1)[:, ::2]
    y = call(pmkernels.pareto_linear, strided)
    torch.testing.assert_close(y, contiguous)
    # y.sum().backward() sends a gradient of stride 0
    for name in ("x", *LEARNED):
        (ours,) = torch.autograd.grad(y.sum(), values[name], retain_graph=True)
        (theirs,) = torch.autograd.grad(contiguous, values[name], torch.ones_like(y), retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_same_bits_twice() -> None:
    for gamma_lead in (None, (2, 1)):
        runs = []
        for _ in range(2):
            values = arguments((2, 3), gamma_lead, torch.float32)
            y = call(pmkernels.pareto_linear, values)
            runs.append([y, *gradients(y, torch.ones_like(y), values, ("x", *LEARNED)).values()])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("gamma_lead", [None, (8, 1)])
def test_the_graph_keeps_the_input_and_the_parameters_and_no_merged_weight(gamma_lead: Sequence[int] | None) -> None:
    values = arguments((8, 3), gamma_lead)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        call(pmkernels.pareto_linear, values)
    assert set(saved) <= {value.data_ptr() for value in values.values()}


def test_nothing_is_kept_of_x_when_no_parameter_is_trained() -> None:
    values = arguments((8, 3), None)
    for name in LEARNED:
        values[name].requires_grad_(False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = call(pmkernels.pareto_linear, values)
    assert values["x"].data_ptr() not in saved
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), values["x"])[0],
        torch.autograd.grad(call(reference.pareto_linear, values).sum(), values["x"])[0],
    )


@pytest.mark.parametrize("gamma_lead", [None, (4, 1)])
def test_autocast_casts_x_only(gamma_lead: Sequence[int] | None) -> None:
    values = arguments((4, 3), gamma_lead, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(pmkernels.pareto_linear, values)
    assert y.dtype == torch.bfloat16
    found = gradients(y, torch.ones_like(y), values, ("x", *LEARNED))
    assert all(found[name].dtype == torch.float32 for name in found)
    # 0.3 + 5e-4 vanishes in bfloat16; here it must not
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = reference.merge_weight(values["weight"], task_vectors=values["task_vectors"], lam=values["lam"])
        moved = pmkernels.merge_weight(values["weight"], task_vectors=values["task_vectors"], lam=values["lam"] + 5e-4)
    assert merged.dtype == moved.dtype == torch.float32
    assert not torch.equal(merged, moved)


@pytest.mark.parametrize("gamma_lead", [None, (4,)])
def test_compiles_without_a_graph_break(gamma_lead: Sequence[int] | None) -> None:
    values = arguments((4,), gamma_lead)
    compiled = torch.compile(pmkernels.pareto_linear, fullgraph=True, backend="aot_eager")
    y, expected = call(compiled, values), call(reference.pareto_linear, values)
    torch.testing.assert_close(y, expected)
    ours = gradients(y, torch.ones_like(y), values, ("x", *LEARNED))
    theirs = gradients(expected, torch.ones_like(y), values, ("x", *LEARNED))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_one_task() -> None:
    values = arguments((4,), None, tasks=1)
    torch.testing.assert_close(call(pmkernels.pareto_linear, values), call(reference.pareto_linear, values))


@pytest.mark.parametrize("shape", [(), (6,), (6, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_weight_of_any_dimension(shape: Sequence[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    task_vectors = torch.randn(K, *shape, generator=generator).to(dtype)
    lam = torch.randn(K, generator=generator).requires_grad_()
    merged = pmkernels.merge_weight(weight, task_vectors=task_vectors, lam=lam)
    expected = reference.merge_weight(weight, task_vectors=task_vectors, lam=lam)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected)
    dw = torch.randn(shape, generator=generator).to(dtype)
    torch.testing.assert_close(torch.autograd.grad(merged, lam, dw)[0], torch.autograd.grad(expected, lam, dw)[0])


def test_merge_weight_with_a_low_rank_term_and_every_gradient() -> None:
    values = arguments((4,), None)
    parts = {name: value for name, value in values.items() if name not in ("x", "bias")}
    merged, expected = pmkernels.merge_weight(**parts), reference.merge_weight(**parts)
    torch.testing.assert_close(merged, expected)
    names = PARTS
    dw = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(merged, dw, parts, names), gradients(expected, dw, parts, names)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_a_cached_merge_has_the_gradient_of_a_new_one_and_costs_no_new_memory() -> None:
    values = arguments((4,), None)
    parts = {name: value for name, value in values.items() if name not in ("x", "bias")}
    with torch.no_grad():
        cached = pmkernels.merge_weight(**parts)
    again = pmkernels.merge_weight(**parts, cached=cached)
    assert again.data_ptr() == cached.data_ptr()
    fresh = pmkernels.merge_weight(**parts)
    for name in PARTS:
        torch.testing.assert_close(
            torch.autograd.grad(again.sum(), values[name], retain_graph=True)[0],
            torch.autograd.grad(fresh.sum(), values[name], retain_graph=True)[0],
        )


def test_merge_weight_out() -> None:
    values = {name: value.detach() for name, value in arguments((4,), None).items() if name not in ("x", "bias")}
    out = torch.full((N, D), torch.nan, dtype=torch.float64)
    assert pmkernels.merge_weight(**values, out=out) is out
    torch.testing.assert_close(out, reference.merge_weight(**values))
    with pytest.raises(ValueError, match="out: expected None where a gradient is wanted"):
        pmkernels.merge_weight(**{**values, "lam": values["lam"].requires_grad_()}, out=out)


def test_merge_weight_out_needs_memory_of_its_own() -> None:
    with pytest.raises(ValueError, match="out: expected memory of its own for every element"):
        pmkernels.merge_weight(torch.ones(6, 5), out=torch.empty(1, 5).expand(6, 5))
    with pytest.raises(ValueError, match=r"gamma: expected shape \[K\], one preference, got \[\]"):
        pmkernels.merge_weight(torch.ones(6, 5), gamma=torch.tensor(1.0), cached=torch.ones(6, 5))


def test_merge_weight_of_nothing_is_a_copy() -> None:
    weight = torch.ones(2, 2)
    merged = pmkernels.merge_weight(weight)
    merged.zero_()
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 6, dtype=torch.float64)}, ValueError, r"x: expected shape \[\*, 5\], got \[4, 6\]"),
        ({"x": torch.zeros(4, 5)}, TypeError, "x: expected torch.float64, the dtype of weight, got torch.float32"),
        ({"x": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "x: expected a floating-point tensor"),
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"weight": torch.zeros(7, 5, 2, dtype=torch.float64)}, ValueError, "task_vectors: expected shape"),
        (
            {"weight": torch.zeros(7, 5, dtype=torch.float64).requires_grad_()},
            ValueError,
            "weight: expected requires_grad",
        ),
        (
            {"task_vectors": torch.zeros(3, 7, 4, dtype=torch.float64)},
            ValueError,
            r"task_vectors: expected shape \[K, 7, 5\]",
        ),
        (
            {"task_vectors": torch.zeros(3, 7, 5).double().requires_grad_()},
            ValueError,
            "task_vectors: expected requires_grad",
        ),
        ({"lam": torch.zeros(2)}, ValueError, r"lam: expected shape \[3\].*got \[2\]"),
        ({"lam": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, "lam: expected float32"),
        ({"lam": None}, ValueError, "lam: expected together with task_vectors"),
        ({"A": torch.zeros(6, 2)}, ValueError, r"A: expected shape \[7, R\], got \[6, 2\]"),
        ({"G": torch.zeros(2, 2, 4)}, ValueError, r"G: expected shape \[2, 2, 3\], got \[2, 2, 4\]"),
        ({"B": torch.zeros(5, 3)}, ValueError, r"B: expected shape \[5, 2\], got \[5, 3\]"),
        ({"B": None}, ValueError, "B: expected together with A, G, gamma"),
        ({"A_c": torch.zeros(6, 2)}, ValueError, r"A_c: expected shape \[7, R\], got \[6, 2\]"),
        ({"A_c": torch.zeros(7, 0)}, ValueError, r"A_c: expected shape \[7, R\], got \[7, 0\]"),
        ({"A_c": torch.zeros(7, 3).half()}, TypeError, "A_c: expected float32"),
        ({"A_c": None}, ValueError, "A_c: expected together with B_c, got None"),
        ({"B_c": None}, ValueError, "B_c: expected together with A_c, got None"),
        ({"B_c": torch.zeros(5, 2)}, ValueError, r"B_c: expected shape \[5, 3\], got \[5, 2\]"),
        ({"B_c": torch.zeros(5, 3, device="meta")}, ValueError, "B_c: expected device cpu"),
        ({"B_c": [[0.0]]}, TypeError, "B_c: expected a tensor, got list"),
        ({"gamma": torch.zeros(4)}, ValueError, r"gamma: expected shape \[3\] or \[\*, 3\], got \[4\]"),
        ({"gamma": torch.zeros(2, 3)}, ValueError, r"gamma: expected .* broadcastable to \(4,\), got \[2, 3\]"),
        ({"gamma": torch.zeros(4, 1, 3)}, ValueError, "gamma: expected .* with 2 dimensions"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \[7\], got \[6\]"),
        ({"strategy": "fastest"}, ValueError, "strategy: expected one of auto, fused, streamed, eager, got 'fastest'"),
        ({"lam": torch.zeros(3, device="meta")}, ValueError, "lam: expected device cpu"),
        ({"x": torch.zeros(4, 5, dtype=torch.float64).to_sparse()}, TypeError, "x: expected a dense tensor"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], error: type[Exception], message: str) -> None:
    values: dict[str, object] = {**arguments((4,), None), **change}
    with pytest.raises(error, match=message):
        pmkernels.pareto_linear(**values)  # type: ignore[arg-type]


def test_a_constant_term_needs_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions for a low-rank term, got \[2, 3, 4\]"):
        pmkernels.merge_weight(torch.zeros(2, 3, 4), A_c=torch.zeros(2, 1), B_c=torch.zeros(3, 1))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("wide", ["A", "B", "A_c", "B_c"])
def test_one_factor_in_float64(wide: str, per_row: bool) -> None:
    """Factors may each be float32 or float64, whatever the others are."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (8, 2), "G": (2, 2, 2), "B": (8, 2), "A_c": (8, 3), "B_c": (8, 3)}
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    parts[wide] = parts[wide].double()
    gamma = torch.tensor([[0.3, 0.7]] * 3 if per_row else [0.3, 0.7])
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(8, 8, generator=generator)
    for value in parts.values():
        value.requires_grad_()
    pmkernels.pareto_linear(x, weight, **parts, gamma=gamma, strategy="eager").sum().backward()
    doubled = {name: value.detach().double().requires_grad_() for name, value in parts.items()}
    truth = pmkernels.reference.pareto_linear(x.double(), weight.double(), **doubled, gamma=gamma.double())
    truth.sum().backward()
    for name, value in parts.items():
        assert value.grad.dtype == value.dtype
        torch.testing.assert_close(value.grad.double(), doubled[name].grad, rtol=1e-4, atol=1e-4)


def test_rows_of_float64_and_factors_of_float32_are_summed_as_the_reference_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (8, 2), "G": (2, 2, 2), "B": (8, 2)}
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x, weight = (torch.randn(shape, generator=generator).double() for shape in ((3, 8), (8, 8)))
    gamma = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]])
    y = pmkernels.pareto_linear(x, weight, **parts, gamma=gamma, strategy="eager")
    assert torch.equal(y, pmkernels.reference.pareto_linear(x, weight, **parts, gamma=gamma))


def test_a_lambda_in_float64_has_a_gradient_in_float64_in_a_float32_layer() -> None:
    values = arguments((5,), None, torch.float32)
    x, weight, task_vectors = (values[name].detach() for name in ("x", "weight", "task_vectors"))
    lam = values["lam"].detach().double().requires_grad_()
    dy, dW = torch.randn(5, N), torch.randn(N, D)
    y = pmkernels.pareto_linear(x, weight, task_vectors=task_vectors, lam=lam)
    merged = pmkernels.merge_weight(weight, task_vectors=task_vectors, lam=lam)
    for output, upstream, exact in ((y, dy, dy.double().t() @ x.double()), (merged, dW, dW.double())):
        (found,) = torch.autograd.grad(output, lam, upstream)
        truth = torch.einsum("nd,knd->k", exact, task_vectors.double())
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
