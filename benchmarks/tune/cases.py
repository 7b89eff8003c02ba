"""One launch of one kernel: its arguments, and the launch itself."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pmkernels
from pmkernels.kernels import linear as linear_kernels
from pmkernels.kernels import low_rank as low_rank_kernels
from pmkernels.kernels import merge as merge_kernels
from pmkernels.kernels import preference as preference_kernels
from pmkernels.kernels import weight_grad as weight_grad_kernels
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
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))
    model = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        if generator is None:
            return torch.empty(shape, device=device)
        return scale * torch.randn(shape, generator=generator, device=device)

    def stored(*shape: int, scale: float = 1.0) -> Tensor:
        pad = 0 if case.aligned else 1
        return normal(*shape[:-1], shape[-1] + pad, scale=scale).to(model)[..., pad:]

    n, d, width = case.n, case.d, case.d**-0.5
    values: Values = {"task_vectors": None, "lam": None, "A": None, "B": None}
    if case.call in ("forward", "weight_grad", "shrink", "preference", "widen"):
        values["x"] = stored(case.rows, d)
    if case.call in ("dx", "factor_grad"):
        values["dy"] = stored(case.rows, n)
    if case.call in ("forward", "dx", "merge", "preference"):
        values["weight"] = stored(n, d, scale=width)
    if case.tasks and case.call not in ("shrink", "factor_grad", "preference", "widen"):
        values["task_vectors"] = stored(case.tasks, n, d, scale=0.1 * width)
        values["lam"] = normal(case.tasks, scale=0.3)
    if case.call == "weight_grad":
        dy = F.linear(values["x"], values["task_vectors"].sum(dim=0)).float() + normal(case.rows, n, scale=0.1)
        values["dy"] = dy.to(model)
    if case.call == "merge_grad":
        sums = 0.0 if values["task_vectors"] is None else values["task_vectors"].float().sum(dim=0)
        values["d_weight"] = (sums + stored(n, d, scale=0.1 * width).float()).to(model)
    if case.rank:
        values["A"], values["B"] = normal(n, case.rank), normal(d, case.rank, scale=width)
        values["G"] = normal(case.rank, case.rank, max(case.tasks, 1), scale=0.1)
        values["gamma"] = torch.softmax(normal(case.groups, max(case.tasks, 1)), dim=-1)
        core = preference_core(values["G"], values["gamma"][0])
        # laid out as the operators lay it out
        values["left"] = (core.t() @ values["A"].t()).t()
        values["t"] = normal(case.rows, case.rank)
        # as a served layer holds them
        values["right"] = values["B"].to(model).t().contiguous().t()
        if case.call == "preference":
            values["wide"] = pmkernels.widen_weight(values["weight"], values["A"])
    values["bias"] = stored(n) if case.bias else None
    values["out"] = torch.empty(n, d, dtype=model, device=device)
    return values


def run(case: Case, v: Values) -> list[Tensor]:
    """Launch a case with the configuration that dispatch gives it now."""
    if case.op == "linear":
        low_rank = (v["left"], v["B"]) if case.rank and not case.per_row else None
        weights = (v["weight"], v["task_vectors"], v["lam"])
        if case.call == "forward":
            start = (v["t"], v["A"]) if case.per_row else None
            return [linear_kernels.linear_fwd(v["x"], *weights, low_rank=low_rank, start=start, bias=v["bias"])]
        start = (v["t"], v["B"]) if case.per_row else None
        return [linear_kernels.linear_bwd_x(v["dy"], *weights, low_rank=low_rank, start=start)]
    if case.call == "merge":
        low_rank = (v["left"], v["B"]) if case.rank else None
        return [merge_kernels.merge_weight(v["weight"], v["task_vectors"], v["lam"], low_rank, v["out"])]
    if case.call == "shrink":
        return [part for part in low_rank_kernels.shrink(v["x"], v["B"], v["G"], v["gamma"]) if part is not None]
    if case.call == "preference":
        served = (v["wide"], v["G"], v["right"], v["gamma"], v["bias"])
        return [preference_kernels.preference_linear(v["x"], *served)]
    if case.call == "widen":
        return [preference_kernels.widen(v["x"], v["G"], v["right"], v["gamma"])]
    if case.call == "factor_grad":
        return [low_rank_kernels.factor_grad(v["dy"], v["t"], case.n * case.d)]
    factors = {"A": v["A"], "B": v["B"]}
    if case.call == "weight_grad":
        reduced = weight_grad_kernels.weight_grad(v["dy"], v["x"], v["task_vectors"], **factors, need_bias=case.bias)
    else:
        reduced = weight_grad_kernels.weight_grad_of_merge(v["d_weight"], v["task_vectors"], **factors)
    return [part for part in reduced if part is not None]
