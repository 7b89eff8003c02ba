"""The command line. Importing it loads neither PyTorch nor what computes: only a command that runs does."""

from pareto_merging.cli.app import main

__all__ = ["main"]
