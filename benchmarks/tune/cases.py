"""One launch of one kernel: its arguments, the launch, the truth, and what is wrong."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from benchmarks.common.errors import LINE_TOLERANCE, TOLERANCE, Errors
from benchmarks.common.layer_case import Source
from benchmarks.common.modes import precision
from pmkernels import launch
from pmkernels.kernels import linear as linear_kernels
from pmkernels.kernels import low_rank as low_rank_kernels
from pmkernels.kernels import merge as merge_kernels
from pmkernels.kernels import preference as preference_kernels
from pmkernels.kernels import weight_grad as weight_grad_kernels
from pmkernels.low_rank import Terms
from pmkernels.reference import preference_core


@dataclass(frozen=True)
class Case:
    """One launch of one kernel. ``call`` is a configuration's op, except ``forward`` and ``dx``, which are both linear.

    ``groups``: preferences of shrink. ``aligned`` = False starts every tensor of the model off a 16-byte boundary.
    """

    call: str
    n: int
    d: int
    rows: int = 0
    tasks: int = 8
    rank: int = 16
    dtype: str = "bfloat16"
    kind: str = "16-bit"
    per_row: bool = False
    bias: bool = False
    groups: int = 1
    aligned: bool = True

    @property
    def op(self) -> str:
        """Name it as configuration files do."""
        return "linear" if self.call in ("forward", "dx") else self.call

    def __str__(self) -> str:
        parts = [f"{self.call} {self.n}×{self.d}", f"M={self.rows}" if self.rows else "", f"K={self.tasks}"]
        parts += [f"R={self.rank}", self.kind if self.kind != "16-bit" else self.dtype]
        parts += [name for name in ("per_row", "bias") if getattr(self, name)]
        return " ".join(part for part in (*parts, "" if self.aligned else "unaligned") if part)


Values = dict[str, Any]


def inputs(case: Case, device: torch.device) -> Values:
    """Return random arguments on the scale of a real layer. On the meta device only their shapes.

    dy depends on x through Σ_k τ_k, and a dW on it, so that each dλ_k is a sum that does not cancel.
    """
    source, model = Source(device, seed=zlib.crc32(repr(case).encode())), getattr(torch, case.dtype)

    def stored(*shape: int, scale: float = 1.0) -> Tensor:
        pad = 0 if case.aligned else 1
        return source.normal(*shape[:-1], shape[-1] + pad, scale=scale, dtype=model)[..., pad:]

    n, d, width = case.n, case.d, case.d**-0.5
    values: Values = dict.fromkeys(("weight", "task_vectors", "lam", "A", "B"))
    if case.call in ("forward", "weight_grad", "shrink", "preference", "widen"):
        values["x"] = stored(case.rows, d)
    if case.call in ("dx", "factor_grad"):
        values["dy"] = stored(case.rows, n)
    if case.call in ("forward", "dx", "merge", "preference"):
        values["weight"] = stored(n, d, scale=width)
    if case.tasks and case.call not in ("shrink", "factor_grad", "preference", "widen"):
        values["task_vectors"] = stored(case.tasks, n, d, scale=0.1 * width)
        values["lam"] = source.normal(case.tasks, scale=0.3)
    if case.call == "weight_grad":
        dy = F.linear(values["x"], values["task_vectors"].sum(dim=0)).float() + source.normal(case.rows, n, scale=0.1)
        values["dy"] = dy.to(model)
    if case.call == "merge_grad":
        sums = 0.0 if values["task_vectors"] is None else values["task_vectors"].float().sum(dim=0)
        values["d_weight"] = (sums + stored(n, d, scale=0.1 * width).float()).to(model)
    if case.rank:
        values["A"], values["B"] = source.normal(n, case.rank), source.normal(d, case.rank, scale=width)
        values["G"] = source.normal(case.rank, case.rank, max(case.tasks, 1), scale=0.1)
        values["gamma"] = torch.softmax(source.normal(case.groups, max(case.tasks, 1)), dim=-1)
        core = preference_core(values["G"], values["gamma"][0])
        # laid out as the operators lay it out
        values["left"] = (core.t() @ values["A"].t()).t()
        values["t"] = source.normal(case.rows, case.rank)
        # as a served layer holds them
        values["right"] = values["B"].to(model).t().contiguous().t()
        if case.call == "preference":
            values["wide"] = pmkernels.widen_weight(values["weight"], values["A"])
    values["bias"] = stored(n) if case.bias else None
    values["out"] = torch.empty(n, d, dtype=model, device=device)
    return values


def run(case: Case, v: Values) -> list[Tensor]:
    """Launch a case with the configuration that dispatch gives it now."""
    call, low_rank = case.call, (v["left"], v["B"]) if case.rank and not case.per_row else None
    terms = Terms(v["weight"], v["task_vectors"], v["lam"], low_rank)
    if call == "forward":
        start = (v["t"], v["A"]) if case.per_row else None
        return [linear_kernels.linear_fwd(v["x"], terms, start=start, bias=v["bias"])]
    if call == "dx":
        start = (v["t"], v["B"]) if case.per_row else None
        return [linear_kernels.linear_bwd_x(v["dy"], terms, start=start)]
    if call == "merge":
        return [merge_kernels.merge_weight(terms, v["out"])]
    if call == "preference":
        served = (v["wide"], v["G"], v["right"], v["gamma"], v["bias"])
        return [preference_kernels.preference_linear(v["x"], *served)]
    if call == "widen":
        return [preference_kernels.widen(v["x"], v["G"], v["right"], v["gamma"])]
    if call == "factor_grad":
        return [low_rank_kernels.factor_grad(v["dy"], v["t"], case.n * case.d)]
    if call == "shrink":
        parts: Sequence[Tensor | None] = low_rank_kernels.shrink(v["x"], v["B"], v["G"], v["gamma"])
    elif call == "weight_grad":
        factors = {"A": v["A"], "B": v["B"], "need_bias": case.bias}
        parts = weight_grad_kernels.weight_grad(v["dy"], v["x"], v["task_vectors"], **factors)
    else:
        parts = weight_grad_kernels.weight_grad_of_merge(v["d_weight"], v["task_vectors"], A=v["A"], B=v["B"])
    return [part for part in parts if part is not None]


def computed(case: Case, v: Values, wide: torch.dtype) -> list[Tensor]:
    """Compute the same in PyTorch: in float64 the truth, else as plain PyTorch does. Its sums are in ``wide``."""
    # what is written is rounded to the model's type, but for the truth
    written = wide if wide == torch.float64 else getattr(torch, case.dtype)

    def of(name: str) -> Tensor:
        return v[name].to(wide)

    if case.call in ("merge", "forward", "dx"):
        weight = of("weight")
        if v["lam"] is not None:
            for scale, task_vector in zip(of("lam"), v["task_vectors"], strict=True):
                weight = weight + scale * task_vector.to(wide)
        if case.rank and not case.per_row:
            weight = weight + of("left") @ of("B").t()
        if case.call == "merge":
            return [weight.to(written)]
        rows, weight, factor = (v["x"], weight.t(), "A") if case.call == "forward" else (v["dy"], weight, "B")
        y = _product(rows, weight, wide)
        if case.per_row:
            y = y + of("t") @ of(factor).t()
        return [(y if v["bias"] is None else y + of("bias")).to(written)]
    if case.call in ("shrink", "preference", "widen"):
        s = of("x") @ of("B" if case.call == "shrink" else "right")
        gamma = of("gamma").repeat_interleave(case.rows // case.groups, dim=0)
        mixed = torch.stack([gamma[:, k : k + 1] * (s @ of("G")[:, :, k].t()) for k in range(gamma.shape[1])])
        t = mixed.sum(dim=0)
        if case.call == "shrink":
            return [s, t]
        if case.call == "widen":
            t = F.pad(t, (0, launch.padded_rank(case.rank) - case.rank))
            return [torch.cat([of("x"), t.to(written).to(wide)], dim=1)]
        A = v["wide"][:, case.d : case.d + case.rank].to(wide)
        y = _product(v["x"], v["weight"].t(), wide) + t @ A.t()
        return [(y if v["bias"] is None else y + of("bias")).to(written)]
    if case.call == "factor_grad":
        return [of("dy").t() @ of("t")]
    d_weight = of("d_weight") if case.call == "merge_grad" else _product(v["dy"].t(), v["x"], wide)
    parts = []
    if v["task_vectors"] is not None:
        parts.append(torch.stack([(task_vector.to(wide) * d_weight).sum() for task_vector in v["task_vectors"]]))
    if case.rank:
        parts += [d_weight @ of("B"), d_weight.t() @ of("A")]
    return [*parts, of("dy").sum(dim=0)] if case.bias else parts


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Multiply in float64, or as PyTorch does in the type of ``a``."""
    return a.to(wide) @ b.to(wide) if wide == torch.float64 else (a @ b.to(a.dtype)).to(wide)


@dataclass
class Prepared:
    """A case with its arguments on a device, float64 result, and plain PyTorch's errors."""

    case: Case
    values: Values
    truth: list[Tensor]
    plain: Errors

    @classmethod
    def make(cls, case: Case, device: torch.device) -> "Prepared":
        """Prepare a case.

        Of the weight gradient, plain PyTorch's error is at least that of its dW: few numbers come right by luck.
        """
        with precision(case.kind), torch.no_grad():
            values = inputs(case, device)
            truth = computed(case, values, torch.float64)
            plain = Errors.of(computed(case, values, torch.float32), truth)
            if case.call == "weight_grad":
                x, dy_t = values["x"], values["dy"].t()
                of_dw = Errors.of(*([_product(dy_t, x, wide)] for wide in (torch.float32, torch.float64)))
                plain = Errors(max(plain.whole, of_dw.whole), max(plain.line, of_dw.line))
        return cls(case, values, truth, plain)

    def fault(self, results: Sequence[Tensor]) -> str | None:
        """Return what is wrong with a result, or None."""
        errors = Errors.of(results, self.truth)
        # no fault where plain PyTorch has no error: of TF32 products
        more = 1e-4 if self.case.call in ("merge_grad", "shrink", "factor_grad", "widen") else 1e-6
        more = 1e-3 if self.case.kind == "tf32" else more
        for name, error, allowed in (
            ("error", errors.whole, TOLERANCE * self.plain.whole + more),
            ("error of a row or column", errors.line, LINE_TOLERANCE * (self.plain.line + more)),
        ):
            if not error <= allowed:
                return f"wrong: {name} {error:.2e}, allowed {allowed:.2e} ({self.case})"
        return None
