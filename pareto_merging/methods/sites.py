"""What is solved by least squares: linear maps and norms, and the sums for each."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.methods.chains import Batch, Piece, Reached, Residual, Weights, hidden_of
from pareto_merging.methods.linear_maps import LinearMaps, Rows


@dataclass(frozen=True)
class Site:
    """A linear map, or a norm's weight and bias, by their names.

    Attributes:
        rows: of the weight. bias: None where there is none of the model's own. uses: how often a forward uses it.
    """

    rows: Rows
    bias: str | None
    uses: int = 1
    is_norm: bool = False


def find_sites(piece: Piece, weights: Weights, batch: Batch, chain: str) -> list[Site]:
    """Return the sites of a piece in the order of their first use."""
    finder = _Finder({name: weights[name] for name in piece.names.values()})
    with finder:
        piece(weights, batch, chain)
    linear = {site.rows.name for site in finder.sites.values() if not site.rows.right}
    return [site for site in finder.sites.values() if not site.rows.right or site.rows.name not in linear]


class _Finder(LinearMaps):
    def __init__(self, parameters: Weights) -> None:
        super().__init__(parameters)
        self.sites: dict[Rows, Site] = {}

    def use(self, rows: Rows, x: Tensor, bias: Tensor | None, output: Callable[[], Tensor]) -> None:
        self._add(rows, bias, is_norm=False)

    def use_norm(self, name: str, x: Tensor, bias: Tensor | None, normalised: Callable[[], Tensor]) -> None:
        self._add(Rows(name, 0, x.shape[-1], False), bias, is_norm=True)

    def _add(self, rows: Rows, bias: Tensor | None, is_norm: bool) -> None:
        uses = self.sites[rows].uses + 1 if rows in self.sites else 1
        self.sites[rows] = Site(rows, self.names.get(id(bias)), uses, is_norm)


class _Catcher(LinearMaps):
    """A mode that keeps inputs and outputs of a site, and may stop after it."""

    def __init__(self, weights: Weights, site: Site, *, stop: bool, outputs: bool) -> None:
        super().__init__({site.rows.name: weights[site.rows.name]})
        self.site, self.stop, self.wants_outputs = site, stop, outputs
        self.weight = weights[site.rows.name]
        self.bias: Tensor | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def use(self, rows: Rows, x: Tensor, bias: Tensor | None, output: Callable[[], Tensor]) -> None:
        if rows == self.site.rows:
            self.bias = bias
            self._keep(x, output)

    def use_norm(self, name: str, x: Tensor, bias: Tensor | None, normalised: Callable[[], Tensor]) -> None:
        def output() -> Tensor:
            result = normalised() * self.weight
            return result if bias is None else result + bias

        if self.site.is_norm:
            self.bias = bias
            self._keep(normalised(), output)

    def _keep(self, x: Tensor, output: Callable[[], Tensor]) -> None:
        self.inputs.append(x)
        if self.wants_outputs:
            self.outputs.append(output())
        if self.stop and len(self.inputs) == self.site.uses:
            raise Reached


@contextlib.contextmanager
def _stream_at(model: nn.Module, name: str, keep: Callable[[Tensor], None], *, at_output: bool) -> Iterator[None]:
    """Give ``keep`` the input (or output) of a module whenever it runs."""
    module = model.get_submodule(name)
    if at_output:
        hook = module.register_forward_hook(lambda module, args, output: keep(hidden_of(output)))
    else:
        hook = module.register_forward_pre_hook(lambda module, args: keep(args[0]))
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        yield


class Inputs(NamedTuple):
    """What comes into a site: x [*, D] per use.

    And the stream before it, where it writes into one, and its bias."""

    uses: list[Tensor]
    before: Tensor | None
    bias: Tensor | None


def merged_inputs(
    model: nn.Module, piece: Piece, site: Site, weights: Weights, batch: Batch, chain: str, residual: Residual | None
) -> Inputs:
    """Return what comes into a site of a merged model. The forward is stopped after it."""
    streams: list[Tensor] = []
    catcher = _Catcher(weights, site, stop=True, outputs=False)
    with contextlib.ExitStack() as stack:
        if residual is not None:
            stack.enter_context(_stream_at(model, residual.before, streams.append, at_output=False))
        stack.enter_context(contextlib.suppress(Reached))
        stack.enter_context(catcher)
        piece(weights, batch, chain)
    return Inputs(catcher.inputs, streams[0] if streams else None, catcher.bias)


def expert_outputs(
    model: nn.Module, piece: Piece, site: Site, weights: Weights, batch: Batch, residual: Residual | None
) -> list[Tensor]:
    """Return a fine-tuned model's outputs [*, N] of a site. Or the stream after it."""
    if residual is None:
        catcher = _Catcher(weights, site, stop=True, outputs=True)
        with contextlib.suppress(Reached), catcher:
            piece(weights, batch, "expert")
        return catcher.outputs
    streams: list[Tensor] = []

    def keep(stream: Tensor) -> None:
        streams.append(stream)
        raise Reached

    with (
        contextlib.suppress(Reached),
        _stream_at(model, residual.after, keep, at_output=residual.at_output),
    ):
        piece(weights, batch, "expert")
    return streams


@dataclass
class Sums:
    """XᵀX [D, D] and EᵀX [N, D] over rows of X and E, in float64."""

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, outputs: int, inputs: int, device: torch.device) -> "Sums":
        """Start at zero."""
        zeros = (torch.zeros(rows, inputs, dtype=torch.float64, device=device) for rows in (inputs, outputs))
        return cls(*zeros)

    def add(self, X: Tensor, E: Tensor, weight: Tensor | None) -> None:
        """Add rows X [M, D] and E [M, N], of ``weight`` [M, 1]."""
        weighted = X if weight is None else X * weight
        self.gram += weighted.t() @ X
        self.cross += E.t() @ weighted

    def __iadd__(self, other: "Sums") -> "Sums":
        self.gram += other.gram
        self.cross += other.cross
        return self

    def copy(self) -> "Sums":
        """Return sums of its own."""
        return Sums(self.gram.clone(), self.cross.clone())

    @property
    def is_finite(self) -> bool:
        """Tell if nothing but finite numbers came in."""
        return bool(torch.isfinite(self.gram).all()) and bool(torch.isfinite(self.cross).all())

    def without(self, change: Tensor) -> None:
        """Take E − X·changeᵀ for E."""
        self.cross -= change @ self.gram

    def damped(self, ridge: float, columns: int) -> tuple[Tensor, Tensor]:
        """Return XᵀX + ρI and EᵀX of the first columns. ρ is ``ridge`` of the mean diagonal."""
        gram = self.gram[:columns, :columns].clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        return gram, self.cross[:, :columns]


class NormSums:
    """What regression of y = x·w + b by channel needs.

    The sums of 1, x, x², e and x·e, [5, D] in float64.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.sums = torch.zeros(5, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, e: Tensor, weight: Tensor | None) -> None:
        """Add rows x [M, D] and e [M, D], of ``weight`` [M, 1]."""
        one = torch.ones_like(x[:, :1]) if weight is None else weight
        terms = (one.expand_as(x), one * x, one * x * x, one * e, one * x * e)
        self.sums += torch.stack([term.sum(dim=0, dtype=torch.float64) for term in terms])

    def __iadd__(self, other: "NormSums") -> "NormSums":
        self.sums += other.sums
        return self

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return the change of w and of b, [D] each. ``ridge`` is relative to the mean of the squares."""
        count, x, square, e, product = self.sums
        damping = ridge * (square.mean() + count.mean()) / 2
        count, square = count + damping, square + damping
        determinant = square * count - x * x
        return (product * count - e * x) / determinant, (e * square - product * x) / determinant

    @property
    def is_finite(self) -> bool:
        """Tell if nothing but finite numbers came in."""
        return bool(torch.isfinite(self.sums).all())


def rows_of(tensor: Tensor) -> Tensor:
    """Return [*, D] as rows [M, D], in float32 or wider."""
    return tensor.reshape(-1, tensor.shape[-1]).to(torch.promote_types(tensor.dtype, torch.float32))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, is_norm: bool) -> Tensor:
    """Compute x·weightᵀ + bias, or of a norm x·weight + bias."""
    if not is_norm:
        return F.linear(x, weight, bias)
    return x * weight if bias is None else x * weight + bias
