"""``pareto-merging compare``."""

import inspect
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from pareto_merging.cli import options

Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods apart by commas, `all`, or `all` and some to leave out: `all,-fisher`. Default: all, without "
        "adamerging-preference (a run for each preference) beyond two tasks."
    ),
]


def _list_methods(wanted: bool) -> None:
    """Print every method with what it needs and what must be kept, and exit."""
    if wanted:
        from pareto_merging.methods.registry import METHODS
        from pareto_merging.system.tables import print_table

        rows = [[key, method.title, method.needs, method.stores] for key, method in METHODS.items()]
        print_table(
            "Needs: weights, unlabelled images or labels. Keeps: to answer any preference.",
            ["name", "title", "needs", "keeps"],
            rows,
            left=(0, 1, 2, 3),
        )
        raise typer.Exit


ListMethods = Annotated[
    bool,
    typer.Option(
        "--list", is_eager=True, callback=_list_methods, help="List the methods, with what each needs, and exit."
    ),
]
Effort = Annotated[
    int, typer.Option(min=1, max=4, help="Settings that each method may try, chosen without labels; 1: the published.")
]
Grid = Annotated[
    str | None,
    typer.Option(
        help=f"The grid of preferences beside equal, priority and one-hot: {options.PREFERENCES_HELP}. Default: "
        "grid:11 for two tasks, lattice:7 for three, dirichlet:30 for more."
    ),
]


def compare(
    config: options.ConfigFile,
    out: options.OutFolder,
    methods: Methods = None,
    list_methods: ListMethods = False,
    effort: Effort = 4,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds, from the configuration's on.")] = 1,
    preferences: Grid = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted comparison there.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare merging methods on the models of CONFIG.yaml, in one table and one picture.

    Each method is tuned without labels and measured on the held-out images:
    at the equal preference, for each task in turn, and on a grid of
    preferences. A method that needs images which a task does not have is left
    out, and it is said why. Ctrl-C keeps what is done; the same command with
    --resume goes on. Writes compare.md, compare.json, methods.csv, points.csv
    and pictures.
    """
    from pareto_merging.errors import Interrupted
    from pareto_merging.measure.reports import EXPLANATION, head, summary_rows
    from pareto_merging.run.compare import compare_run
    from pareto_merging.run.config import read_config
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
        again = _again(config, out, methods=methods, effort=effort, seeds=seeds, preferences=preferences)
        raise options.Stopped(f"{str(stop) or 'stopped'}; go on with: {again}") from stop
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        print_table(f"{config}: held-out images", head(), summary_rows(report.methods), left=(0, 1, 2))
        print("\n".join([EXPLANATION, "", *report.answer, str(out / "compare.md")]))
    options.warn_of_left_out([name for name in report.tasks if name not in report.evaluated_tasks])
    failed = [entry for entry in report.methods.values() if entry.failed]
    for entry in failed:
        options.tell(f"{entry.title} failed: {'; '.join(entry.reasons)}")
    if failed:
        raise typer.Exit(1)


def _again(config: Path, out: Path, **given: object) -> str:
    """Return the command that goes on with a stopped comparison."""
    arguments = ["pareto-merging", "compare", str(config), "--out", str(out), "--resume"]
    parameters = inspect.signature(compare).parameters
    for name, value in given.items():
        arguments += [] if value == parameters[name].default else [f"--{name}", str(value)]
    return shlex.join(arguments)
