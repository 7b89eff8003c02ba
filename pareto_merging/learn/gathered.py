"""What a step merges for all layers at once: vectors, and the factors A·C(γ).

All biases and norms are merged in one launch and their λ differentiated in one; the small products of the low-rank
terms are batched over the layers of one shape.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pmkernels
from pareto_merging.learn.adam import flat_gradient, flattened, pieces
from pareto_merging.model.parameters import MergedParameter, merged_parameters
from pareto_merging.model.state import ParetoState, pareto_state


class Gathered:
    """Vectors and factors of one Pareto model, and the gradient through them.

    ``learned`` has P numbers in all. ``wanted`` is what a value is differentiated by: the learned parameters, but L =
    A·C in the place of A and nothing in that of G; with a preference per item there is no one C, and A and G are wanted
    themselves.
    """

    def __init__(self, model: nn.Module, learned: Mapping[str, nn.Parameter], *, one_gamma: bool = True) -> None:
        self.parameters, self.state = list(learned.values()), pareto_state(model)
        self.factors = MergedFactors(model, self.parameters if one_gamma else ())
        leaves, cores = self.factors.leaves, self.factors.cores
        self.wanted = [leaves.get(id(p), p) for p in self.parameters if id(p) not in cores]
        members = list(_vectors(model))
        self.vectors = MergedVectors(self.state, members, self.wanted) if members else None

    def refresh(self) -> None:
        """Merge with λ, A, G and γ as they are now."""
        self.factors.refresh()
        if self.vectors is not None:
            self.vectors.refresh()

    def lent(self) -> contextlib.AbstractContextManager[None]:
        """Let the model's layers use what is merged, inside the block. Views of the vectors, and L with B."""
        vectors = None if self.vectors is None else self.vectors.by_weight()
        return self.state.now.changed(factors=self.factors.by_weight or None, vectors=vectors)

    def gradient(self, value: Tensor) -> Tensor:
        """Return d value / d :attr:`wanted` as one flat tensor, which :meth:`finish` makes the parameters'."""
        leaf = None if self.vectors is None else self.vectors.leaf
        if self.vectors is None or leaf is None or not leaf.requires_grad or not value.requires_grad:
            return flat_gradient(value, self.wanted)
        *gradients, d_leaf = torch.autograd.grad(value, [*self.wanted, leaf], allow_unused=True)
        flat = flattened(gradients, self.wanted)
        if d_leaf is not None:
            self.vectors.add_d_lambda(d_leaf, flat)
        return flat

    def finish(self, flat: Tensor) -> Tensor:
        """Return the parameters' gradient [P] of that of :attr:`wanted`."""
        if not self.factors.leaves:
            return flat
        by_identity = {id(w): part for w, part in zip(self.wanted, pieces(flat, self.wanted), strict=True)}
        by_identity |= self.factors.gradients({key: by_identity[id(leaf)] for key, leaf in self.factors.leaves.items()})
        return torch.cat([by_identity[id(parameter)].reshape(-1).to(flat) for parameter in self.parameters])


def _vectors(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield W0, τ and λ of the vectors that λ alone merges. Only those of the first one's type and device."""
    first: Tensor | None = None
    for parameter in merged_parameters(model):
        weight, lam, tau = parameter.weight, parameter.lam, parameter.task_vectors
        if weight.ndim != 1 or lam is None or tau is None or parameter.A is not None:
            continue
        alike = first is None or (weight.dtype, weight.device) == (first.dtype, first.device)
        if alike and tau.dtype == weight.dtype and weight.numel():
            first = weight if first is None else first
            yield weight, tau, lam


class MergedVectors:
    """Every bias, norm and other vector with a λ, merged and differentiated at once.

    ``refresh`` merges them into one leaf tensor z; the model's layers read views of it, so that autograd finds dS/dz;
    :meth:`add_d_lambda` makes dλ of that. ``members`` are W0, τ and λ of each, ``learned`` what the flat gradient is
    of.
    """

    def __init__(
        self, state: ParetoState, members: Sequence[tuple[Tensor, Tensor, Tensor]], learned: Sequence[Tensor]
    ) -> None:
        self.state = state
        ends = itertools.accumulate((parameter.numel() for parameter in learned), initial=0)
        places = {id(parameter): start for parameter, start in zip(learned, ends, strict=False)}
        weights, taus, lams = (list(column) for column in zip(*members, strict=True))
        device = weights[0].device
        self.sizes = [weight.numel() for weight in weights]
        # kept together a second time, and alive, so that their identities stay theirs: a thousandth of the model
        self._originals = weights
        self.weight = torch.cat([weight.detach() for weight in weights])
        self.task_vectors = torch.cat([tau.detach() for tau in taus], dim=1)
        self.offsets = torch.tensor([0, *self.sizes], device=device).cumsum(0)
        self.distinct = list({id(lam): lam for lam in lams}.values())
        index = {id(lam): i for i, lam in enumerate(self.distinct)}
        # which λ each vector uses; tasks share a λ in coarser granularities
        self.owner = torch.tensor([index[id(lam)] for lam in lams], device=device)
        self.shared = len(self.distinct) < len(lams)
        self.learned = [i for i, lam in enumerate(self.distinct) if id(lam) in places]
        tasks = self.task_vectors.shape[0]
        starts = torch.tensor([places[id(self.distinct[i])] for i in self.learned], dtype=torch.int64, device=device)
        self.positions = (starts[:, None] + torch.arange(tasks, device=device)).reshape(-1)
        # λ by vector, summed over the vectors that share it and picked where it is learned
        self.picked = torch.tensor(self.learned, dtype=torch.int64, device=device)
        self.sharing = torch.nn.functional.one_hot(self.owner, len(self.distinct)).t()[self.picked]
        self.leaf = torch.empty_like(self.weight).requires_grad_(bool(self.learned))

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge with λ as it is now."""
        table = torch.stack([lam.detach() for lam in self.distinct])
        if self.state.now.lambda_range is not None:
            table = table.clamp(*self.state.now.lambda_range)
        table = table[self.owner] if self.shared else table
        strategy = self.state.now.kernel_strategy
        self.leaf.copy_(pmkernels.merge_vectors(self.weight, self.task_vectors, table, self.offsets, strategy=strategy))

    def by_weight(self) -> dict[int, Tensor]:
        """Return views of the merged vectors by the identity of their W0."""
        return dict(zip(map(id, self._originals), self.leaf.split(self.sizes), strict=True))

    def add_d_lambda(self, d_leaf: Tensor, gradient: Tensor) -> None:
        """Add to the flat ``gradient`` [P] what ``d_leaf`` [S] says of the λ, in place."""
        strategy = self.state.now.kernel_strategy
        d_table = pmkernels.merge_vectors_gradient(d_leaf, self.task_vectors, self.offsets, strategy=strategy)
        d_lambda = self.sharing.to(d_table) @ d_table if self.shared else d_table.index_select(0, self.picked)
        if self.state.now.lambda_range is not None:
            low, high = self.state.now.lambda_range
            table = torch.stack([self.distinct[i].detach() for i in self.learned])
            d_lambda = d_lambda * ((table >= low) & (table <= high))
        # no place occurs twice
        gradient[self.positions] = gradient[self.positions] + d_lambda.reshape(-1).to(gradient)


class MergedFactors:
    """L = A·C(γ) of every low-rank term, put together and differentiated at once.

    A layer needs L and B alone, and dS/dL = dW·B comes from the pass that forms dW. From Σ_k c_k dS_k/dL then follow dA
    = dL·Cᵀ and dG[:,:,k] = γ_k AᵀdL of all layers of one shape in a few batched products, once for all tasks.
    ``leaves`` and ``by_weight`` have by the identity of A and of W0 the leaf that stands for A; ``cores`` the
    identities of every G.
    """

    def __init__(self, model: nn.Module, learned: Sequence[Tensor]) -> None:
        self.state = pareto_state(model)
        wanted = {id(parameter) for parameter in learned}
        groups: dict[Any, list[MergedParameter]] = {}
        for parameter in merged_parameters(model):
            A = parameter.A
            if A is not None and id(A) in wanted:
                groups.setdefault((A.shape, A.dtype, A.device), []).append(parameter)
        self.groups = list(groups.values())
        self.leaves: dict[int, Tensor] = {}
        self.cores = {id(p.G) for group in self.groups for p in group if p.G is not None}
        self._stacked = [torch.stack([p.A.detach() for p in group if p.A is not None]) for group in self.groups]
        self.by_weight: dict[int, Tensor] = {}
        for group, stacked in zip(self.groups, self._stacked, strict=True):
            for parameter, factor in zip(group, stacked, strict=True):
                leaf = factor.detach().requires_grad_()
                self.leaves[id(parameter.A)] = self.by_weight[id(parameter.weight)] = leaf

    def _cores(self, group: Sequence[MergedParameter]) -> tuple[Tensor, Tensor]:
        """Return A [L, N, r] and C(γ) [L, r, r] of layers of one shape."""
        terms = [term for parameter in group if (term := parameter.low_rank()) is not None]
        G = torch.stack([term.G for term in terms])
        return torch.stack([term.A for term in terms]), G @ self.state.now.gamma.to(G)

    @torch.no_grad()
    def refresh(self) -> None:
        """Put L together with A, G and γ as they are now."""
        for group, stacked in zip(self.groups, self._stacked, strict=True):
            A, core = self._cores(group)
            torch.bmm(A, core, out=stacked)

    @torch.no_grad()
    def gradients(self, d_leaves: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return dA and dG by their parameter's identity, from dL by that of A."""
        result: dict[int, Tensor] = {}
        for group in self.groups:
            A, core = self._cores(group)
            dL = torch.stack([d_leaves[id(parameter.A)] for parameter in group]).to(core)
            dA, dC = dL @ core.mT, A.mT @ dL
            dG = dC[..., None] * self.state.now.gamma.to(dC)
            for parameter, of_A, of_G in zip(group, dA, dG, strict=True):
                result[id(parameter.A)] = of_A
                if parameter.G is not None:
                    result[id(parameter.G)] = of_G
        return result
