"""``pareto-merging evaluate``."""

import json
from typing import Annotated

import typer

from pareto_merging.cli import options


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
