"""Merged weights kept while everything they are made of stands still: strategy ``cached``.

Whether a kept tensor is still right is never left to anybody's memory. Each carries a stamp of what it was made of: the
identity, the place in memory and autograd's version counter of W0, τ, λ, A, G, B and γ, and the number of optimiser
steps taken in this process, because fused optimisers change parameters without counting versions. A stamp that differs
means another merge. What no stamp can see is a write through ``.data`` or by a replayed CUDA graph: after one of those,
``set_strategy`` starts anew.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)

Stamp = tuple[Any, ...]


def stamp(parts: Mapping[str, Tensor | None], *settings: Any) -> Stamp:
    """Stamp ``parts``: another stamp means that one may have changed. The tensors have to be kept alive."""
    return (
        _optimizer_steps,
        *settings,
        *(None if t is None else (id(t), t.data_ptr(), t._version) for t in parts.values()),
    )


def stampable(*tensors: Tensor | None) -> bool:
    """Tell if the tensors' changes can be seen. Those made in inference mode count no versions, fakes have no place."""
    return not torch.compiler.is_compiling() and not any(
        t is not None and (t.is_inference() or t.is_meta or type(t) not in (Tensor, torch.nn.Parameter))
        for t in tensors
    )


class _Kept:
    """One merged tensor and its stamp. What it is made of is kept alive: no other tensor can get its identity."""

    def __init__(
        self,
        parts: dict[str, Tensor | None],
        settings: tuple[Any, ...],
        merge: Callable[[Tensor | None], Tensor],
        out: Tensor | None,
    ) -> None:
        self.parts, self.settings, self._merge = parts, settings, merge
        self.merge_again(out)

    def merge_again(self, out: Tensor | None) -> None:
        # a tensor made in inference mode could not be used in training afterwards
        with torch.inference_mode(False), torch.no_grad():
            self.value = self._merge(out).detach()
        self.stamp = stamp(self.parts, *self.settings)
        self.version = self.value._version

    def is_valid(self, settings: tuple[Any, ...]) -> bool:
        return self.stamp == stamp(self.parts, *settings) and self.value._version == self.version

    def holds(self, parts: Mapping[str, Tensor | None]) -> bool:
        return all(self.parts[name] is part for name, part in parts.items())


class MergedWeights:
    """Merged tensors by the identity of their W0.

    Args:
        budget: bytes that they may take in all; what does not fit is not kept. None: no limit.
        in_place: write a new merge over the old one, as a captured CUDA graph wants. Only for one who knows that no
            backward still needs the old; PyTorch raises an error otherwise.
    """

    def __init__(self, budget: int | None = None, in_place: bool = False) -> None:
        self.budget, self.in_place = budget, in_place
        self.bytes = 0
        self._kept: dict[Any, _Kept] = {}
        # which tensor's merge a layer used last: a weight that was replaced leaves nothing behind
        self._used: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # what is kept belongs to tensors, of which a copy has its own
        return {"budget": self.budget, "in_place": self.in_place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(
        self,
        user: Any,
        key: Any,
        parts: dict[str, Tensor | None],
        settings: tuple[Any, ...],
        like: Tensor,
        dtype: torch.dtype,
        merge: Callable[[Tensor | None], Tensor],
    ) -> Tensor | None:
        """Return the merged tensor of ``parts``. ``merge`` makes it (into a tensor, or a new one) if there is none or
        an old one.

        ``key`` is the identity of the weight and ``user`` that of the layer: tied layers share what one weight makes.
        None where the budget has no room for it, or changes of its parts could not be seen.
        """
        if not stampable(*parts.values()):
            return None
        before = self._used.get(user, key)
        self._used[user] = key
        if before != key and before not in self._used.values():
            self._drop(before)
        kept = self._kept.get(key)
        if kept is not None and kept.is_valid(settings) and kept.holds(parts):
            return kept.value
        size = like.numel() * torch.empty(0, dtype=dtype).element_size()
        if kept is None and self.budget is not None and self.bytes + size > self.budget:
            return None
        if kept is None:
            self.bytes += size
        fresh = _Kept(dict(parts), settings, merge, None if kept is None or not self.in_place else kept.value)
        self._kept[key] = fresh
        return fresh.value

    def refresh(self, force: bool = False) -> None:
        """Merge again what is out of date, or everything. Later calls find it ready."""
        for kept in self._kept.values():
            if force or not kept.is_valid(kept.settings):
                kept.merge_again(kept.value if self.in_place else None)

    def _drop(self, key: Any) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.bytes -= kept.value.numel() * kept.value.element_size()

    def clear(self) -> None:
        """Forget, and free, what is kept."""
        self._kept.clear()
        self._used.clear()
        self.bytes = 0
