"""What every method returns, whatever it is: a plain model for any preference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pareto_merging.model.copies import Weights
from pareto_merging.preferences import Preference, check_preference, equal_preference


@dataclass
class Merged:
    """A method's result.

    Attributes:
        task_names: of the K tasks, in the order of a preference's entries.
        at: γ [K] -> a plain module of the pretrained class. A method that finds one model gives that model for every γ.
        preference_aware: whether the model depends on γ.
        facts: what the method found beside the weights (learned λ, thresholds, runs): plain JSON.
        pareto: the Pareto model behind it, where there is one, for :func:`save_pareto_set`, :func:`fold` and the rest.
    """

    task_names: tuple[str, ...]
    at: Callable[[Tensor], nn.Module]
    preference_aware: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    pareto: nn.Module | None = None

    def model(self, gamma: Preference | None = None) -> nn.Module:
        """The plain model at one preference ([K], or by task name), by default the equal one.

        Raises:
            ValueError: not a preference (see :func:`check_preference`).
        """
        if gamma is None:
            return self.at(equal_preference(len(self.task_names)))
        return self.at(check_preference(gamma, self.task_names, per_item=False))


def task_names(finetuned: Sequence[Weights] | Mapping[str, Weights]) -> tuple[str, ...]:
    """The tasks' names as :func:`parametrize` gives them: the keys, or ``task_1`` … ``task_K``."""
    if isinstance(finetuned, Mapping):
        return tuple(finetuned)
    return tuple(f"task_{k + 1}" for k in range(len(finetuned)))


def one_model(model: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights], **facts: Any) -> Merged:
    """The result of a method that finds one model."""
    return Merged(task_names(finetuned), lambda gamma: model, facts=facts)
