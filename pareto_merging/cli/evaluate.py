"""``pareto-merging evaluate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pareto_merging.cli.options import PREFERENCES_HELP, AsJson, Quiet, RunFolder, warn_of_left_out

if TYPE_CHECKING:
    from pareto_merging.measure.reports import Evaluation


def evaluate(
    run: RunFolder,
    preferences: Annotated[
        str, typer.Option(help=f"Preferences apart by semicolons: {PREFERENCES_HELP}.")
    ] = "equal;one-hot",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a learned Pareto set's accuracy and entropy on held-out images, per task and preference."""
    from pareto_merging.measure.reports import write_evaluation
    from pareto_merging.run.evaluate import evaluate_run

    progress = not quiet and not as_json
    evaluation = evaluate_run(run, preferences, progress=progress, on_left_out=warn_of_left_out)
    if as_json:
        print(json.dumps(evaluation.to_json()))
    else:
        _print_scores(evaluation)
    written = write_evaluation(run, evaluation)
    if not as_json:
        print(f"{run}: {', '.join(path.name for path in written)}")


def _print_scores(evaluation: Evaluation) -> None:
    from pareto_merging.preferences import format_preference
    from pareto_merging.system.tables import print_table

    rows = [
        [format_preference(gamma), *(f"{value:.1f}" for value in scores.accuracy.values()), f"{scores.average:.1f}"]
        for gamma, scores in zip(evaluation.gammas, evaluation.scores, strict=True)
    ]
    columns = ["preference", *evaluation.evaluated_tasks, "average"]
    print_table("accuracy in percent (held-out images)", columns, rows)
