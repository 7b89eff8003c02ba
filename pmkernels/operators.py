"""The making of the operators ``torch.ops.pmkernels.*``.

An operation lives in one file: its public function with the checks, its eager form, and an operator that launches what
a strategy of :mod:`pmkernels.strategies` has for it. With fakes ``torch.compile`` sees through a call without running
it; ``needs_input_grad`` reaches the backward operators as a list, so nothing is computed that nobody asked for.
Operators cannot return an optional tensor: a gradient that was not asked for is an empty placeholder. Arguments are
checked by the public functions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pmkernels.autocast import without_autocast

# of an operator's schema: what W(γ) is made of
LEARNED = "Tensor? task_vectors, Tensor? lam, Tensor? A, Tensor? G, Tensor? B, Tensor? gamma, Tensor? A_c, Tensor? B_c"
PARTS = f"Tensor weight, {LEARNED}"
# name -> operator, of every operator there is
OPERATORS: dict[str, Any] = {}

Fake = Callable[..., Any]


def operator(name: str, schema: str, *, fake: Fake, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator ``pmkernels::name``, which works on the device of its first argument.

    ``fake`` makes its results without computing them.
    """

    def make(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def there(first: Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *rest)

        made = torch.library.custom_op(f"pmkernels::{name}", there, mutates_args=mutates, schema=schema)
        made.register_fake(fake)
        OPERATORS[name] = made
        return made

    return make


def differentiable(
    made: Any, *, keep: Callable[[Any, tuple[Any, ...], Any], Sequence[Tensor | None]]
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function(ctx, gradient, …) the backward of an operator.

    ``keep``(ctx, inputs, output) gives the tensors that it needs; of several outputs the first alone has a gradient. A
    strategy is the last of the inputs, and is ``ctx.strategy`` there.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        if isinstance(inputs[-1], str):
            ctx.strategy = inputs[-1]
        ctx.save_for_backward(*keep(ctx, inputs, output))

    def register(backward: Callable[..., Any]) -> Any:
        made.register_autograd(without_autocast(backward), setup_context=save)
        return backward

    return register


def in_order(
    gradients: Mapping[str, Tensor], placeholder: Tensor, tensors: Mapping[str, Tensor | None]
) -> list[Tensor]:
    """Return gradients in the order and dtypes of ``tensors``, empty where there is none."""
    return [
        gradients[name].to(tensor.dtype) if tensor is not None and name in gradients else placeholder.new_empty(0)
        for name, tensor in tensors.items()
    ]


def fakes(needs: Sequence[bool], tensors: Sequence[Tensor | None], placeholder: Tensor) -> list[Tensor]:
    """Return fakes of the gradients asked for: contiguous, like their tensors."""
    return [
        placeholder.new_empty(0) if not need or tensor is None else contiguous_like(tensor)
        for need, tensor in zip(needs, tensors, strict=True)
    ]


def contiguous_like(tensor: Tensor, *_: Any) -> Tensor:
    """Return a fake of its shape, dtype and device, contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return None in the place of every gradient that was not asked for."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
