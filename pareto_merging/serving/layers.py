"""The layers of a folded model as a server holds them.

W and A lie side by side. Beside the plain model's weights that is r·(out + in) numbers a layer in the model's type (for
A, r rounded up to 16, 32 or 64) and r·r·K in float32: about a hundredth of a ViT at r = 16. W(γ) of a preference that
many requests share is kept besides, where that is asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from pareto_merging.model.attention import ParetoAttention
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.linear import ParetoLinear
from pareto_merging.model.parameters import LEARNED, part_name


@dataclass
class ServedWeight:
    """One parameter with a low-rank term. ``wide`` is [N, D + R], G [r, r, K], B [D, r], and W(γ), if kept, [N, D].

    ``in_use``: whether all items of a batch have the preference of the W(γ) that is kept.
    """

    wide: Tensor
    G: Tensor
    B: Tensor
    merged: Tensor | None = None
    in_use: bool = False

    @property
    def weight(self) -> Tensor:
        """Return W [N, D], in the memory of ``wide``."""
        return self.wide[:, : self.B.shape[0]]

    def at(self, gamma: Tensor, out: Tensor | None = None) -> Tensor:
        """Return W(γ) for gamma [K], a new tensor or ``out``."""
        d, rank = self.B.shape
        A = self.wide[:, d : d + rank]
        wider = torch.promote_types(self.wide.dtype, torch.float32)
        return pmkernels.merge_weight(self.weight, A=A.to(wider), G=self.G, B=self.B.to(wider), gamma=gamma, out=out)

    def keep(self, gamma: Tensor) -> None:
        """Write W(γ) of gamma [K] into the memory kept for it, made the first time."""
        if self.merged is None:
            self.merged = torch.empty(self.weight.shape, dtype=self.wide.dtype, device=self.wide.device)
        self.at(gamma, self.merged)


class Served(ParetoModule):
    """A layer whose low-rank parameters are :class:`ServedWeight`."""

    served: dict[str, ServedWeight]

    def pareto_project(self, x: Tensor, name: str, bias: Tensor | None, rows: slice, batch_dim: int = 0) -> Tensor:
        part = self.served.get(name)
        if part is None:
            return super().pareto_project(x, name, bias, rows, batch_dim)
        bias = None if bias is None else bias[rows]
        if part.in_use and part.merged is not None:
            return F.linear(x, part.merged[rows], bias)
        gamma = self.pareto_gamma_for(x, batch_dim)
        return pmkernels.preference_linear(x, part.wide[rows], part.G, part.B, gamma, bias)

    def pareto_merged(self, name: str, gamma: Tensor | None = None) -> Tensor:
        part = self.served.get(name)
        if part is None:
            return super().pareto_merged(name, gamma)
        if gamma is None:
            if part.in_use and part.merged is not None:
                return part.merged
            gamma = self.pareto_gamma_on(part.wide.device)
            if gamma.ndim != 1:
                tensor = f"{self.pareto_original.__name__}.{name} is one merged tensor"
                raise ValueError(
                    f"preference: {tensor}, so expected one preference for the whole batch, got {len(gamma)}"
                )
        return part.at(gamma.to(part.wide.device))


class ServedLinear(Served, ParetoLinear):
    """ParetoLinear as a server holds it."""


class ServedAttention(Served, ParetoAttention):
    """ParetoAttention as a server holds it: q, k and v share one product with B."""


def serve_layers(model: nn.Module) -> tuple[list[ServedWeight], bool]:
    """Turn the layers of a folded model into :class:`Served` ones, in place. It must not be moved afterwards.

    Returns:
        What they hold, and whether that is every low-rank term of the model: only then can each item of a batch have
        its own preference. Layers of other classes, and the cores without a G, stay as they are.
    """
    weights: list[ServedWeight] = []
    complete = True
    for _, module in pareto_modules(model):
        names = [name for name in module.pareto_names if module.pareto_parameter(name).A is not None]
        kind = {ParetoLinear: ServedLinear, ParetoAttention: ServedAttention}.get(type(module))
        if kind is None or any(module.pareto_parameter(name).G is None for name in names):
            complete = complete and not names
            continue
        parts = {name: _served(module, name) for name in names}
        module.__class__ = kind
        module.served = parts
        weights += parts.values()
        # PyTorch's own forward on one merged tensor
        complete = complete and not (kind is ServedAttention and (module.bias_k is not None or module.add_zero_attn))
    # it reads its out-projection's weight and does not call it
    parents = (module for module in model.modules() if type(module) is nn.MultiheadAttention)
    return weights, complete and not any(isinstance(parent.out_proj, ParetoModule) for parent in parents)


def _served(module: ParetoModule, name: str) -> ServedWeight:
    stored = module.pareto_parameter(name)
    weight, term = stored.weight, stored.low_rank()
    assert term is not None
    # the kernels read B along D
    B = term.B.detach().to(weight.dtype).t().contiguous().t()
    part = ServedWeight(pmkernels.widen_weight(weight, term.A), term.G.detach().contiguous(), B)
    for attribute in LEARNED:
        module._parameters.pop(part_name(name, attribute), None)
    # the plain weight goes, and what reads it finds it in the wide one
    module._parameters[name] = nn.Parameter(part.weight, requires_grad=False)
    for attribute, value in (("wide", part.wide), ("G", part.G), ("B", part.B)):
        module.register_buffer(part_name(name, f"served_{attribute}"), value, persistent=False)
    return part
