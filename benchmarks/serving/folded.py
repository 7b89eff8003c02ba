"""A folded vision tower, requests to it, and copies with other projections."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmkernels
from benchmarks.common.towers import RANK, TASKS
from pareto_merging import ParetoAttention, fold, save_folded
from pareto_merging.checkpoints import encoders
from pareto_merging.model.layer import ParetoModule, pareto_modules
from pareto_merging.model.parametrize import parametrize

# sets of preferences that calls take in turn, so that none comes twice in a row
SETS = 4


@dataclass(frozen=True)
class Request:
    """A batch's preferences, float32: P distinct ones [P, K], and each item's [n, K].

    Both are on the host, where requests arrive, and on the device, where most variants want them.
    """

    distinct: Tensor
    each: Tensor
    distinct_on_device: Tensor
    each_on_device: Tensor

    @classmethod
    def make(cls, distinct: Tensor, items: int, device: torch.device) -> "Request":
        """Give item i of ``items`` preference i mod P of ``distinct`` [P, K]."""
        each = distinct[torch.arange(items) % len(distinct)]
        return cls(distinct, each, distinct.to(device), each.to(device))


@dataclass(frozen=True)
class Case:
    """One folded tower on a device, in the type that serves, and its file."""

    name: str
    folded: nn.Module
    file: Path
    dtype: torch.dtype
    device: torch.device


def build_case(
    name: str, encoder: Mapping[str, Any], folder: Path, dtype: torch.dtype, device: torch.device, share: float = 0.3
) -> Case:
    """Return a random folded tower with low-rank terms. Their norm is about ``share`` of each projection's, for one
    task alone.

    λ is folded, so nothing is left of the K fine-tuned copies, and none is made.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = encoders.build(encoder)
        for parameter in plain.parameters():
            if not bool(parameter.any()):
                # a bias that is zero hides that it is missing
                nn.init.normal_(parameter, std=0.05)
    # there at once: eight differences of a large model take long on a CPU
    plain = plain.to(device, dtype)
    weights = plain.state_dict()
    copies = {f"task_{k + 1}": weights for k in range(TASKS)}
    folded = fold(parametrize(plain, copies, rank=RANK, low_rank="attention", digests=False)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in Projection.all_of(folded):
            part.G.copy_(torch.randn(part.G.shape, generator=generator))
            term = part.A @ part.G[:, :, 0] @ part.B.t()
            part.G.mul_(share * part.weight.float().norm() / term.norm())
    file = folder / f"{name.lower().replace('/', '-').replace(' ', '-')}.safetensors"
    save_folded(folded, file, encoder=encoder)
    return Case(name, folded, file, dtype, device)


def preferences(count: int) -> Tensor:
    """Return sets of ``count`` preferences drawn uniformly from the simplex, float32 [SETS, count, K]."""
    drawn = torch.empty(SETS, count, TASKS).exponential_(generator=torch.Generator().manual_seed(2))
    return drawn / drawn.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Projection:
    """A folded projection. Weight [N, D], bias [N]; in float32 A [N, R], G [R, R, K] and B [D, R]."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    G: Tensor
    B: Tensor

    @classmethod
    def of(cls, module: ParetoModule, name: str) -> "Projection":
        """Return parameter ``name`` of a folded layer."""
        bias = module._parameters[name.replace("weight", "bias")]
        stored = module.pareto_parameter(name)
        term = stored.low_rank()
        assert term is not None
        return cls(stored.weight.detach(), None if bias is None else bias.detach(), *(t.detach() for t in term))

    @classmethod
    def all_of(cls, folded: nn.Module) -> "list[Projection]":
        """Return all projections of a folded tower."""
        return [cls.of(module, name) for _, module in pareto_modules(folded) for name in module.pareto_names]

    def merged(self, gamma: Tensor, out: Tensor | None = None) -> Tensor:
        """Return W(γ) [N, D] in the type of the weight."""
        return pmkernels.merge_weight(self.weight, A=self.A, G=self.G, B=self.B, gamma=gamma, out=out)


class LinearAttention(nn.Module):
    """Self-attention of two projections, called as open_clip calls nn.MultiheadAttention."""

    def __init__(self, in_proj: nn.Module, out_proj: nn.Module, heads: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.heads = in_proj, out_proj, heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend: [n, tokens, E] -> [n, tokens, E]; key and value are the query."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(query).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def tower(folded: nn.Module, make: Callable[[Projection], nn.Module]) -> nn.Module:
    """Return the folded tower with what ``make`` makes of each projection in its place. Other weights are shared."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in folded.state_dict(keep_vars=True).values()}
    built = copy.deepcopy(folded, memo)
    # its preference is nobody's here
    built.__dict__.pop("pareto", None)
    for parent in list(built.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ParetoAttention):
                out = child.out_proj
                assert isinstance(out, ParetoModule)
                in_proj, out_proj = Projection.of(child, "in_proj_weight"), Projection.of(out, "weight")
                setattr(parent, name, LinearAttention(make(in_proj), make(out_proj), child.num_heads))
    return built.eval()


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make an nn.Linear of these very tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
