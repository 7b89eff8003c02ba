"""The fine-tuned models themselves, one at a time: teachers of a merged model."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pareto_merging.model.copies import Weights, check_copies, names_in, read_tensor
from pareto_merging.model.fold import expert, merge
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import equal_preference
from pareto_merging.system.modes import eval_mode


class Expert:
    """A fine-tuned model as a function of its inputs, without gradients.

    Several share one module, into which each loads its weights, rounded to the module's dtype, when it is called.
    """

    def __init__(
        self, task: str, module: nn.Module, tensors: Sequence[tuple[list[str], Tensor]], weights: Weights
    ) -> None:
        self.task, self.module, self._tensors, self._weights = task, module, tensors, weights

    @torch.no_grad()
    def load(self) -> nn.Module:
        """Return the module with this model's weights."""
        weights = self._weights
        assert not isinstance(weights, nn.Module)
        for names, tensor in self._tensors:
            tensor.copy_(read_tensor(weights, names_in(names, weights)[0], self.task, tensor))
        return self.module

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        with eval_mode(self.load()):
            outputs: Tensor = self.module(inputs)
        return outputs


def experts(module: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> dict[str, Expert]:
    """Return the fine-tuned models by task name. ``module`` is a plain one of their class, and is written into.

    Raises ValueError and TypeError as :func:`parametrize` for copies that are not of that module.
    """
    copies, tensors = check_copies(module, finetuned)
    return {task: Expert(task, module, tensors, weights) for task, weights in copies.items()}


def experts_of(
    model: nn.Module,
    finetuned: Sequence[Weights] | Mapping[str, Weights] | None,
    tasks: Collection[str] | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield each task of a Pareto model with its fine-tuned model, as a plain module. One is in memory at a time.

    ``tasks``: those wanted, by default all. ``finetuned``: the copies, as they were given to :func:`parametrize`. None:
    W0 + τ_k; ValueError where that is not the fine-tuned model, because the task vectors were preprocessed, W0 is
    another base, or there are buffers with numbers of their own.
    """
    state = pareto_state(model)
    if finetuned is not None:
        for task, one in named_experts(model, finetuned).items():
            if tasks is None or task in tasks:
                yield task, one.load()
        return
    reason = None
    if state.folded:
        reason = "a folded model has no task vectors"
    elif state.start != "pretrained":
        reason = f"its base is that of start {state.start}"
    elif state.settings.get("preprocess", "none") != "none":
        reason = "its task vectors were preprocessed"
    elif any(buffer.is_floating_point() for buffer in model.buffers()):
        reason = "it has buffers, which differ between the fine-tuned models"
    if reason is not None:
        raise ValueError(
            f"finetuned: expected the fine-tuned copies, which the model does not hold ({reason}), got none"
        )
    for number, task in enumerate(state.task_names):
        if tasks is None or task in tasks:
            yield task, expert(model, number)


def named_experts(model: nn.Module, finetuned: Sequence[Weights] | Mapping[str, Weights]) -> dict[str, Expert]:
    """Return the fine-tuned models of a Pareto model's tasks, by name and in its order. ValueError for other tasks."""
    names = pareto_state(model).task_names
    if isinstance(finetuned, Mapping):
        if lacking := [name for name in names if name not in finetuned]:
            raise ValueError(f"finetuned: expected a copy for every task, got none for {', '.join(lacking)}")
        finetuned = {name: finetuned[name] for name in names}
    elif len(finetuned) != len(names):
        raise ValueError(f"finetuned: expected {len(names)} copies ({', '.join(names)}), got {len(finetuned)}")
    else:
        finetuned = dict(zip(names, finetuned, strict=True))
    return experts(merge(model, equal_preference(len(names))), finetuned)
