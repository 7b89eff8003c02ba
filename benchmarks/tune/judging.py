"""The result of a launch in float64, and what is wrong with another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common.errors import LINE_TOLERANCE, TOLERANCE, Errors
from benchmarks.common.modes import precision
from benchmarks.tune.cases import Case, Values, inputs
from pmkernels import launch


def computed(case: Case, v: Values, wide: torch.dtype) -> list[Tensor]:
    """Compute the same in PyTorch: in float64 the truth, else as plain PyTorch does. Its sums are in ``wide``."""
    exact = wide == torch.float64

    def of(name: str) -> Tensor:
        return v[name].to(wide)

    def merged() -> Tensor:
        weight = of("weight")
        if v["lam"] is not None:
            for scale, task_vector in zip(of("lam"), v["task_vectors"], strict=True):
                weight = weight + scale * task_vector.to(wide)
        if case.rank and not case.per_row:
            weight = weight + of("left") @ of("B").t()
        return weight

    if case.call == "merge":
        return [merged() if exact else merged().to(v["weight"].dtype)]
    if case.op == "linear":
        weight, rows = merged(), v["x" if case.call == "forward" else "dy"]
        weight, rows = (weight, rows.to(wide)) if exact else (weight.to(rows.dtype), rows)
        y = (rows @ (weight.t() if case.call == "forward" else weight)).to(wide)
        if case.per_row:
            y = y + of("t") @ of("A" if case.call == "forward" else "B").t()
        y = y if v["bias"] is None else y + of("bias")
        return [y if exact else y.to(rows.dtype)]
    if case.call in ("shrink", "preference", "widen"):
        s = of("x") @ of("B" if case.call == "shrink" else "right")
        gamma = of("gamma").repeat_interleave(case.rows // case.groups, dim=0)
        mixed = torch.stack([gamma[:, k : k + 1] * (s @ of("G")[:, :, k].t()) for k in range(gamma.shape[1])])
        if case.call == "shrink":
            return [s, mixed.sum(dim=0)]
        x, t = v["x"], mixed.sum(dim=0)
        if case.call == "widen":
            t = F.pad(t, (0, launch.padded_rank(case.rank) - case.rank))
            return [torch.cat([of("x"), t if exact else t.to(x.dtype).to(wide)], dim=1)]
        A = v["wide"][:, case.d : case.d + case.rank].to(wide)
        y = (x.to(wide) if exact else x) @ (of("weight") if exact else v["weight"]).t()
        y = y.to(wide) + t @ A.t() + (0.0 if v["bias"] is None else of("bias"))
        return [y if exact else y.to(x.dtype)]
    if case.call == "factor_grad":
        return [of("dy").t() @ of("t")]
    d_weight = of("d_weight") if case.call == "merge_grad" else _d_weight(v, wide)
    parts = []
    if v["task_vectors"] is not None:
        parts.append(torch.stack([(task_vector.to(wide) * d_weight).sum() for task_vector in v["task_vectors"]]))
    if case.rank:
        parts += [d_weight @ of("B"), d_weight.t() @ of("A")]
    return [*parts, of("dy").sum(dim=0)] if case.bias else parts


def _d_weight(v: Values, wide: torch.dtype) -> Tensor:
    if wide == torch.float64:
        return v["dy"].to(wide).t() @ v["x"].to(wide)
    return (v["dy"].t() @ v["x"]).to(wide)


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
                of_dw = Errors.of([_d_weight(values, torch.float32)], [_d_weight(values, torch.float64)])
                plain = Errors(max(plain.whole, of_dw.whole), max(plain.line, of_dw.line))
        return cls(case, values, truth, plain)

    def fault(self, results: Sequence[Tensor]) -> str | None:
        """Return what is wrong with a result, or None."""
        errors, more = Errors.of(results, self.truth), self.rounding()
        for name, error, allowed in (
            ("error", errors.whole, TOLERANCE * self.plain.whole + more),
            ("error of a row or column", errors.line, LINE_TOLERANCE * (self.plain.line + more)),
        ):
            if not error <= allowed:
                return f"wrong: {name} {error:.2e}, allowed {allowed:.2e} ({self.case})"
        return None

    def rounding(self) -> float:
        """Return an error that is no fault where plain PyTorch has none: of TF32 products."""
        if self.case.kind == "tf32":
            return 1e-3
        return 1e-4 if self.case.call in ("merge_grad", "shrink", "factor_grad", "widen") else 1e-6
