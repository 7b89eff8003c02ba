"""Serving a folded model: :class:`Engine` computes, :mod:`pareto_merging.serving.http` puts it on the network.

The engine needs no web server (the ``serve`` extra) and is imported when asked for: the limits need no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pareto_merging.serving.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pareto_merging.serving.engine import Engine

    return Engine
