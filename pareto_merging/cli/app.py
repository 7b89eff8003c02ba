"""The command line. Every command says what it does with --help; a mistake is one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape

# torch and open_clip take seconds to import: only commands that compute load them
if TYPE_CHECKING:
    from torch import Tensor

    from pareto_merging.measure.evaluation import Scores

app = typer.Typer(
    name="pareto-merging",
    help=(
        "Merge K fine-tuned models into one Pareto set: learned once, without labels, it gives the best merged model "
        "for any preference.\n\nStart with `pareto-merging demo`; then write a CONFIG.yaml, look at `plan`, and run "
        "`train`, `evaluate`, `export`; `compare` says which of the merging methods suits your models."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PREFERENCES_HELP = (
    "`0.5,0.5;0.9,0.1`, `TASK=0.7` (the rest is shared out), `equal`, `one-hot` (each task alone), `priority` (0.5 "
    "on each task in turn), `grid:11` (two tasks: 11 in equal steps), `lattice:7` (all multiples of 1/7), "
    "`energy:30` (30 spread out evenly), `dirichlet:30` (30 at random)"
)


def _path(text: str | Path) -> Path:
    # --out=~/x reaches us as it is
    return Path(os.path.expanduser(text))


OutFolder = Annotated[
    Path, typer.Option("--out", parser=_path, metavar="PATH", help="The run folder to make; it must not exist yet.")
]
ConfigFile = Annotated[
    Path,
    typer.Argument(
        parser=_path,
        metavar="CONFIG.yaml",
        help="`suite: digits`, or `encoder:` and `tasks:` with checkpoints, heads and images; `method:` sets the rest.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(parser=_path, metavar="RUN", help="A finished run folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def demo(
    out: OutFolder = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that it runs, not what it can do.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the merging.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Merge eight fine-tuned vision transformers (embedded, real handwritten digits) in about a minute and a half.

    Compares Pareto Merging with weight averaging, task arithmetic and
    AdaMerging; learns a two-task Pareto set and draws its front. Writes
    report.json, front.png, pareto_set.safetensors and index.html.
    """
    from pareto_merging.run.demo import run_demo

    run_demo(out, overwrite=overwrite, quick=quick, seed=seed, progress=not quiet)


def _yaml_help() -> str:
    """Every key of CONFIG.yaml with its meaning, choices and default, for --help."""
    from pareto_merging.learn.settings import MethodSettings
    from pareto_merging.run.config import EncoderConfig, RunConfig, TaskConfig

    parts = []
    groups: dict[str, Any] = {
        "Keys of CONFIG.yaml": RunConfig,
        "Keys of `encoder:`": EncoderConfig,
        "Keys of each task under `tasks:`": TaskConfig,
        "Keys of `method:`, all optional": MethodSettings,
    }
    for title, group in groups.items():
        parts.append(f"{title}.")
        for name, field in group.model_fields.items():
            if field.description is None:
                continue
            choices = ", ".join(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ""
            has_default = not field.is_required() and field.default is not None
            default = f" (default {field.default})" if has_default else " (required)" if field.is_required() else ""
            parts.append(f"{name}: {field.description}{f' [{choices}]' if choices else ''}{default}")
    return "\n\n".join(map(escape, parts))


@app.command(epilog=_yaml_help())
def train(
    config: ConfigFile,
    out: OutFolder,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in that folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Learn the Pareto set that CONFIG.yaml describes.

    Ctrl-C stops after the step in hand; the same command with --resume runs
    the remaining steps and gives the bits an uninterrupted run would have
    given.
    """
    from pareto_merging.errors import Interrupted
    from pareto_merging.run.config import read_config
    from pareto_merging.run.folder import SET_NAME, describe_precision, train_run

    settings = read_config(config)
    try:
        model, result = train_run(settings, out, resume=resume, progress=not quiet, on_warning=_warn)
    except Interrupted as stop:
        again = shlex.join(["pareto-merging", "train", str(config), "--out", str(out), "--resume"])
        print(f"pareto-merging: {stop}; go on with: {again}", file=sys.stderr)
        _explained.append(stop)
        raise typer.Exit(130) from stop
    has_images = settings.suite is not None or any(
        task.evaluation is not None for task in (settings.tasks.values() if isinstance(settings.tasks, dict) else ())
    )
    after = f"evaluate {shlex.quote(str(out))}" if has_images else f"export {shlex.quote(str(out))} --preference equal"
    print(describe_precision(model))
    done = f"{result.steps} steps" + (f", {result.resumed_from} of them before" if result.resumed_from else "")
    print(f"{out / SET_NAME}: learned in {done}; {result.seconds:.1f} s. Next: pareto-merging {after}")


@app.command()
def evaluate(
    run: RunFolder,
    preferences: Annotated[
        str,
        typer.Option(
            help=f"Preferences apart by semicolons: {PREFERENCES_HELP}.",
        ),
    ] = "equal;one-hot",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")] = False,
    quiet: Quiet = False,
) -> None:
    """Accuracy and entropy of a learned Pareto set on the held-out images, per task and preference."""
    from pareto_merging.errors import user_errors
    from pareto_merging.measure.evaluation import evaluate_preferences
    from pareto_merging.measure.metrics import indicators
    from pareto_merging.measure.reports import write_evaluation
    from pareto_merging.preferences import parse_preferences
    from pareto_merging.run.folder import open_run
    from pareto_merging.system.files import write_json

    workspace, model = open_run(run)
    with user_errors():
        gammas = parse_preferences(preferences, workspace.task_names)
    tasks = workspace.evaluation_tasks()
    left_out = [name for name in workspace.task_names if name not in tasks]
    if left_out:
        _warn(f"no evaluation images for {', '.join(left_out)}: left out")
    scores = evaluate_preferences(
        model, tasks, gammas, workers=workspace.config.workers, progress=not quiet and not as_json
    )
    report: dict[str, Any] = {
        "run": str(run),
        "tasks": workspace.task_names,
        "results": [
            {"gamma": [round(v, 6) for v in gamma.tolist()], **score.to_json()}
            for gamma, score in zip(gammas, scores, strict=True)
        ],
    }
    points = [list(score.accuracy.values()) for score in scores]
    wanted = [gamma.tolist() for gamma in gammas] if not left_out else None
    report["indicators"] = indicators(points, workspace.chance(list(tasks)), wanted)
    if as_json:
        print(json.dumps(report))
    else:
        _print_scores(list(tasks), gammas, scores)
    write_json(run / "evaluation.json", report)
    rows = [(g.tolist(), score.accuracy, score.entropy) for g, score in zip(gammas, scores, strict=True)]
    pictures = write_evaluation(run, workspace.task_names, list(tasks), rows)
    if not as_json:
        written = ["evaluation.json", "evaluation.csv", "evaluation.md", *(path.name for path in pictures)]
        print(f"{run}: {', '.join(written)}")


def _methods_help() -> str:
    """Every method of `compare`, for --help."""
    from pareto_merging.methods.registry import METHODS

    needs = {"weights": "", "images": " (needs unlabelled images)", "labels": " (needs labelled training images)"}
    lines = [f"{name}: {method.title}{needs[method.needs]}" for name, method in METHODS.items()]
    return escape("Methods:") + "\n\n" + "\n\n".join(map(escape, lines))


@app.command(epilog=_methods_help())
def compare(
    config: ConfigFile,
    out: OutFolder,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods apart by commas, `all`, or `all` and some to leave out: `all,-fisher`. Default: all, without "
            "adamerging-preference (a run for each preference) beyond two tasks."
        ),
    ] = None,
    effort: Annotated[
        int,
        typer.Option(min=1, max=4, help="Settings that each method may try, chosen without labels; 1: the published."),
    ] = 4,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds, from the configuration's on.")] = 1,
    preferences: Annotated[
        str | None,
        typer.Option(
            help=f"The grid of preferences beside equal, priority and one-hot: {PREFERENCES_HELP}. Default: grid:11 "
            "for two tasks, lattice:7 for three, dirichlet:30 for more."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted comparison there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")] = False,
    quiet: Quiet = False,
) -> None:
    """Which merging method for your models? Every method on those of CONFIG.yaml, in one table and one picture.

    Each method is tuned without labels and measured on the held-out images:
    at the equal preference, for each task in turn, and on a grid of
    preferences. A method that needs images which a task does not have is left
    out, and it is said why. Ctrl-C keeps what is done; the same command with
    --resume goes on. Writes compare.md, compare.json, methods.csv, points.csv
    and pictures.
    """
    from pareto_merging.errors import Interrupted
    from pareto_merging.measure.reports import EXPLANATION, head, summary_rows
    from pareto_merging.run.config import read_config
    from pareto_merging.run.folder import compare_run
    from pareto_merging.system.tables import print_table

    settings = read_config(config)
    try:
        report = compare_run(
            settings,
            out,
            methods=methods,
            effort=effort,
            seeds=seeds,
            grid=preferences,
            resume=resume,
            progress=not quiet,
        )
    except (Interrupted, KeyboardInterrupt) as stop:
        arguments = ["pareto-merging", "compare", str(config), "--out", str(out), "--resume"]
        for name, value, default in (
            ("--methods", methods, None),
            ("--effort", effort, 4),
            ("--seeds", seeds, 1),
            ("--preferences", preferences, None),
        ):
            arguments += [] if value == default else [name, str(value)]
        what = str(stop) or "stopped"
        print(f"pareto-merging: {what}; go on with: {shlex.join(arguments)}", file=sys.stderr)
        _explained.append(stop)
        raise typer.Exit(130) from stop
    if as_json:
        print(json.dumps(report))
    else:
        print_table(f"{config}: held-out images", head(), summary_rows(report["methods"]), left=(0, 1, 2))
        print("\n".join([EXPLANATION, "", *report["answer"], str(out / "compare.md")]))
    left_out = [name for name in report["tasks"] if name not in report["evaluated_tasks"]]
    if left_out:
        _warn(f"no evaluation images for {', '.join(left_out)}: left out")
    failed = [entry for entry in report["methods"].values() if entry.get("failed")]
    for entry in failed:
        print(f"pareto-merging: {entry['title']} failed: {'; '.join(entry['reasons'])}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
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
        Path, typer.Argument(parser=_path, metavar="OUT.safetensors", help="The file to write; it must not exist yet.")
    ],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"], typer.Option(help="Of the numbers written.")
    ] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the vision encoder (or zero-shot head) of any public checkpoint as one plain safetensors file.

    Pickles are read as data: nothing in them is imported or run, and one that
    names what could run code is refused. The file remembers how to build the
    encoder, QuickGELU, how images are normalised, and a checksum of every
    tensor. `train` takes all of these formats itself: converting is for
    checkpoints that are read often, or handed on.
    """
    from pareto_merging.checkpoints.convert import DTYPES, convert_checkpoint, say
    from pareto_merging.run.export import check_file

    check_file(out, overwrite)
    found = convert_checkpoint(source, out, dtype=DTYPES.get(dtype), progress=not quiet and not as_json)
    print(json.dumps(found) if as_json else say(found))


@app.command()
def export(
    run: RunFolder,
    preference: Annotated[
        str | None,
        typer.Option(
            "--preference",
            "--preferences",
            help=f"A plain merged model for one preference, or for each of several: {PREFERENCES_HELP}.",
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
            parser=_path,
            metavar="PATH",
            help="What to write: a .safetensors file, or a folder (of a format, or of several preferences); it must "
            "not exist yet. Default: in RUN.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write plain merged models for chosen preferences, or the folded model for all of them.

    A model card goes with each plain model. Several preferences become a
    folder with one entry each, and preferences.json says which is which.
    """
    from pareto_merging.errors import UserError
    from pareto_merging.run.export import default_target, export_folded, export_merged

    if (preference is None) == (not folded):
        raise UserError("export: expected either --preference or --folded")
    if folded:
        if format != "safetensors" or text_from is not None:
            raise UserError("export: expected --format and --text-from with --preference, got them with --folded")
        print(export_folded(run, out or run / "folded.safetensors", overwrite=overwrite))
        return
    target = out or default_target(run, str(preference), format)
    written = export_merged(
        run,
        str(preference),
        target,
        format=format,
        text_from=text_from,
        overwrite=overwrite,
        progress=not quiet,
    )
    print("\n".join(map(str, written)))


@app.command()
def plan(
    config: ConfigFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")] = False,
) -> None:
    """Count parameters and bytes by kind, before anything is loaded.

    It says in which dtype every checkpoint is stored, and what rounding
    the task vectors to the dtype of the run costs: the relative error of
    Σλτ. For that a 16-bit run's checkpoints are read, tensor by tensor;
    otherwise headers are.
    """
    from pareto_merging.run.config import read_config
    from pareto_merging.run.plan import plan_run
    from pareto_merging.run.workspace import Workspace
    from pareto_merging.system.tables import print_table

    workspace = Workspace(read_config(config))
    rows = plan_run(workspace, progress=not as_json)
    if as_json:
        print(json.dumps([{key: value for key, value in vars(row).items() if value is not None} for row in rows]))
        return
    steps = workspace.config.method.steps_for(len(workspace.task_names))
    title = f"{config}: {len(workspace.task_names)} tasks, {steps} steps, {workspace.device}"
    counted = [[row.kind, f"{row.parameters:,}", f"{row.bytes / 2**20:,.2f}", row.note] for row in rows]
    print_table(title, ["kind", "numbers", "MiB", "note"], counted, left=(0, 3))


def _limit(name: str) -> Any:
    """The option of one limit of `serve`, described as the limit is."""
    from pareto_merging.serving.limits import Limits

    text = str(Limits.model_fields[name].description)
    return typer.Option(help=f"{text[0].upper()}{text[1:]}.", rich_help_panel="Limits")


@app.command()
def serve(
    folded: Annotated[
        Path,
        typer.Argument(metavar="FOLDED", help="A folded file: `pareto-merging export RUN --folded` writes one."),
    ],
    host: Annotated[
        str, typer.Option(help="The address to bind. There is no authentication: leave it, or put a proxy in front.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to bind; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: what the file holds.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads of the model. Default: PyTorch's.")
    ] = None,
    keep_merged: Annotated[
        bool,
        typer.Option(
            "--keep-merged/--no-keep-merged",
            help="Keep merged weights for a preference that comes again: as fast as the plain model, for a third of a "
            "ViT more in memory.",
        ),
    ] = True,
    max_batch: Annotated[int, _limit("max_batch")] = 128,
    wait: Annotated[float, _limit("wait")] = 2.0,
    queue: Annotated[int, _limit("queue")] = 256,
    request_bytes: Annotated[int, _limit("request_bytes")] = 12 * 2**20,
    image_bytes: Annotated[int, _limit("image_bytes")] = 8 * 2**20,
    pixels: Annotated[int, _limit("pixels")] = 25_000_000,
    side: Annotated[int, _limit("side")] = 10_000,
    aspect: Annotated[float, _limit("aspect")] = 100.0,
    formats: Annotated[str, _limit("formats")] = "PNG,JPEG,WEBP,BMP,PPM",
    decoders: Annotated[int, _limit("decoders")] = 4,
    upload: Annotated[float, _limit("upload")] = 20.0,
    idle: Annotated[float, _limit("idle")] = 75.0,
    shutdown: Annotated[int, _limit("shutdown")] = 30,
    quiet: Quiet = False,
) -> None:
    """Serve a folded model over HTTP: every request chooses its own merged model by a preference.

    POST /classify and /embed take an image and a preference, as JSON or as a
    form; /docs tries them out in a browser, /model names tasks and limits,
    /health and /metrics (Prometheus) are for machines. Requests of different
    preferences are computed in one batch. SIGTERM or Ctrl-C answers what was
    accepted and exits.
    """
    from pareto_merging.errors import UserError
    from pareto_merging.serving.limits import make_limits

    limits = make_limits(
        {
            "max_batch": max_batch,
            "wait": wait,
            "queue": queue,
            "request_bytes": request_bytes,
            "image_bytes": image_bytes,
            "pixels": pixels,
            "side": side,
            "aspect": aspect,
            "formats": tuple(formats.split(",")),
            "decoders": decoders,
            "upload": upload,
            "idle": idle,
            "shutdown": shutdown,
        }
    )
    try:
        from pareto_merging.serving.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pareto_merging":
            raise
        raise UserError(
            f"serve: expected the serve extra (pip install 'pareto-merging[serve]'), got no module named {error.name}"
        ) from error
    lost = run(
        folded,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        limits=limits,
        threads=threads,
        keep_merged=keep_merged,
        progress=not quiet,
        on_warning=_warn,
    )
    if lost:
        print(
            f"pareto-merging: {lost} accepted requests were not answered within --shutdown {shutdown}", file=sys.stderr
        )
        raise typer.Exit(1)


def _print_scores(names: Sequence[str], gammas: Sequence[Tensor], scores: Sequence[Scores]) -> None:
    from pareto_merging.preferences import format_preference
    from pareto_merging.system.tables import print_table

    rows = [
        [format_preference(gamma.tolist()), *(f"{score.accuracy[name]:.1f}" for name in names), f"{score.average:.1f}"]
        for gamma, score in zip(gammas, scores, strict=True)
    ]
    print_table("accuracy in percent (held-out images)", ["preference", *names, "average"], rows)


# an interrupt that was answered with how to go on
_explained: list[BaseException] = []


def _warn(text: str) -> None:
    print(f"pareto-merging: warning: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (training or a compared method failed), 2 (a mistake), 130 (Ctrl-C)."""
    from pareto_merging.errors import Interrupted, TrainingError, UserError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show γ shows a question mark
            stream.reconfigure(errors="replace")
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="pareto-merging", standalone_mode=False)
        if code == 130 and not _explained:
            print("pareto-merging: interrupted before there was anything to keep", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as stop:
        print(f"pareto-merging: {stop}; nothing was kept", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        _exit(error, 2)
    except TrainingError as error:
        _exit(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        print("pareto-merging: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit(error, 2)
    except (MemoryError, RuntimeError) as error:
        # torch says it is out of memory in a RuntimeError, on the CPU only by its text
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print("pareto-merging: out of memory; `pareto-merging plan` counts what a run needs", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # typer's own usage errors; its exception classes are not public
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        if text:
            print(f"pareto-merging: {text} (see --help)", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _exit(error: Exception, code: int) -> None:
    print(f"pareto-merging: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
