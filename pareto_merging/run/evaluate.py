"""``pareto-merging evaluate``: a finished run on its held-out images."""

from collections.abc import Callable
from pathlib import Path

from pareto_merging.errors import user_errors
from pareto_merging.measure.evaluation import evaluate_preferences
from pareto_merging.measure.metrics import indicators
from pareto_merging.measure.reports import Evaluation
from pareto_merging.preferences import parse_preferences
from pareto_merging.run.folder import open_run


def evaluate_run(
    run: Path, preferences: str, *, progress: bool = True, on_left_out: Callable[[list[str]], None] | None = None
) -> Evaluation:
    """Measure a finished run's Pareto set at some preferences, as :func:`parse_preferences` reads them.

    ``on_left_out`` is called with the tasks without evaluation images, if there are any.

    Raises:
        UserError: see :func:`open_run`; other preferences; no evaluation images at all.
    """
    workspace, model = open_run(run)
    names = workspace.task_names
    with user_errors():
        gammas = parse_preferences(preferences, names)
    tasks = workspace.evaluation_tasks()
    left_out = [name for name in names if name not in tasks]
    if left_out and on_left_out is not None:
        on_left_out(left_out)
    scores = evaluate_preferences(model, tasks, gammas, workers=workspace.workers, progress=progress)
    rows = [gamma.tolist() for gamma in gammas]
    points = [list(score.accuracy.values()) for score in scores]
    indicated = indicators(points, workspace.chance(list(tasks)), None if left_out else rows)
    return Evaluation(str(run), names, rows, scores, indicated)
