"""The commands that have no file of their own: ``demo``, ``evaluate``, ``convert``, ``export`` and ``plan``."""

import json
from pathlib import Path
from typing import Annotated, Literal

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


def evaluate(
    run: options.RunFolder,
    preferences: Annotated[
        str, typer.Option(help=f"Preferences apart by semicolons: {options.PREFERENCES_HELP}.")
    ] = "equal;one-hot",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a learned Pareto set's accuracy and entropy on held-out images, per task and preference."""
    from pareto_merging.errors import user_errors
    from pareto_merging.measure.evaluation import evaluate_preferences
    from pareto_merging.measure.metrics import indicators
    from pareto_merging.measure.reports import Evaluation, write_evaluation
    from pareto_merging.preferences import format_preference, parse_preferences
    from pareto_merging.run.folder import open_run
    from pareto_merging.system.tables import print_table

    workspace, model = open_run(run)
    with user_errors():
        gammas = parse_preferences(preferences, workspace.task_names)
    tasks = workspace.evaluation_tasks()
    left_out = [name for name in workspace.task_names if name not in tasks]
    options.warn_of_left_out(left_out)
    progress = not quiet and not as_json
    scores = evaluate_preferences(model, tasks, gammas, workers=workspace.workers, progress=progress)
    rows = [gamma.tolist() for gamma in gammas]
    points = [list(score.accuracy.values()) for score in scores]
    indicated = indicators(points, workspace.chance(list(tasks)), None if left_out else rows)
    evaluation = Evaluation(str(run), workspace.task_names, rows, scores, indicated)
    if as_json:
        print(json.dumps(evaluation.to_json()))
    else:
        table = [
            [format_preference(row), *(f"{value:.1f}" for value in point), f"{score.average:.1f}"]
            for row, point, score in zip(rows, points, scores, strict=True)
        ]
        columns = ["preference", *evaluation.evaluated_tasks, "average"]
        print_table("accuracy in percent (held-out images)", columns, table)
    written = write_evaluation(run, evaluation)
    if not as_json:
        print(f"{run}: {', '.join(path.name for path in written)}")


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


def plan(config: options.ConfigFile, as_json: options.AsJson = False) -> None:
    """Count parameters and bytes by kind, before anything is loaded.

    It says in which dtype every checkpoint is stored, and what rounding
    the task vectors to the dtype of the run costs: the relative error of
    Σλτ. For that a 16-bit run's checkpoints are read, tensor by tensor;
    otherwise headers are.
    """
    from pareto_merging.run.config import read_config
    from pareto_merging.run.folder import SET_NAME
    from pareto_merging.run.plan import plan_run
    from pareto_merging.run.workspace import Workspace
    from pareto_merging.system.tables import print_table

    workspace = Workspace(read_config(config, learned=(config.parent / SET_NAME).exists()))
    rows = plan_run(workspace, progress=not as_json)
    if as_json:
        print(json.dumps([{key: value for key, value in vars(row).items() if value is not None} for row in rows]))
        return
    steps = workspace.config.method.steps_for(len(workspace.task_names))
    title = f"{config}: {len(workspace.task_names)} tasks, {steps} steps, {workspace.device}"
    counted = [[row.kind, f"{row.parameters:,}", f"{row.bytes / 2**20:,.2f}", row.note] for row in rows]
    print_table(title, ["kind", "numbers", "MiB", "note"], counted, left=(0, 3))
