"""Merged weights kept while everything they are made of stands still: strategy ``cached``.

Whether a kept tensor is still right is never left to anybody's memory. Each carries a stamp of what it was made of: the
identity, the place in memory and autograd's version counter of W0, τ, λ, A, G, B and γ, and the number of optimiser
steps taken in this process, because fused optimisers change parameters without counting versions. A stamp that differs
means another merge. What no stamp can see is a write through ``.data`` or by a replayed CUDA graph: after one of those,
``set_strategy`` starts anew.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)

Parts = Sequence[Tensor | None]
Merge = Callable[[Tensor | None], Tensor]


def stampable(parts: Parts) -> bool:
    """Tell if the tensors' changes can be seen. Those made in inference mode count no versions, fakes have no place."""
    return not torch.compiler.is_compiling() and not any(
        t is not None and (t.is_inference() or t.is_meta or type(t) not in (Tensor, torch.nn.Parameter)) for t in parts
    )


class _Kept:
    """One merged tensor and its stamp. What it is made of is kept alive: no other tensor can get its identity."""

    def __init__(self, parts: Parts, settings: tuple[Any, ...], merge: Merge, out: Tensor | None) -> None:
        self.parts, self.settings, self._merge = parts, settings, merge
        self.merge_again(out)

    def merge_again(self, out: Tensor | None) -> None:
        # a tensor made in inference mode could not be used in training afterwards
        with torch.inference_mode(False), torch.no_grad():
            self.value = self._merge(out).detach()
        self.stamp, self.version = self._stamp(self.settings), self.value._version

    def _stamp(self, settings: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return another one once what it is made of may have changed."""
        parts = (None if t is None else (id(t), t.data_ptr(), t._version) for t in self.parts)
        return (_optimizer_steps, *settings, *parts)

    def is_valid(self, settings: tuple[Any, ...]) -> bool:
        return self.stamp == self._stamp(settings) and self.value._version == self.version


class MergedWeights:
    """Merged tensors by the identity of their W0.

    ``budget``: bytes that they may take in all; what does not fit is not kept. None: no limit. ``in_place``: write a
    new merge over the old one, as a captured CUDA graph wants. Only for one who knows that no backward still needs the
    old; PyTorch raises an error otherwise.
    """

    def __init__(self, budget: int | None = None, in_place: bool = False) -> None:
        self.budget, self.in_place = budget, in_place
        self.bytes = 0
        self._kept: dict[Any, _Kept] = {}
        # which tensor's merge a layer used last: a weight that was replaced leaves nothing behind
        self._used: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # what is kept belongs to tensors, of which a copy has its own
        return MergedWeights, (self.budget, self.in_place)

    def get(
        self, user: Any, key: Any, parts: Parts, settings: tuple[Any, ...], size: int, merge: Merge
    ) -> Tensor | None:
        """Return the merged tensor of ``parts``, of ``size`` bytes. ``merge`` makes it if none is up to date.

        ``key`` is the identity of the weight and ``user`` that of the layer: tied layers share what one weight makes.
        None where the budget has no room for it, or changes of its parts could not be seen.
        """
        if not stampable(parts):
            return None
        before = self._used.get(user, key)
        self._used[user] = key
        if before != key and before not in self._used.values() and (old := self._kept.pop(before, None)) is not None:
            self.bytes -= old.value.nbytes
        kept = self._kept.get(key)
        if kept is not None and kept.is_valid(settings) and all(map(operator.is_, kept.parts, parts)):
            return kept.value
        if kept is None:
            if self.budget is not None and self.bytes + size > self.budget:
                return None
            self.bytes += size
        fresh = _Kept(parts, settings, merge, None if kept is None or not self.in_place else kept.value)
        self._kept[key] = fresh
        return fresh.value

    def refresh(self, force: bool = False) -> None:
        """Merge again what is out of date, or everything. Later calls find it ready."""
        for kept in self._kept.values():
            if force or not kept.is_valid(kept.settings):
                kept.merge_again(kept.value if self.in_place else None)

    def clear(self) -> None:
        """Forget, and free, what is kept."""
        self._kept.clear()
        self._used.clear()
        self.bytes = 0
