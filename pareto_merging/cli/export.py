"""``pareto-merging export``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pareto_merging.cli import options


def export(
    run: options.RunFolder,
    preference: Annotated[
        str | None,
        typer.Option(
            "--preference",
            "--preferences",
            help=f"A plain merged model for one preference, or for each of several: {options.PREFERENCES_HELP}.",
        ),
    ] = None,
    folded: Annotated[
        bool, typer.Option("--folded", help="One self-sufficient file for a server, for every preference.")
    ] = False,
    format: Annotated[
        Literal["safetensors", "open_clip", "huggingface"],
        typer.Option(
            help="safetensors: the vision encoder, one file; open_clip, huggingface: a folder that open_clip or "
            "transformers loads by itself, a whole CLIP where there is a text tower."
        ),
    ] = "safetensors",
    text_from: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint whose text tower goes with it. Default: the pretrained one's, if it has one."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=options.expanded_path,
            metavar="PATH",
            help="What to write: a .safetensors file, or a folder (of a format, or of several preferences); it must "
            "not exist yet. Default: in RUN.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write plain merged models for chosen preferences, or the folded model for all of them.

    A model card goes with each plain model. Several preferences become a
    folder with one entry each, and preferences.json says which is which.
    """
    from pareto_merging.errors import UserError
    from pareto_merging.run.export import export_folded, export_merged

    if (preference is None) == (not folded):
        raise UserError("export: expected either --preference or --folded")
    if preference is not None:
        written = export_merged(
            run, preference, out, format=format, text_from=text_from, overwrite=overwrite, progress=not quiet
        )
        print("\n".join(map(str, written)))
    elif format != "safetensors" or text_from is not None:
        raise UserError("export: expected --format and --text-from with --preference, got them with --folded")
    else:
        print(export_folded(run, out or run / "folded.safetensors", overwrite=overwrite))
