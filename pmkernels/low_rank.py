"""The parts of W(γ), and the one internal form of its low-rank terms.

There are two, the constant one A_c·B_cᵀ and the preference's A·C(γ)·Bᵀ. Inside the kernels they are one pair of
matrices of the :class:`Terms` of W, left = [A_c | A·C(γ)] [N, R] and right = [B_c | B] [D, R]; one reduction of dW
against [A_c | A] and [B_c | B] gives the gradients of both. With one γ per row the pair is the constant term alone, and
t_m = C(γ_m)·Bᵀx_m and ds_m = C(γ_m)ᵀ·Aᵀdy_m are found row by row (:class:`RowProducts`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pmkernels.reference import accumulate_dtype, converted, preference_core

# left [N, R] and right [D, R] of a term left·rightᵀ
Factors = tuple[Tensor, Tensor]


class Terms(NamedTuple):
    """The terms of W = W0 + Σ_k λ_k τ_k + left·rightᵀ. Each is None where W has none of it."""

    weight: Tensor
    task_vectors: Tensor | None = None
    lam: Tensor | None = None
    low_rank: Factors | None = None


class Parts(NamedTuple):
    """The tensors that W(γ) is made of, as the public functions take them."""

    weight: Tensor
    task_vectors: Tensor | None = None
    lam: Tensor | None = None
    A: Tensor | None = None
    G: Tensor | None = None
    B: Tensor | None = None
    gamma: Tensor | None = None
    A_c: Tensor | None = None
    B_c: Tensor | None = None

    @property
    def per_row(self) -> bool:
        """Say whether γ has more dimensions than K."""
        return self.gamma is not None and self.gamma.ndim > 1

    def core(self) -> Tensor | None:
        """Return C(γ) [R, R], None where the term has none or one per row."""
        return None if self.G is None or self.gamma is None or self.per_row else preference_core(self.G, self.gamma)

    def terms(self, core: Tensor | None, *, by_columns: bool) -> Terms:
        """Return the terms of W, the preference's from ``core``: C(γ). With one γ per row it has none.

        ``by_columns``: neighbouring n are neighbours in memory, as kernels read them; else left is in the type of the
        sums.
        """
        weight, task_vectors, lam, A, _, B, _, A_c, B_c = self
        if self.per_row:
            A = B = None
        right = side_by_side(B_c, B)
        if right is None:
            return Terms(weight, task_vectors, lam)
        wide = accumulate_dtype(weight, lam)
        if by_columns:
            A_c, A = (None if factor is None else factor.t() for factor in (A_c, A))
            columns = A if A is None or core is None else core.t() @ A
            left = columns if A_c is None else A_c if columns is None else torch.cat([A_c, columns])
            assert left is not None
            return Terms(weight, task_vectors, lam, (left.contiguous().t(), right))
        A_c, A = (None if factor is None else converted(factor, wide) for factor in (A_c, A))
        left = side_by_side(A_c, A if A is None or core is None else A @ converted(core, wide))
        assert left is not None
        return Terms(weight, task_vectors, lam, (left, right))

    def constant(self) -> "Parts":
        """Return W0 and the constant term as parts whose one low-rank term is A·Bᵀ."""
        return Parts(self.weight, A=self.A_c, B=self.B_c)

    def contiguous(self) -> "Parts":
        """Return the parts with λ, G and all factors contiguous. Their offsets then stay in int32."""
        learned = {name: getattr(self, name) for name in ("lam", "A", "G", "B", "A_c", "B_c")}
        return self._replace(**{name: t.contiguous() for name, t in learned.items() if t is not None})


class Needs(NamedTuple):
    """Which gradients are wanted."""

    lam: bool
    A: bool
    G: bool
    B: bool
    gamma: bool
    A_c: bool = False
    B_c: bool = False

    @property
    def P(self) -> bool:
        """Say whether a gradient comes from P = dW·B: those of A, G and γ."""
        return self.A or self.G or self.gamma

    @property
    def core(self) -> bool:
        """Say whether a gradient comes from dC: those of G and γ."""
        return self.G or self.gamma

    @property
    def low_rank(self) -> bool:
        """Say whether any gradient of the preference's term is wanted."""
        return self.P or self.B

    @property
    def constant(self) -> bool:
        """Say whether any gradient of the constant term is wanted."""
        return self.A_c or self.B_c

    def of(self, *, low_rank: bool, constant: bool) -> "Needs":
        """Return the needs without those of a term that is left out."""
        A, G, B, gamma = (need and low_rank for need in self[1:5])
        return Needs(self.lam, A, G, B, gamma, self.A_c and constant, self.B_c and constant)

    def divided(self, parts: Parts, from_tiles: Callable[[int, int, int], bool]) -> tuple["Needs", "Needs"]:
        """Return what comes from dW, and what of the low-rank terms goes row by row.

        One pass over dW gives everything where λ wants it anyway, as far as ``from_tiles``(rank, n, d) allows; but with
        one γ per row nothing of the preference's term.
        """
        of_dW, rank = {"constant": False, "low_rank": False}, 0
        for name, factor in (("constant", parts.A_c), ("low_rank", None if parts.per_row else parts.A)):
            if self.lam and factor is not None and getattr(self, name):
                together = rank + factor.shape[1]
                if from_tiles(together, *parts.weight.shape):
                    of_dW[name], rank = True, together
        return self.of(**of_dW), self.of(**{name: not whole for name, whole in of_dW.items()})

    def factors(self, parts: Parts) -> dict[str, Tensor | None]:
        """Return the factors that dW is reduced against, by name.

        These are A = [A_c | A] where Q is needed and B = [B_c | B] where P is; a term of which no gradient is wanted
        has no part in either.
        """
        A_c, B_c = (parts.A_c, parts.B_c) if self.constant else (None, None)
        A, B = (parts.A, parts.B) if self.low_rank else (None, None)
        need_Q, need_P = self.B or self.B_c, self.P or self.A_c
        return {"A": side_by_side(A_c, A) if need_Q else None, "B": side_by_side(B_c, B) if need_P else None}


class WeightGradients(NamedTuple):
    """The reductions of a dW: dλ [K], P = dW·B, Q = dWᵀ·A, db [N]. None: not asked for."""

    d_lam: Tensor | None = None
    P: Tensor | None = None
    Q: Tensor | None = None
    d_bias: Tensor | None = None


def gradients_of_weight(reduced: WeightGradients, parts: Parts, core: Tensor | None, needs: Needs) -> dict[str, Tensor]:
    """Return dλ, db, dA = P·Cᵀ, dB = Q·C, dG and dγ by name.

    ``reduced`` is against ``needs.factors``: the first columns of P and Q are dA_c and dB_c. Without a C, the rest are
    dA and dB.
    """
    d_lam, P, Q, d_bias = reduced
    gradients = {} if d_lam is None else {"lam": d_lam}
    if d_bias is not None:
        gradients["bias"] = d_bias
    if needs.constant:
        assert parts.A_c is not None
        rank = parts.A_c.shape[1]
        if needs.A_c and P is not None:
            gradients["A_c"] = _packed(P[:, :rank])
        if needs.B_c and Q is not None:
            gradients["B_c"] = _packed(Q[:, :rank])
        P, Q = (None if product is None else product[:, rank:] for product in (P, Q))
    if needs.A and P is not None:
        gradients["A"] = _packed(P) if core is None else P @ converted(core.t(), P.dtype)
    if needs.B and Q is not None:
        gradients["B"] = _packed(Q) if core is None else Q @ converted(core, Q.dtype)
    if needs.core and P is not None:
        assert parts.A is not None
        gradients |= gradients_of_core(converted(parts.A, P.dtype).t() @ P, parts, needs)
    return gradients


def gradients_of_core(dC: Tensor, parts: Parts, needs: Needs, groups: Tensor | None = None) -> dict[str, Tensor]:
    """Return dG[:,:,k] = Σ_g γ_gk dC_g and dγ_gk = ⟨G[:,:,k], dC_g⟩ by name.

    ``groups``: γ [groups, K] of dC [groups, R, R]. None: the one γ of dC [R, R].
    """
    G = parts.G
    assert G is not None and parts.gamma is not None
    gamma = parts.gamma[None] if groups is None else groups
    rank, tasks = G.shape[0], G.shape[2]
    flat, gradients = dC.reshape(len(gamma), rank * rank), {}
    if needs.G:
        gradients["G"] = converted((flat.t() @ converted(gamma, flat.dtype)).view(rank, rank, tasks), G.dtype)
    if needs.gamma:
        d_gamma = converted(flat @ converted(G.reshape(rank * rank, tasks), flat.dtype), gamma.dtype)
        gradients["gamma"] = d_gamma[0] if groups is None else d_gamma
    return gradients


def side_by_side(constant: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """Return [A_c | A] of two factors, or the one that there is."""
    if constant is None or factor is None:
        return factor if constant is None else constant
    return torch.cat([constant, factor], dim=1)


def _packed(product: Tensor) -> Tensor:
    """Return a product as its fake lies in memory. A rank may be cut out of a padded one."""
    rows_follow = product.stride(0) == product.shape[1]
    return product if rows_follow else product.clone(memory_format=torch.contiguous_format)


def varying_dims(gamma: Tensor) -> int:
    """Count the leading dimensions γ varies over. The rest form the rows of a group."""
    dims = gamma.ndim - 1
    while dims > 0 and gamma.shape[dims - 1] == 1:
        dims -= 1
    return dims


def groups_of(gamma: Tensor, lead: Sequence[int]) -> Tensor:
    """Return γ [*, K] against rows ``lead`` as [groups, K], not expanded to rows."""
    dims = varying_dims(gamma)
    expanded = gamma.reshape(*gamma.shape[:dims], gamma.shape[-1]).expand(*lead[:dims], -1)
    return expanded.reshape(math.prod(lead[:dims]), gamma.shape[-1])


def ungroup(d_groups: Tensor, lead: Sequence[int], gamma: Tensor) -> Tensor:
    """Sum the gradient of the grouped γ [groups, K] back to the shape of ``gamma``."""
    dims = varying_dims(gamma)
    expanded = d_groups.reshape(*lead[:dims], *(1 for _ in gamma.shape[dims:-1]), gamma.shape[-1])
    return expanded.sum_to_size(gamma.shape)


class RowProducts:
    """The products of A·C(γ)·Bᵀ with rows, and its gradients from them.

    These are s = x·B and t = s·Cᵀ, u = dy·A and ds = u·C; ``like`` is x or dy. With one γ for all rows there is one
    group of them, and C is a matrix; without a C, t is s and ds is u. The constant term's are those of
    :meth:`Parts.constant`.
    """

    def __init__(self, parts: Parts, like: Tensor) -> None:
        self.parts, self.lead = parts, like.shape[:-1]
        self.count = math.prod(self.lead)
        self.shape: tuple[int, ...] = (self.count,)
        self.groups, self.core = parts.gamma, parts.core()
        # the type of the sums, of all four
        self.wide = accumulate_dtype(like, parts.A)
        if parts.per_row:
            assert parts.G is not None and parts.gamma is not None
            self.groups = groups_of(parts.gamma, self.lead)
            self.core = preference_core(parts.G, self.groups)
            self.wide = self.core.dtype
            self.shape = (len(self.groups), math.prod(self.lead[varying_dims(parts.gamma) :]))

    @staticmethod
    def from_tiles(rank: int, n: int, d: int) -> bool:
        """Say whether the low-rank gradients come from dW where λ wants that anyway."""
        return True

    def shrink(self, rows: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Return s and t of x [*, D], in the type of the sums. ``transposed``: u and ds of dy [*, N]."""
        factor = self.parts.A if transposed else self.parts.B
        assert factor is not None
        s = converted(rows.reshape(*self.shape, rows.shape[-1]) @ converted(factor, rows.dtype), self.wide)
        return s, s if self.core is None else s @ converted(self.core if transposed else self.core.mT, s.dtype)

    def factor_gradient(self, rows: Tensor, t: Tensor) -> Tensor:
        """Return dA = dyᵀ·t of dy and t, or dB of x and ds."""
        flat = rows.reshape(self.count, rows.shape[-1])
        return flat.t() @ converted(t, rows.dtype).reshape(self.count, t.shape[-1])

    def core_gradients(self, u: Tensor, s: Tensor, needs: Needs) -> dict[str, Tensor]:
        """Return dG and dγ by name, as far as they are needed."""
        gradients = gradients_of_core(u.mT @ s, self.parts, needs, self.groups if self.parts.per_row else None)
        if needs.gamma and self.parts.per_row:
            assert self.parts.gamma is not None
            gradients["gamma"] = ungroup(gradients["gamma"], self.lead, self.parts.gamma)
        return gradients

    def gradients(
        self, dy: Tensor, x: Tensor | None, needs: Needs, need_ds: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the gradients of the low-rank term by name, and ds where anything needs it."""
        gradients: dict[str, Tensor] = {}
        ds = None
        if needs.B or needs.core or need_ds:
            u, ds = self.shrink(dy, transposed=True)
        if needs.low_rank:
            assert x is not None
            if needs.P:
                s, t = self.shrink(x)
            if needs.A:
                gradients["A"] = self.factor_gradient(dy, t)
            if ds is not None and needs.B:
                gradients["B"] = self.factor_gradient(x, ds)
            if needs.core:
                gradients |= self.core_gradients(u, s, needs)
        return gradients, ds
