"""Parsers of the commands."""

import argparse
from typing import Any


def command_parser(command: str, description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """Return the parser of ``python -m COMMAND``, whose help has its texts as they are written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"python -m {command}", description=description, formatter_class=raw, **settings
    )
