"""What a comparison or an evaluation leaves behind: JSON, CSV and Markdown tables, and pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pareto_merging.measure.evaluation import Scores
from pareto_merging.measure.figures.chosen import compare_pictures
from pareto_merging.measure.figures.sets import Set
from pareto_merging.measure.metrics import Indicators
from pareto_merging.measure.results import Measured, Result
from pareto_merging.measure.summary import MethodSummary, answer, cell, summarize
from pareto_merging.methods.interface import Choice
from pareto_merging.methods.registry import METHODS
from pareto_merging.system.files import write_json, write_text

REPORT_FORMAT = "pareto-comparison"
# (key of the summary, column, factor, digits)
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("equal", "equal (%)", 1, 1),
    ("priority", "priority (%)", 1, 1),
    ("one_hot", "one-hot (%)", 1, 1),
    ("hypervolume", "hypervolume (%)", 100, 1),
    ("non_dominated", "non-dominated", 1, 0),
    ("points", "of models", 1, 0),
    ("spacing", "spacing", 1, 2),
    ("igd_plus", "IGD+", 1, 2),
    ("cosine", "cosine", 1, 3),
    ("spearman", "Spearman", 1, 2),
    ("seconds", "seconds", 1, 1),
)
EXPLANATION = (
    "needs: the weights alone, unlabelled images or labels. keeps: what must be stored to answer any preference later. "
    "equal: average accuracy over the tasks at the equal preference; priority and one-hot: accuracy of the preferred "
    "task at its preference of 0.5 and of 1, averaged over the tasks (a method that gives one model: its average). "
    "hypervolume: share of the box between the reference point and 100 % that the models dominate. spacing and IGD+ "
    "in percent points, IGD+ against the union of all methods' fronts. cosine and Spearman: of the preference with the "
    "accuracies. A dash: not defined (a constant, one model, or a head of one class, which leaves no box). seconds: "
    "the chosen run, tuning not counted. Individual models and multi-task training are upper bounds and not in the "
    "union."
)


@dataclass(frozen=True)
class Report:
    """A comparison as a whole.

    Attributes:
        about: what was compared, how and where. tasks: the merged ones. evaluated_tasks: those with held-out images.
        reference_point: chance on each of these, in percent; None where no method gave a model.
        answer: in words. methods: figures by method. choices: the setting that each chose, by method and seed.
    """

    about: dict[str, Any]
    tasks: list[str]
    evaluated_tasks: list[str]
    reference_point: list[float] | None
    answer: list[str]
    methods: dict[str, MethodSummary]
    choices: dict[str, dict[str, Choice]]

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON of ``compare.json``."""
        methods = {key: entry.to_json() for key, entry in self.methods.items()}
        rest = {key: value for key, value in vars(self).items() if key != "about"}
        return {"format": REPORT_FORMAT, **self.about, **rest, "methods": methods}


def summary_rows(summary: Mapping[str, MethodSummary]) -> list[list[str]]:
    """Return one row per method: title, needs, what must be kept, the cells of COLUMNS."""
    rows = []
    for key, entry in summary.items():
        known = METHODS.get(key)
        row = [entry.title, known.needs if known else "", known.stores if known else ""]
        if entry.seeds:
            row += [cell(entry.figures.get(figure), factor, digits) for figure, _, factor, digits in COLUMNS]
        else:
            row += ["failed" if entry.failed else "skipped", *[""] * (len(COLUMNS) - 1)]
        rows.append(row)
    return rows


def head() -> list[str]:
    """Return the columns of :func:`summary_rows`."""
    return ["method", "needs", "keeps", *(title for _, title, _, _ in COLUMNS)]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a bar in a cell is escaped."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join("| " + " | ".join(value.replace("|", "\\|") for value in line) + " |\n" for line in lines)


def write_comparison(folder: Path, tasks: Sequence[str], results: Sequence[Result], about: Mapping[str, Any]) -> Report:
    """Write compare.json, methods.csv, points.csv, compare.md and the pictures into ``folder``; return the report.

    ``tasks``: the merged tasks. ``about``: what was compared and where, for the JSON. The pictures show the first seed.
    """
    summary = summarize(results)
    done = [result for result in results if isinstance(result, Measured)]
    report = Report(
        dict(about),
        list(tasks),
        evaluated_tasks=list(done[0].tasks if done else tasks),
        reference_point=done[0].reference_point if done else None,
        answer=answer(summary),
        methods=summary,
        choices={
            key: {str(result.seed): result.choice for result in done if result.method == key}
            for key in dict.fromkeys(result.method for result in done)
        },
    )
    write_json(folder / "compare.json", report.to_json())
    write_text(folder / "methods.csv", _csv(head(), summary_rows(summary)))
    columns = ["method", "seed", "kind", *(f"gamma {name}" for name in tasks)]
    columns += [f"{what} {name}" for what in ("accuracy", "entropy") for name in report.evaluated_tasks]
    rows = []
    for result in done:
        for point in result.points:
            gamma: list[Any] = [*point.gamma] if point.gamma else [""] * len(tasks)
            rows.append([result.method, result.seed, " ".join(point.kinds), *gamma, *point.accuracy, *point.entropy])
    write_text(folder / "points.csv", _csv(columns, rows))
    pictures = draw(folder, tasks, report.evaluated_tasks, done)
    write_text(folder / "compare.md", _markdown(report, [path.name for path in pictures]))
    return report


def draw(folder: Path, tasks: Sequence[str], evaluated: Sequence[str], done: Sequence[Measured]) -> list[Path]:
    """Draw the first seed's results, where every merged task was evaluated; return the paths written."""
    if not done or list(evaluated) != list(tasks):
        return []
    shown = [result for result in done if result.seed == done[0].seed]
    # a preference-aware upper bound has one model per task
    bounds = [result for result in shown if result.is_bound and result.preference_aware]
    individuals = {t: (r.point(f"one-hot:{t}") or r.points[0]).accuracy for r in bounds for t in tasks}
    sets = [Set(result.title, result.accuracies, result.gammas) for result in shown if result not in bounds]
    # pictures show the first preference-aware set at large: Pareto Merging, where it is there
    order = [METHODS["pareto"].title, METHODS["pareto++"].title, METHODS["pareto-data-free"].title]
    sets.sort(key=lambda one: order.index(one.name) if one.name in order else len(order))
    return compare_pictures(folder, list(tasks), sets, individuals or None) if sets else []


def _markdown(report: Report, pictures: Sequence[str]) -> str:
    summary, evaluated = report.methods, report.evaluated_tasks
    parts = ["# Which merging method?\n", *(f"- {line}" for line in report.answer)]
    if report.reference_point is not None:
        chance = ", ".join(f"{value:.3g}" for value in report.reference_point)
        parts += ["", markdown_table(head(), summary_rows(summary))]
        parts += [f"Reference point: {chance} % (chance). {EXPLANATION}"]
        # upper bounds have each task's own model there
        rows = [
            [entry.title, *(cell(entry.per_task[name]) for name in evaluated)]
            for entry in summary.values()
            if entry.seeds
        ]
        parts += ["", "## Each task at the equal preference\n", markdown_table(["method", *evaluated], rows)]
    unseen = next((list(entry.unseen) for entry in summary.values() if entry.unseen), [])
    if unseen:
        parts += ["## Tasks without a fine-tuned model\n"]
        parts += ["Of each method's models, the one whose predictions have the least entropy on the task's images.\n"]
        rows = [
            [entry.title, *(cell(entry.unseen[name]) for name in unseen)] for entry in summary.values() if entry.unseen
        ]
        parts += [markdown_table(["method", *(f"{name} (%)" for name in unseen)], rows)]
    left_out = [(entry.title, reason) for entry in summary.values() for reason in entry.reasons]
    left_out += [(name, "no evaluation images") for name in report.tasks if name not in evaluated]
    if left_out:
        parts += ["## Left out\n", *(f"- {title}: {reason}" for title, reason in left_out)]
    parts += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class Evaluation:
    """A Pareto set on held-out images.

    Attributes:
        run: where it is. tasks: the merged ones. gammas: preferences [n][K]. scores: of the model at each of them.
        indicators: of the n models as a set.
    """

    run: str
    tasks: list[str]
    gammas: list[list[float]]
    scores: list[Scores]
    indicators: Indicators

    @property
    def evaluated_tasks(self) -> list[str]:
        """Return the tasks that have held-out images."""
        return list(self.scores[0].accuracy)

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON of ``evaluation.json``."""
        return {
            "run": self.run,
            "tasks": self.tasks,
            "results": [
                {"gamma": [round(value, 6) for value in gamma], **scores.to_json()}
                for gamma, scores in zip(self.gammas, self.scores, strict=True)
            ],
            "indicators": asdict(self.indicators),
        }


def write_evaluation(folder: Path, evaluation: Evaluation) -> list[Path]:
    """Write evaluation.json, .csv, .md and the pictures that fit into ``folder``; return all paths."""
    tasks, evaluated = evaluation.tasks, evaluation.evaluated_tasks
    columns = [*(f"gamma {name}" for name in tasks), *(f"accuracy {name}" for name in evaluated), "average"]
    columns += [f"entropy {name}" for name in evaluated]
    table = []
    for gamma, scores in zip(evaluation.gammas, evaluation.scores, strict=True):
        values = [*gamma, *scores.accuracy.values(), sum(scores.accuracy.values()) / len(evaluated)]
        table.append([f"{value:.6g}" for value in (*values, *scores.entropy.values())])
    written = [folder / f"evaluation.{suffix}" for suffix in ("json", "csv", "md")]
    write_json(written[0], evaluation.to_json())
    write_text(written[1], _csv(columns, table))
    write_text(written[2], markdown_table(columns, table))
    if evaluated != tasks:
        return written
    points = [list(scores.accuracy.values()) for scores in evaluation.scores]
    return written + compare_pictures(folder, tasks, [Set("Pareto Merging", points, evaluation.gammas)])


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()
