"""What several commands share: arguments, options, warnings, and how one is stopped."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

PREFERENCES_HELP = (
    "`0.5,0.5;0.9,0.1`, `TASK=0.7` (the rest is shared out), `equal`, `one-hot` (each task alone), `priority` (0.5 "
    "on each task in turn), `grid:11` (two tasks: 11 in equal steps), `lattice:7` (all multiples of 1/7), "
    "`energy:30` (30 spread out evenly), `dirichlet:30` (30 at random)"
)


def expanded_path(text: str | Path) -> Path:
    """Return a path with the user's home written out, as ``--out=~/x`` reaches us."""
    return Path(os.path.expanduser(text))


OutFolder = Annotated[
    Path,
    typer.Option("--out", parser=expanded_path, metavar="PATH", help="The run folder to make; it must not exist yet."),
]
ConfigFile = Annotated[
    Path,
    typer.Argument(
        parser=expanded_path,
        metavar="CONFIG.yaml",
        help="`suite: digits`, or `encoder:` and `tasks:` with checkpoints, heads and images; `method:` sets the rest.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(parser=expanded_path, metavar="RUN", help="A finished run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


class Stopped(Exception):
    """An interrupted command whose message says how to go on. Exit code 130."""


def tell(text: str) -> None:
    """Write one line of ours to standard error."""
    print(f"pareto-merging: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """Write a warning to standard error."""
    tell(f"warning: {text}")


def warn_of_left_out(tasks: list[str]) -> None:
    """Warn of the tasks without evaluation images, if there are any."""
    if tasks:
        warn(f"no evaluation images for {', '.join(tasks)}: left out")
