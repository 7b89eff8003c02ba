"""Serving a folded model: :class:`Engine` computes, :mod:`pareto_merging.serving.http` puts it on the network.

The engine needs no web server; the ``serve`` extra installs one.
"""

from pareto_merging.serving.engine import Engine

__all__ = ["Engine"]
