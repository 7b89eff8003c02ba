"""preference_linear against float64: every strategy, rows, ranks, strides, groups, vmap over γ, and its errors."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import check_served as check
from kernel_cases import exactly, folded, note_parts, served
from torch import Tensor

import pmkernels
from pmkernels import dispatch, reference, strategies

KERNELS = dispatch.runs_kernels(torch.device("cpu"))
STRATEGIES = ("eager", "fused", "streamed") if KERNELS else ("eager",)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="kernels run on the GPU here, see tests/gpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("lead", "gamma_lead"),
    [
        ((5,), ()),
        ((5,), (5,)),
        ((1,), (1,)),
        ((3, 7), (3, 1)),
        ((3, 7), (1, 7)),
        ((3, 7), (3, 7)),
        ((3, 7), (1, 1)),
        ((3, 67), ()),
        ((2, 3, 4), (2, 1, 1)),
        ((2, 3, 4), (2, 3, 1)),
        ((0,), ()),
        ((0, 7), (0, 1)),
        ((3, 0), (3, 1)),
        ((), ()),
    ],
    ids=str,
)
def test_rows_and_groups(lead: tuple[int, ...], gamma_lead: tuple[int, ...], strategy: str) -> None:
    check(folded(lead, 37, 29, tasks=3, rank=5, gamma_lead=gamma_lead), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("n", "d"), list(itertools.product((1, 63, 65), (1, 31, 64, 130))), ids=str)
def test_sizes(n: int, d: int, strategy: str) -> None:
    check(folded((2, 35), n, d, tasks=2, rank=3, gamma_lead=(2, 1)), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("tasks", "rank"), [(1, 1), (2, 16), (8, 17), (32, 4), (5, 33), (3, 64)], ids=str)
def test_tasks_and_ranks(tasks: int, rank: int, strategy: str) -> None:
    check(folded((3, 6), 40, 48, tasks=tasks, rank=rank, gamma_lead=(3, 1)), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype, strategy: str) -> None:
    check(folded((3, 33), 80, 96, tasks=4, rank=16, gamma_lead=(3, 1), dtype=dtype), strategy=strategy)


def test_float64_is_eager_and_exact() -> None:
    values = exactly(folded((3, 6), 20, 24, rank=4, gamma_lead=(3, 1)))
    torch.testing.assert_close(served(values), reference.pareto_linear(**values), rtol=1e-12, atol=1e-12)
    many = folded((3, 6), 20, 24, tasks=40, rank=70, gamma_lead=(3, 1))
    check(many)
    # a preference may be float64 beside float32
    wide = served({**many, "gamma": many["gamma"].double()})
    torch.testing.assert_close(wide, served(many))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strides(strategy: str) -> None:
    values = folded((4, 6), 40, 48, tasks=3, rank=4, gamma_lead=(4, 1))
    truth = served(values, strategy=strategy)
    x = values["x"]
    layouts = {
        "sequence first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2],
        "padded": torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
        "off a boundary": torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
    }
    for name, laid_out in layouts.items():
        found = served({**values, "x": laid_out}, strategy=strategy)
        torch.testing.assert_close(found, truth, msg=lambda text, name=name: f"{name}: {text}")
    one = values["x"][:1, :1].expand(4, 6, -1)
    check({**values, "x": one}, strategy=strategy)
    # B as it comes from a Pareto model, and γ that is a view
    wide = pmkernels.widen_weight(values["weight"], values["A"])
    gamma = torch.stack([values["gamma"], torch.full_like(values["gamma"], torch.nan)])[0]
    found = pmkernels.preference_linear(
        x, wide, values["G"].permute(2, 0, 1).contiguous().permute(1, 2, 0), values["B"], gamma, values["bias"]
    )
    torch.testing.assert_close(found, truth)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_parts_of_d(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    parts = note_parts(monkeypatch)
    values = folded((2, 17), 40, 333, tasks=3, rank=5, gamma_lead=(2, 1), dtype=dtype)
    for parts.force in (1, 2, 3, 5, 16):
        check(values, strategy="fused")
    assert {1, 2, 3} <= set(parts.of_d)
    assert max(parts.of_d) > 4


@needs_kernels
@pytest.mark.parametrize("strategy", ["fused", "streamed"])
def test_memory_that_nobody_wrote_is_not_read(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(torch.nan)

    values = folded((3, 35), 70, 90, tasks=3, rank=5, gamma_lead=(3, 1))
    expected = served(values, strategy=strategy)
    monkeypatch.setattr(torch, "empty", poisoned)
    found = served(values, strategy=strategy)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_sees_its_own_preference_and_nothing_else(strategy: str) -> None:
    values = folded((4, 33), 40, 48, tasks=3, rank=4, gamma_lead=(4, 1))
    found = served(values, strategy=strategy)
    spoilt = {**values, "x": values["x"].clone(), "gamma": values["gamma"].clone()}
    spoilt["x"][2] = torch.nan
    spoilt["gamma"][2] = torch.nan
    others = served(spoilt, strategy=strategy)
    for item in (0, 1, 3):
        assert torch.equal(others[item], found[item])
    assert not torch.isfinite(others[2]).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nearby_preferences_stay_apart_in_bfloat16(strategy: str) -> None:
    # W alone is so large that W(γ) rounded to bfloat16 would be the same for both
    values = folded((2, 8), 48, 64, tasks=2, rank=4, gamma_lead=(2, 1), dtype=torch.bfloat16)
    values["weight"] = torch.full_like(values["weight"], 64.0)
    values["x"] = values["x"][:1].sub(values["x"][:1].float().mean(dim=-1, keepdim=True).bfloat16()).expand(2, -1, -1)
    values["x"] = torch.cat([values["x"][..., :32], -values["x"][..., :32]], dim=-1)
    values["gamma"] = torch.tensor([[[0.5, 0.5]], [[0.4, 0.6]]])
    values["bias"] = torch.zeros_like(values["bias"])
    merged = [
        reference.merge_weight(
            values["weight"], A=values["A"] * 0.05, G=values["G"], B=values["B"] * 0.05, gamma=gamma[0]
        )
        for gamma in values["gamma"]
    ]
    small = {**values, "A": values["A"] * 0.05, "B": values["B"] * 0.05}
    found = served(small, strategy=strategy).float()
    assert torch.equal(merged[0], merged[1])
    truth = reference.pareto_linear(**exactly(small))
    assert float((found[0] - found[1]).abs().max()) > 0
    torch.testing.assert_close(found[0] - found[1], (truth[0] - truth[1]).float(), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vmap_over_preferences(strategy: str) -> None:
    values = folded((3, 7), 40, 48, tasks=3, rank=4)
    gammas = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(3)), dim=-1)
    own = torch.randn(5, 3, 7, 48, generator=torch.Generator().manual_seed(4))

    def at(gamma: Tensor, x: Tensor = values["x"]) -> Tensor:
        return served({**values, "gamma": gamma, "x": x}, strategy=strategy)

    expected = torch.stack([at(gamma) for gamma in gammas])
    torch.testing.assert_close(torch.vmap(at)(gammas), expected)
    of_own = torch.stack([at(gamma, x) for gamma, x in zip(gammas, own, strict=True)])
    torch.testing.assert_close(torch.vmap(at)(gammas, own), of_own)
    torch.testing.assert_close(torch.vmap(at, in_dims=(0, 1))(gammas, own.transpose(0, 1).contiguous()), of_own)
    one = gammas[0]
    of_x = torch.stack([at(one, x) for x in own])
    torch.testing.assert_close(torch.vmap(lambda x: at(one, x))(own), of_x)
    per_item = gammas[:3, None, :]
    torch.testing.assert_close(torch.vmap(lambda x: at(per_item, x))(own), torch.stack([at(per_item, x) for x in own]))
    each = torch.stack([per_item, per_item.flip(0)])
    torch.testing.assert_close(torch.vmap(at)(each), torch.stack([at(gamma) for gamma in each]))


def test_vmap_multiplies_what_is_shared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = folded((3, 7), 40, 48, tasks=3, rank=4)
    gammas = torch.softmax(torch.randn(5, 3), dim=-1)
    rows = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: (rows.append(x.numel() // 48), linear(x, *rest))[1]
    )
    torch.vmap(lambda gamma: served({**values, "gamma": gamma}))(gammas)
    assert rows == [3 * 7]
    with pytest.raises(ValueError, match=r"vmap over x and gamma alone"):
        torch.vmap(lambda G: served({**values, "G": G}))(torch.randn(2, 4, 4, 3))


def test_compiles_and_passes_opcheck() -> None:
    values = folded((3, 7), 40, 48, tasks=3, rank=4, gamma_lead=(3, 1))
    wide = pmkernels.widen_weight(values["weight"], values["A"])
    arguments = (values["x"], wide, values["G"], values["B"], values["gamma"], values["bias"])
    torch.library.opcheck(torch.ops.pmkernels.preference_linear.default, (*arguments, "eager"))
    compiled = torch.compile(pmkernels.preference_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), pmkernels.preference_linear(*arguments))


def test_widened() -> None:
    weight, A = torch.randn(5, 7), torch.randn(5, 3, requires_grad=True)
    wide = pmkernels.widen_weight(weight, A)
    assert wide.shape == (5, 7 + 16) and not wide.requires_grad
    assert torch.equal(wide[:, :7], weight)
    assert torch.equal(wide[:, 7:10], A)
    assert not wide[:, 10:].any()
    assert pmkernels.widen_weight(weight.bfloat16(), torch.randn(5, 17)).shape == (5, 7 + 32)
    for bad, message in (
        ((torch.randn(5), A), r"weight: expected shape \[out, in\], got \[5\]"),
        ((weight, torch.randn(4, 3)), r"A: expected shape \[5, R\], got \[4, 3\]"),
        ((weight, torch.randn(5, 0)), r"A: expected shape \[5, R\], got \[5, 0\]"),
        ((weight, torch.randn(())), r"A: expected shape \[5, R\], got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pmkernels.widen_weight(*bad)
    with pytest.raises(TypeError, match=r"weight: expected a tensor, got list"):
        pmkernels.widen_weight([[1.0]], A)  # type: ignore[arg-type]


def test_errors() -> None:
    values = folded((3, 7), 40, 48, tasks=3, rank=4, gamma_lead=(3, 1))
    good = {
        "x": values["x"],
        "wide": pmkernels.widen_weight(values["weight"], values["A"]),
        "G": values["G"],
        "B": values["B"],
        "gamma": values["gamma"],
        "bias": values["bias"],
    }
    pmkernels.preference_linear(**good)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": values["x"].double()}, TypeError, r"x: expected torch.float32, the dtype of wide, got torch.float64"),
        ({"B": values["B"].half()}, TypeError, r"B: expected torch.float32, the dtype of wide"),
        ({"bias": values["bias"].half()}, TypeError, r"bias: expected torch.float32"),
        ({"G": values["G"].half()}, TypeError, r"G: expected float32"),
        ({"gamma": values["gamma"].half()}, TypeError, r"gamma: expected float32"),
        ({"wide": values["weight"]}, ValueError, r"wide: expected shape \[out, 64\], as widen_weight returns"),
        ({"wide": good["wide"].t().contiguous().t()}, ValueError, r"wide: expected neighbouring columns"),
        ({"wide": None}, TypeError, r"wide: expected a tensor, got NoneType"),
        ({"x": values["x"][..., :-1]}, ValueError, r"x: expected shape \[\*, 48\], got \[3, 7, 47\]"),
        ({"x": torch.randn(())}, ValueError, r"x: expected shape \[\*, 48\], got \[\]"),
        ({"B": values["B"][0]}, ValueError, r"B: expected shape \[in, R\], got \[4\]"),
        ({"G": values["G"][:3]}, ValueError, r"G: expected shape \[4, 4, K\], got \[3, 4, 3\]"),
        ({"gamma": values["gamma"][:2]}, ValueError, r"gamma: expected shape \[3\] or \[\*, 3\] with 3 dimensions"),
        ({"gamma": values["gamma"][..., :2]}, ValueError, r"gamma: expected shape \[3\]"),
        ({"gamma": values["gamma"][:, 0]}, ValueError, r"broadcastable to \(3, 7\), got \[3, 3\]"),
        ({"gamma": torch.tensor(1.0)}, ValueError, r"gamma: expected shape \[3\]"),
        ({"bias": values["bias"][:-1]}, ValueError, r"bias: expected shape \[40\], got \[39\]"),
        ({"strategy": "quick"}, ValueError, r"strategy: expected one of auto, fused"),
        ({"x": values["x"].clone().requires_grad_()}, ValueError, r"x: expected no gradient to be wanted"),
        ({"gamma": values["gamma"].to("meta")}, ValueError, r"gamma: expected device cpu"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            pmkernels.preference_linear(**{**good, **change})
    with torch.no_grad():
        pmkernels.preference_linear(**{**good, "x": values["x"].clone().requires_grad_()})
    if KERNELS:
        with pytest.raises(TypeError, match=r"float64: strategy 'eager'"):
            served(exactly(values), strategy="fused")


def test_the_choice_follows_the_rows() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)

    def chosen(rows: int, n: int = 3072, d: int = 1024) -> str:
        return strategies.choose("preference", "auto", like, rows=rows, n=n, d=d, rank=16, tasks=0)

    assert chosen(8) == chosen(50) == "fused"
    assert chosen(8224) == "streamed"
    assert strategies.choose("preference", "fused", like, rows=8224, n=8, d=8, rank=4, tasks=0) == "fused"
