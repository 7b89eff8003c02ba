"""What a comparison or an evaluation leaves behind: JSON, CSV and Markdown tables, pictures, and an answer in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pareto_merging.measure import figures
from pareto_merging.measure.comparison import accuracies, gammas, summarize
from pareto_merging.methods.registry import METHODS
from pareto_merging.system.files import write_json, write_text

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


def cell(value: Mapping[str, Any] | None, factor: float = 1, digits: int = 1) -> str:
    """``86.9 ± 1.0`` from a spread; a dash where there is none."""
    if value is None or value["mean"] is None:
        return "–"
    text = f"{factor * value['mean']:.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {factor * value['sd']:.{max(digits, 1)}f}"


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row per method: title, what it needs, what must be kept, and the cells of COLUMNS."""
    rows = []
    for key, entry in summary.items():
        known = METHODS.get(key)
        row = [entry["title"], known.needs if known else "", known.stores if known else ""]
        if entry["seeds"]:
            row += [cell(entry.get(k), factor, n) for k, _, factor, n in COLUMNS]
        else:
            row += ["failed" if entry["failed"] else "skipped", *[""] * (len(COLUMNS) - 1)]
        rows.append(row)
    return rows


def head() -> list[str]:
    """The columns of :func:`summary_rows`."""
    return ["method", "needs", "keeps", *(title for _, title, _, _ in COLUMNS)]


def task_rows(summary: Mapping[str, Any], tasks: Sequence[str]) -> list[list[str]]:
    """One row per method: accuracy on each task at the equal preference (upper bounds: each task's own model)."""
    return [
        [entry["title"], *(cell(entry["per_task"][name]) for name in tasks)]
        for entry in summary.values()
        if entry["seeds"]
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join("| " + " | ".join(value.replace("|", "\\|") for value in line) + " |\n" for line in lines)


def answer(summary: Mapping[str, Any]) -> list[str]:
    """The comparison in plain sentences: which method for which use. Empty if no method gave a model."""
    merged = {k: e for k, e in summary.items() if e["seeds"] and not e["is_bound"]}
    if not merged:
        return []

    def best(names: Sequence[str], figure: str) -> str | None:
        known = [name for name in names if merged[name].get(figure) and merged[name][figure]["mean"] is not None]
        return max(known, key=lambda name: merged[name][figure]["mean"], default=None)

    def named(name: str, figure: str, factor: float = 1) -> str:
        return f"{merged[name]['title']} ({cell(merged[name][figure], factor)} %)"

    def tied(name: str, figure: str, among: Sequence[str]) -> str:
        mean = merged[name][figure]["mean"]
        same = [merged[n]["title"] for n in among if n != name and (merged[n].get(figure) or {}).get("mean") == mean]
        if not same:
            return ""
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        return f" (as {'does' if len(same) == 1 else 'do'} {', '.join(same[:3])}{more})"

    lines = []
    first = best(list(merged), "equal")
    if first is not None:
        level = tied(first, "equal", list(merged))
        lines.append(f"One model for everybody: {named(first, 'equal')} has the highest average accuracy{level}.")
        # a title not in METHODS is somebody else's method
        free = best([name for name in merged if name in METHODS and METHODS[name].needs == "weights"], "equal")
        if free is not None and free != first:
            lines.append(f"From the weights alone: {named(free, 'equal')}.")
    # one task has one preference
    aware = [name for name, entry in merged.items() if entry["preference_aware"] and len(entry["per_task"]) > 1]
    front, own = best(aware, "hypervolume"), best(aware, "one_hot")
    if front is not None:
        level = tied(front, "hypervolume", aware)
        lines.append(f"A model per preference: {named(front, 'hypervolume', 100)} dominates the largest volume{level}.")
        single = best([name for name in merged if not merged[name]["preference_aware"]], "hypervolume")
        if single is not None and merged[single]["hypervolume"]["mean"] > merged[front]["hypervolume"]["mean"]:
            lines.append(f"Yet {named(single, 'hypervolume', 100)}, one model for every preference, dominates more.")
        kept = [
            name for name in merged if name in METHODS and METHODS[name].stores in ("1 model", "1 model + low rank")
        ]
        small = best(kept, "hypervolume")
        if front in METHODS and front not in kept and small is not None:
            stores = METHODS[front].stores
            lines.append(f"It keeps {stores}; of those that keep one: {named(small, 'hypervolume', 100)}.")
    if own is not None and own != front:
        lines.append(f"Each user caring for one task alone: {named(own, 'one_hot')} at one-hot preferences.")
    return lines


def write_comparison(
    folder: Path, tasks: Sequence[str], results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write compare.json, methods.csv, points.csv, compare.md and the pictures into ``folder``; returns the JSON.

    ``tasks``: the merged tasks. ``about``: what was compared and where, for the JSON. The pictures show the first seed.
    """
    summary = summarize(results)
    done = [r for r in results if r["status"] == "done"]
    evaluated = list(done[0]["tasks"]) if done else list(tasks)
    report = {
        "format": "pareto-comparison",
        **about,
        "tasks": list(tasks),
        "evaluated_tasks": evaluated,
        "reference_point": done[0]["reference_point"] if done else None,
        "answer": answer(summary),
        "methods": summary,
        "choices": {
            key: {str(r["seed"]): r["choice"] for r in done if r["method"] == key}
            for key in dict.fromkeys(r["method"] for r in done)
        },
    }
    write_json(folder / "compare.json", report)
    write_text(folder / "methods.csv", _csv(head(), summary_rows(summary)))
    rows = []
    for result in done:
        for point in result["points"]:
            rows.append(
                [
                    *(result["method"], result["seed"], " ".join(point["kinds"])),
                    *(point["gamma"] or [""] * len(tasks)),
                    *point["accuracy"],
                    *point["entropy"],
                ]
            )
    columns = ["method", "seed", "kind", *(f"gamma {name}" for name in tasks)]
    columns += [f"accuracy {name}" for name in evaluated] + [f"entropy {name}" for name in evaluated]
    write_text(folder / "points.csv", _csv(columns, rows))
    pictures = draw(folder, tasks, evaluated, done)
    write_text(folder / "compare.md", _markdown(report, evaluated, [path.name for path in pictures]))
    return report


def draw(folder: Path, tasks: Sequence[str], evaluated: Sequence[str], done: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The pictures of the first seed's results, where every merged task was evaluated; the paths written."""
    if not done or list(evaluated) != list(tasks):
        return []
    seed = done[0]["seed"]
    shown = [r for r in done if r["seed"] == seed]
    # a preference-aware upper bound has one model per task
    individuals = {
        task: next(
            (p["accuracy"] for p in result["points"] if f"one-hot:{task}" in p["kinds"]),
            result["points"][0]["accuracy"],
        )
        for result in shown
        if result["is_bound"] and result["preference_aware"]
        for task in tasks
    }
    sets = [
        figures.Set(r["title"], accuracies(r), gammas(r))
        for r in shown
        if not (r["is_bound"] and r["preference_aware"])
    ]
    # pictures show the first preference-aware set at large: Pareto Merging, where it is there
    order = [METHODS["pareto"].title, METHODS["pareto++"].title, METHODS["pareto-data-free"].title]
    sets.sort(key=lambda s: order.index(s.name) if s.name in order else len(order))
    return figures.compare_pictures(folder, list(tasks), sets, individuals or None) if sets else []


def _markdown(report: Mapping[str, Any], evaluated: Sequence[str], pictures: Sequence[str]) -> str:
    summary = report["methods"]
    parts = ["# Which merging method?\n", *(f"- {line}" for line in report["answer"])]
    if report["reference_point"] is not None:
        chance = ", ".join(f"{value:.3g}" for value in report["reference_point"])
        parts += [
            "",
            markdown_table(head(), summary_rows(summary)),
            f"Reference point: {chance} % (chance). {EXPLANATION}",
        ]
        parts += ["", "## Each task at the equal preference\n"]
        parts += [markdown_table(["method", *evaluated], task_rows(summary, evaluated))]
    unseen = next((list(e["unseen"]) for e in summary.values() if "unseen" in e), [])
    if unseen:
        parts += ["## Tasks without a fine-tuned model\n"]
        parts += ["Of each method's models, the one whose predictions have the least entropy on the task's images.\n"]
        rows = [[e["title"], *(cell(e["unseen"][n]) for n in unseen)] for e in summary.values() if "unseen" in e]
        parts += [markdown_table(["method", *(f"{name} (%)" for name in unseen)], rows)]
    left = [(e["title"], reason) for e in summary.values() for reason in e.get("reasons", [])]
    left += [(name, "no evaluation images") for name in report["tasks"] if name not in evaluated]
    if left:
        parts += ["## Left out\n", *(f"- {title}: {reason}" for title, reason in left)]
    parts += [f"\n![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"


def write_evaluation(
    folder: Path,
    tasks: Sequence[str],
    evaluated: Sequence[str],
    rows: Sequence[tuple[Sequence[float], Mapping[str, float], Mapping[str, float]]],
) -> list[Path]:
    """Write evaluation.csv, evaluation.md and the pictures that fit; ``rows``: γ, accuracy (%) and entropy by task."""
    columns = [*(f"gamma {name}" for name in tasks), *(f"accuracy {name}" for name in evaluated), "average"]
    columns += [f"entropy {name}" for name in evaluated]
    table = []
    for gamma, accuracy, entropy in rows:
        average = sum(accuracy.values()) / len(accuracy)
        values = [*gamma, *(accuracy[name] for name in evaluated), average, *(entropy[name] for name in evaluated)]
        table.append([f"{value:.6g}" for value in values])
    write_text(folder / "evaluation.csv", _csv(columns, table))
    write_text(folder / "evaluation.md", markdown_table(columns, table))
    if list(evaluated) != list(tasks):
        return []
    points = [[accuracy[name] for name in tasks] for _, accuracy, _ in rows]
    shown = [figures.Set("Pareto Merging", points, [list(gamma) for gamma, _, _ in rows])]
    return figures.compare_pictures(folder, list(tasks), shown)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()
