"""The base of a Pareto model: its frozen weights W0, pretrained or of another merge."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pareto_merging.model.digests import TensorDigest
from pareto_merging.model.learned import set_lambda
from pareto_merging.model.parameters import merged_parameters
from pareto_merging.model.state import pareto_state


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights of a Pareto model by their names in the plain module. Tied ones come once."""
    added = set()
    for parameter in merged_parameters(model):
        added |= {id(tensor) for tensor in parameter.parts().values() if tensor is not None}
    return {name: p.detach() for name, p in model.named_parameters() if id(p) not in added and p.is_floating_point()}


def set_base(model: nn.Module, base: Mapping[str, Tensor], start: str) -> None:
    """Replace a Pareto model's frozen weights by a merged model's; set λ to 0.

    W(γ) then begins at the merged model, and λ says how far learning moves along the task vectors from there.

    Args:
        base: by the parameters' names in the plain module; others than those named stay as they are.
        start: what made it, as the setting ``start`` names it.

    Raises:
        ValueError: a folded model, names that the model does not have, other shapes, or numbers that are not finite.
    """
    check_base(model, base)
    own = base_tensors(model)
    with torch.no_grad():
        for name, tensor in base.items():
            own[name].copy_(tensor)
    set_lambda(model, torch.zeros(()))
    note_base(model, start)


def check_base(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what :func:`set_base` does not take; nothing is written."""
    state, own = pareto_state(model), base_tensors(model)
    if state.folded:
        raise ValueError("model: expected a Pareto model with task vectors, got a folded one")
    for name, tensor in base.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = f"a parameter of shape {list(own[name].shape)}" if name in own else "a parameter of the model"
            raise ValueError(f"base: expected {expected}, got {name} {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor.to(own[name].dtype)).all()):
            raise ValueError(f"base: expected finite numbers in {name} in {own[name].dtype}, got NaN or inf")


def note_base(model: nn.Module, start: str) -> None:
    """Note what made the base of a Pareto model, and its digest."""
    state = pareto_state(model)
    state.start, state.base_digest = start, base_digest(base_tensors(model))


def base_digest(base: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a base, by the names in the plain module."""
    digest = TensorDigest()
    for name, tensor in base.items():
        digest.add(name, tensor)
    return digest.hexdigest()
