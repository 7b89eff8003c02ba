"""Parsers of the commands."""

import argparse
from typing import Any


def command_parser(command: str, description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """Return the parser of ``python -m COMMAND``, whose help has its texts as they are written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {command}", description=description, formatter_class=raw, **settings
    )


def sizes(text: str) -> tuple[int, int] | None:
    """Read two whole numbers from 1 on, as in ``3072x1024``. None where that is something else."""
    n, _, d = text.partition("x")
    return (int(n), int(d)) if n.isdecimal() and d.isdecimal() and int(n) and int(d) else None
