"""``pareto-merging evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pareto_merging.cli.options import PREFERENCES_HELP, AsJson, Quiet, RunFolder, warn_of_left_out

if TYPE_CHECKING:
    from torch import Tensor

    from pareto_merging.measure.evaluation import Scores


def evaluate(
    run: RunFolder,
    preferences: Annotated[
        str,
        typer.Option(
            help=f"Preferences apart by semicolons: {PREFERENCES_HELP}.",
        ),
    ] = "equal;one-hot",
    as_json: AsJson = False,
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
    warn_of_left_out(workspace.task_names, list(tasks))
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
    wanted = [gamma.tolist() for gamma in gammas] if len(tasks) == len(workspace.task_names) else None
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


def _print_scores(names: Sequence[str], gammas: Sequence[Tensor], scores: Sequence[Scores]) -> None:
    from pareto_merging.preferences import format_preference
    from pareto_merging.system.tables import print_table

    rows = [
        [format_preference(gamma.tolist()), *(f"{score.accuracy[name]:.1f}" for name in names), f"{score.average:.1f}"]
        for gamma, score in zip(gammas, scores, strict=True)
    ]
    print_table("accuracy in percent (held-out images)", ["preference", *names, "average"], rows)
