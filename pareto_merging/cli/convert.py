"""``pareto-merging convert``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pareto_merging.cli import options


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A file (.safetensors, .pt, .bin, TorchScript), a folder (Hugging Face, open_clip), a hub id "
            "(openai/clip-vit-base-patch32, owner/name@revision) or open_clip:NAME/TAG.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            parser=options.expanded_path, metavar="OUT.safetensors", help="The file to write; it must not exist yet."
        ),
    ],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"], typer.Option(help="Of the numbers written.")
    ] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the vision encoder (or zero-shot head) of a public checkpoint as one safetensors file.

    Pickles are read as data: nothing in them is imported or run, and one that
    names what could run code is refused. The file remembers how to build the
    encoder, QuickGELU, how images are normalised, and a checksum of every
    tensor. `train` takes all of these formats itself: converting is for
    checkpoints that are read often, or handed on.
    """
    from pareto_merging.checkpoints.convert import DTYPES, convert_checkpoint, say
    from pareto_merging.run.export import check_file

    check_file(out, overwrite)
    converted = convert_checkpoint(source, out, dtype=DTYPES.get(dtype), progress=not quiet and not as_json)
    print(json.dumps(converted) if as_json else say(converted))
