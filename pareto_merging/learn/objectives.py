"""The table of objectives: what S_k, the objective of task k, is for a run.

An objective is chosen by its name in the settings. A new one is a file with a class that follows :class:`Objective`,
and a line in this table; from outside, :func:`register` adds it. Nothing here loads PyTorch, so that the command line
can list the names at once.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pareto_merging.system.register import add_member

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pareto_merging.data.tasks import Task


class TaskTerms(NamedTuple):
    """S_k of one batch, and what the log says beside it. Scalars; ``watched`` is in the order of ``watches``."""

    objective: Tensor
    watched: tuple[Tensor, ...] = ()


class Objective(Protocol):
    """The objectives S_1 … S_K of one run.

    A subclass overrides what it has use for: an objective on images has ``terms``; one on the weights alone has
    ``values``.

    Attributes:
        watches: the names of what the log says of each task beside S_k.
        has_targets: whether ``terms`` is given ``targets``, what a teacher says of each image, say.
    """

    watches: tuple[str, ...] = ()
    has_targets: bool = False

    def targets(self, task: int, indices: Sequence[int]) -> Tensor:
        """Return what is wanted of these images of task k. [n, *], on any device."""
        raise _lacking(self, "targets")

    def targets_of(self, task: int, indices: Sequence[int], images: Tensor) -> Tensor:
        """Return what is wanted of the images [n, …] in hand, [n, *]. By default that of their numbers."""
        return self.targets(task, indices)

    def outputs(self, features: Tensor, head: nn.Module) -> Any:
        """Return what ``terms`` looks at, by default the logits of the features [n, D]."""
        return head(features)

    def terms(self, task: int, outputs: Any, targets: Tensor | None) -> TaskTerms:
        """Return S_k of a batch's outputs, differentiable in them. Nothing may wait for the device."""
        raise _lacking(self, "terms")

    def values(self, gamma: Tensor) -> Tensor:
        """Return S_1 … S_K [K] at gamma [K], differentiable in what is learned."""
        raise _lacking(self, "values")


def _lacking(objective: Objective, method: str) -> TypeError:
    return TypeError(f"objective: expected a method {method} in {type(objective).__name__}, got none")


@dataclass(frozen=True)
class ObjectiveKind:
    """One line of the table.

    Attributes:
        name: what the setting ``objective`` says.
        make: (model, tasks, settings) -> the :class:`Objective` of one run; ``module:function`` is imported when it is
            first called. The model is a Pareto model, tasks a mapping by task name in the model's order (empty where
            none are given), settings a :class:`MethodSettings`. It may run them: they are in eval mode.
        needs: unlabelled ``"images"`` and a head of every task, images without a head (``"features"``), or the
            ``"weights"`` alone.
        has_teachers: whether every task must have a ``teacher``; the fine-tuned models are, where none is given.
    """

    name: str
    make: str | Callable[[nn.Module, Mapping[str, Task], Any], Objective]
    needs: Literal["images", "features", "weights"] = "images"
    has_teachers: bool = False

    def __call__(self, model: nn.Module, tasks: Mapping[str, Task], settings: Any) -> Objective:
        """Return the objective of one run."""
        make = pkgutil.resolve_name(self.make) if isinstance(self.make, str) else self.make
        made: Objective = make(model, tasks, settings)
        return made


OBJECTIVES: dict[str, ObjectiveKind] = {}


def register(kind: ObjectiveKind, *, replace: bool = False) -> ObjectiveKind:
    """Add an objective to the table. ValueError as :func:`.register.add_member`, or for ``needs`` of another kind."""
    if kind.needs not in ("images", "features", "weights"):
        raise ValueError(f"objective: expected needs to be images, features or weights, got {kind.needs!r}")
    return add_member(OBJECTIVES, "objective", kind.name, kind, replace=replace)


register(ObjectiveKind("entropy", "pareto_merging.learn.entropy:Entropy"))
register(ObjectiveKind("distillation", "pareto_merging.learn.distillation:Distillation", has_teachers=True))
register(
    ObjectiveKind("features", "pareto_merging.learn.distillation:Distillation", needs="features", has_teachers=True)
)
register(ObjectiveKind("weight-distance", "pareto_merging.learn.weight_distance:make", needs="weights"))
