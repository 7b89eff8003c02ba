"""``pareto-merging demo``."""

from pathlib import Path
from typing import Annotated

import typer

from pareto_merging.cli import options


def demo(
    out: options.OutFolder = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that it runs, not what it can do.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the merging.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Merge eight fine-tuned vision transformers (embedded, handwritten digits) in about a minute and a half.

    Compares Pareto Merging with weight averaging, task arithmetic and
    AdaMerging; learns a two-task Pareto set and draws its front. Writes
    report.json, front.png, pareto_set.safetensors and index.html.
    """
    from pareto_merging.run.demo import run_demo

    run_demo(out, overwrite=overwrite, quick=quick, seed=seed, progress=not quiet)
