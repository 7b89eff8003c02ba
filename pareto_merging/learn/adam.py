"""Adam over all learned parameters as two long vectors, and gradients as such vectors.

There are hundreds of small ones; the two groups, λ and the rest, may differ in their rate.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pareto_merging.learn.settings import OptimiserSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of them."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def flattened(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Return gradients as one tensor [P], zero for None. Its dtype is the widest of the parameters'."""
    pairs = list(zip(gradients, parameters, strict=True))
    absent = max((parameter.numel() for gradient, parameter in pairs if gradient is None), default=0)
    zeros = torch.zeros(absent, dtype=widest(parameters), device=parameters[0].device)
    return torch.cat([zeros[: p.numel()] if g is None else g.reshape(-1).to(zeros) for g, p in pairs])


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return d value / d parameters as one tensor [P]. Its dtype is their widest; what has no part in it is zero."""
    if not value.requires_grad:
        size = sum(parameter.numel() for parameter in parameters)
        return torch.zeros(size, dtype=widest(parameters), device=parameters[0].device)
    return flattened(torch.autograd.grad(value, list(parameters), allow_unused=True), parameters)


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a long vector in the shapes of the tensors ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class Adam:
    """The long vectors, Adam's state, and the ways to the parameters ``learned``. λ (``lam.…``) comes first."""

    def __init__(self, learned: Mapping[str, nn.Parameter], settings: OptimiserSettings) -> None:
        self.learned, self.parameters = dict(learned), list(learned.values())
        self.device, self._dtype = self.parameters[0].device, widest(self.parameters)
        rates = {True: settings.lambda_learning_rate or settings.learning_rate, False: settings.learning_rate}
        groups = {kind: [name for name in learned if name.startswith("lam.") == kind] for kind in rates}
        groups = {kind: names for kind, names in groups.items() if names}
        self._groups = list(groups.values())
        self.vectors = [nn.Parameter(self._gathered(learned, names)) for names in self._groups]
        self._rates = [rates[kind] for kind in groups]
        moved = [{"params": [vector], "lr": rate} for vector, rate in zip(self.vectors, self._rates, strict=True)]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(moved, lr=settings.learning_rate, betas=settings.betas, fused=fused)

    def _gathered(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Return the tensors of these names as one long vector."""
        return torch.cat([tensors[name].detach().reshape(-1).to(self.device, self._dtype) for name in names])

    def places(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return views, by parameter name, of the long vectors or of moments laid out alike."""
        return {
            name: place
            for vector, names in zip(vectors, self._groups, strict=True)
            for name, place in zip(names, pieces(vector.detach(), [self.learned[name] for name in names]), strict=True)
        }

    def step(self, gradient: Tensor, share: float = 1.0) -> None:
        """Move the long vectors by the flat gradient [P], at this share of the rates."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        for vector, part in zip(self.vectors, gradient.split([v.numel() for v in self.vectors]), strict=True):
            vector.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad()

    def scatter(self) -> None:
        """Copy the long vectors' values to the model's parameters."""
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), list(self.places(self.vectors).values()))

    def state(self) -> list[Tensor]:
        """Return the long vectors and, once Adam has stepped, its moments."""
        stepped = [vector for vector in self.vectors if vector in self.optimizer.state]
        moments = [self.optimizer.state[vector][key] for vector in stepped for key in MOMENTS]
        return [vector.detach() for vector in self.vectors] + moments

    def put_back(self, before: Sequence[Tensor]) -> None:
        """Undo the last step, given copies of :meth:`state` from before it."""
        now = self.state()
        for tensor, value in zip(now, before, strict=False):
            tensor.copy_(value)
        if len(before) < len(now):
            # it was the first: there were no moments
            self.optimizer.state.clear()
        else:
            for state in self.optimizer.state.values():
                state["step"] -= 1

    def moments(self) -> dict[str, Tensor]:
        """Return Adam's moments as ``exp_avg.<parameter>`` and ``exp_avg_sq.<parameter>``; none before a step."""
        return {
            f"{key}.{name}": moment
            for key in (MOMENTS if self.optimizer.state else ())
            for name, moment in self.places([self.optimizer.state[vector][key] for vector in self.vectors]).items()
        }

    @torch.no_grad()
    def load(self, step: int, moments: Mapping[str, Tensor]) -> None:
        """Take over the parameters as they are now. After a first step also moments named as in :meth:`moments`."""
        for vector, names in zip(self.vectors, self._groups, strict=True):
            vector.copy_(self._gathered(self.learned, names))
            if step:
                self.optimizer.state[vector] = {
                    "step": torch.tensor(float(step), dtype=torch.float32, device=vector.device),
                    **{key: self._gathered(moments, [f"{key}.{name}" for name in names]) for key in MOMENTS},
                }
