"""What all layers of one Pareto model share, and the preference it is set to."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.model.cache import MergedWeights
from pareto_merging.preferences import Preference, check_preference


@dataclass
class Computation:
    """How a Pareto model is computed now, as train() and eval() are.

    ``gamma`` is the current preference, [K], or [batch, K] for a preference per item. Nothing here is in a state_dict.
    """

    gamma: Tensor
    # how pmkernels computes the layers
    strategy: str = "auto"
    # bytes that kept merged weights may take, where the strategy keeps any
    memory_budget: int | None = None
    # λ is used clamped to this range; set while AdaMerging's clamp is trained through
    lambda_range: tuple[float, float] | None = None
    # merged weights kept between calls, where the strategy or a training run wants that
    cache: MergedWeights | None = None
    # what a training step has put together for all layers at once, by the identity of W0: merged vectors, and A·C(γ)
    vectors: dict[int, Tensor] | None = None
    factors: dict[int, Tensor] | None = None

    @property
    def kernel_strategy(self) -> str:
        """Return what pmkernels is told: keeping merged weights is the model's own business."""
        return "auto" if self.strategy == "cached" else self.strategy

    @contextlib.contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Change some of it inside the block."""
        before = {name: getattr(self, name) for name in changes}
        self.__dict__.update(changes)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def __getstate__(self) -> dict[str, Any]:
        # a preference may carry a graph, which can be neither copied nor pickled
        return {**self.__dict__, "gamma": self.gamma.detach(), "vectors": None, "factors": None}


@dataclass(slots=True)
class ParetoState:
    """The tasks of a Pareto model and how it was built, shared by its layers. ``now`` is how it is computed.

    ``start`` is what W0 is: the ``"pretrained"`` weights, or what a merge made of them (:mod:`.base`), whose digest is
    ``base_digest`` then; ``start_facts`` say how that went.

    ``core`` is how γ becomes the r×r core of the low-rank term (:func:`.cores.preference_core`),
    ``rounding_error`` ‖Σλ(round(τ) − τ)‖ / ‖Σλτ‖ where every λ is the same. ``digests`` and ``stored_dtypes`` are of
    the pretrained weights and of each task.
    """

    task_names: tuple[str, ...]
    now: Computation
    settings: dict[str, Any] = field(default_factory=dict)
    folded: bool = False
    core: str = "tensor"
    digests: dict[str, str] = field(default_factory=dict)
    stored_dtypes: dict[str, str] = field(default_factory=dict)
    rounding_error: float = 0.0
    start: str = "pretrained"
    base_digest: str = ""
    start_facts: dict[str, Any] = field(default_factory=dict)


def pareto_states(model: nn.Module) -> list[ParetoState]:
    """List the distinct Pareto models inside ``model``. It may be one itself, or contain some."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    states = {id(state): state for module in model.modules() if (state := module.__dict__.get("pareto")) is not None}
    return list(states.values())


def pareto_state(model: nn.Module) -> ParetoState:
    """Return the state of the one Pareto model in ``model``. ValueError if there is none or more than one."""
    states = pareto_states(model)
    if len(states) != 1:
        kind = type(model).__name__
        raise ValueError(f"model: expected one Pareto model (made by parametrize or fold), got {len(states)} in {kind}")
    return states[0]


def set_preference(model: nn.Module, gamma: Preference) -> None:
    """Give every layer of a Pareto (or folded) model the preference ``gamma``.

    Args:
        model: a Pareto model, or a module that contains some of the same tasks.
        gamma: ``[K]`` for everything; ``[batch, K]``, where item i of the batch gets the model of preference i; or by
            task name, ``{"MNIST": 0.6}``: what is left to 1 is shared out equally among the other tasks. A tensor that
            requires a gradient keeps it.

    Raises ValueError for no Pareto model, or no preference: see :func:`check_preference`.
    """
    states = pareto_states(model)
    if not states:
        raise ValueError(f"model: expected a Pareto model (made by parametrize or fold), got {type(model).__name__}")
    checked = [check_preference(gamma, state.task_names) for state in states]
    for state, value in zip(states, checked, strict=True):
        # replaced, never written into: an earlier forward may still need the old value in its backward; copied,
        # because the caller may write into theirs
        value = value.to(state.now.gamma.device)
        if not value.requires_grad:
            # a tensor made in inference mode could not be used in training afterwards
            with torch.inference_mode(False):
                value = value.clone()
        state.now.gamma = value


def get_preference(model: nn.Module) -> dict[str, float] | list[dict[str, float]]:
    """Return the current preference by task name. One such dictionary per item where it is set per item."""
    state = pareto_state(model)
    gammas = torch.atleast_2d(state.now.gamma.detach()).tolist()
    rows = [dict(zip(state.task_names, gamma, strict=True)) for gamma in gammas]
    return rows[0] if state.now.gamma.ndim == 1 else rows


@contextlib.contextmanager
def preference(model: nn.Module, gamma: Preference) -> Iterator[nn.Module]:
    """Set the preference inside a ``with`` block. The former one is restored, also on an exception.

    The preference belongs to the model, not to the thread: threads that share a model want a preference per item, or a
    model each. With gradient checkpointing the backward computes the forward again, so run it inside the block too.
    """
    before = [(state, state.now.gamma) for state in pareto_states(model)]
    set_preference(model, gamma)
    try:
        yield model
    finally:
        for state, value in before:
            # the model may have moved inside the block
            state.now.gamma = value.to(state.now.gamma.device)
