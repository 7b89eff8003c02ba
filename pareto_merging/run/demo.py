"""``pareto-merging demo``: eight fine-tuned vision transformers become one Pareto set, on real images."""

import base64
import html
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pareto_merging.errors import UserError
from pareto_merging.measure.comparison import Comparison
from pareto_merging.measure.evaluation import evaluate_preferences
from pareto_merging.measure.figures.fronts import fronts
from pareto_merging.measure.figures.sets import Set
from pareto_merging.measure.metrics import hypervolume, non_dominated, spearman
from pareto_merging.measure.results import Measured, Point
from pareto_merging.methods.registry import METHODS
from pareto_merging.model.files import save_pareto_set
from pareto_merging.preferences import two_task_grid
from pareto_merging.run.config import RunConfig
from pareto_merging.run.folder import SET_NAME, check_new
from pareto_merging.run.train import train_run
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.devices import one_thread
from pareto_merging.system.environment import environment
from pareto_merging.system.files import write_json, write_text
from pareto_merging.system.tables import print_table

# The published preset, except that the runs are short: 100 steps instead of 4000 want a larger rate for λ. Beside it
# ours, the preset `expert`, with as many steps.
METHOD: dict[str, Any] = {"preset": "icml2025", "learning_rate": 1e-3, "lambda_learning_rate": 1e-2, "batch_size": 32}
STEPS, PAIR_STEPS, QUICK_STEPS = 100, 150, 5
TWO_TASKS = ("upright", "mirrored")
MERGED_MODELS = ("weight-averaging", "task-arithmetic", "adamerging")
BASELINES = ("individual", "pretrained", *MERGED_MODELS)
EXPERT, PUBLISHED = "Pareto Merging, expert-guided", "Pareto Merging"
# what each baseline may try, chosen without labels; Pareto Merging has its published setting
CHOICES: dict[str, list[dict[str, Any]]] = {
    "task-arithmetic": [{"coefficient": c} for c in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)],
    "adamerging": [{"learning_rate": rate, "clamp_lambda": False} for rate in (3e-3, 1e-2)],
    "pareto": [{}],
    "pareto-expert": [{}],
}
EFFORT = max(map(len, CHOICES.values()))
# a model that is right by chance on ten classes
CHANCE = 10.0


def demo_config(tasks: Sequence[str] | None = None, *, quick: bool = False, seed: int = 0) -> RunConfig:
    """Return the demo's configuration for all eight tasks, or for a pair of them."""
    method = {**METHOD, "steps": PAIR_STEPS if tasks else STEPS, "seed": seed}
    if quick:
        method |= {"steps": QUICK_STEPS, "batch_size": 8}
    # the encoders are small: the activations of all tasks are no matter, and the step takes half as long
    same = {"suite": "digits", "tasks_at_once": "all"}
    return RunConfig.model_validate({**same, "tasks": list(tasks) if tasks else None, "method": method})


def run_demo(
    out: Path, *, overwrite: bool = False, quick: bool = False, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Run the demo, print its table and write its folder; return what ``report.json`` holds.

    Everything is written beside ``out`` first and takes its place at the end, so that a demo is there whole or not.
    UserError: ``out`` exists, unless ``overwrite`` is given and it holds an earlier demo.
    """
    out = Path(out).absolute()
    if not overwrite or not out.exists():
        check_new(out)
    elif not _is_demo(out):
        raise UserError(f"{out}: expected an earlier demo to replace, got something else")
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with one_thread(), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
        folder = Path(made) / out.name
        folder.mkdir()
        report = _run(folder, quick, seed, progress)
        report["environment"]["seconds_in_all"] = round(time.perf_counter() - start, 1)
        write_json(folder / "report.json", report)
        write_text(folder / "index.html", page(report, (folder / "front.png").read_bytes()))
        if out.exists():
            out.rename(Path(made) / "replaced")
        folder.rename(out)
    _print(report, out)
    return report


FORMAT = "pareto-merging-demo"
_FILES = {"report.json", "front.png", "index.html", SET_NAME, "two_tasks"}


def _is_demo(folder: Path) -> bool:
    """Return whether a folder was written by the demo and holds nothing else."""
    try:
        names = {path.name for path in folder.iterdir()}
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and names <= _FILES and isinstance(report, dict) and report.get("format") == FORMAT


def _run(folder: Path, quick: bool, seed: int, progress: bool) -> dict[str, Any]:
    console = Console(stderr=True, quiet=not progress)
    console.print("Eight tasks: the baselines, each tuned on the unlabelled split …")
    eight = Workspace(demo_config(quick=quick, seed=seed))
    comparison = Comparison(eight, effort=EFFORT, grid="equal", choices=CHOICES, progress=progress, keep=True)
    entries = {METHODS[key].title: _entry(_measured(comparison, key)) for key in BASELINES}
    results = {}
    for key, title in (("pareto", PUBLISHED), ("pareto-expert", EXPERT)):
        console.print(f"Eight tasks: {title} …")
        results[title] = _measured(comparison, key)
        for kind in ("equal", "one-hot"):
            entries[f"{title} ({kind} preference)"] = _entry(results[title], kind)
    learned = results[PUBLISHED]
    model = comparison.kept["pareto-expert"].pareto
    assert model is not None

    console.print(f"Two tasks ({' and '.join(TWO_TASKS)}): both, and their fronts …")
    pair = _pair(folder, quick, seed, progress)
    save_pareto_set(model, folder / SET_NAME, preset="expert")
    return {
        "format": FORMAT,
        "quick": quick,
        "tasks": eight.task_names,
        "methods": entries,
        "preferences": [
            {
                "gamma": point.gamma,
                "accuracy": dict(zip(eight.task_names, point.accuracy, strict=True)),
                "entropy": dict(zip(eight.task_names, point.entropy, strict=True)),
                "average": round(sum(point.accuracy) / len(eight.task_names), 4),
            }
            for point in learned.points
        ],
        **pair,
        "settings": eight.method.model_dump(mode="json"),
        "environment": environment(),
    }


def _pair(folder: Path, quick: bool, seed: int, progress: bool) -> dict[str, Any]:
    """Learn two tasks in both ways, draw the fronts, and return the report's entries."""
    config = demo_config(TWO_TASKS, quick=quick, seed=seed)
    model, trained = train_run(config, folder / "two_tasks", progress=progress)
    pairs = Comparison(Workspace(config), effort=EFFORT, choices=CHOICES, progress=progress)
    results = {key: _measured(pairs, key) for key in BASELINES}
    front = _front(model, pairs, progress)
    ours = [point for point in _measured(pairs, "pareto-expert").points if "grid" in point.kinds]
    ours.sort(key=lambda point: point.gamma or [])
    expert_front = [{"gamma": p.gamma or [], "accuracy": p.accuracy, "entropy": p.entropy} for p in ours]
    points = {results[key].title: results[key].points[0].accuracy for key in MERGED_MODELS}
    individuals = {name: _own(results["individual"], name).accuracy for name in pairs.evaluation}
    sets = [
        Set(title, [row["accuracy"] for row in rows], [row["gamma"] for row in rows])
        for title, rows in ((EXPERT, expert_front), (PUBLISHED, front))
    ]
    fronts(folder / "front.png", TWO_TASKS, [*sets, *(Set(name, [p]) for name, p in points.items())], individuals)
    volume = front_metrics(expert_front, points)["pareto_merging"]
    return {
        "two_tasks": {
            "tasks": list(TWO_TASKS),
            "seconds": round(trained.seconds, 2),
            "settings": config.method.model_dump(mode="json"),
            "methods": {result.title: _entry(result) for result in results.values()},
            "individual_models": individuals,
        },
        "front": front,
        "expert_front": expert_front,
        "hypervolume": {**front_metrics(front, points), "expert_guided": volume},
    }


def _measured(comparison: Comparison, key: str) -> Measured:
    """Return what a method was measured to be. RuntimeError if it failed."""
    result = comparison.run(key)
    if not isinstance(result, Measured):
        raise RuntimeError(f"{result.title}: {result.reason}")
    return result


def _front(model: nn.Module, pairs: Comparison, progress: bool) -> list[dict[str, Any]]:
    """Return a two-task Pareto set's models on a grid of preferences."""
    gammas = list(two_task_grid(11))
    scores = evaluate_preferences(model, pairs.evaluation, gammas, progress=progress)
    numbers = [(list(score.accuracy.values()), list(score.entropy.values())) for score in scores]
    return [
        {"gamma": [round(value, 6) for value in gamma.tolist()], "accuracy": accuracy, "entropy": entropy}
        for gamma, (accuracy, entropy) in zip(gammas, numbers, strict=True)
    ]


def _own(result: Measured, task: str) -> Point:
    """Return the model at a task's one-hot preference, or the only one."""
    return result.point(f"one-hot:{task}") or result.points[0]


def _entry(result: Measured, kind: str = "equal") -> dict[str, Any]:
    """Describe a method at the equal preference, or each task at its one-hot preference."""
    equal = None if kind != "equal" or result.is_bound else result.point("equal")
    models = {name: equal or _own(result, name) for name in result.tasks}
    accuracy = {name: models[name].accuracy[place] for place, name in enumerate(result.tasks)}
    return {
        "per_task": {name: round(value, 2) for name, value in accuracy.items()},
        "average": round(sum(accuracy.values()) / len(accuracy), 2),
        "seconds": result.tuning_seconds if result.method == "task-arithmetic" else result.seconds,
        "peak_bytes": result.peak_bytes,
        "entropy": {name: round(models[name].entropy[place], 4) for place, name in enumerate(result.tasks)},
        **({"chosen": result.choice} if result.choice else {}),
    }


def front_metrics(front: Sequence[Mapping[str, Any]], others: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return hypervolumes of a two-task front and of other models, and rank correlations.

    The reference point is chance (10 % on both tasks): fixed beforehand, below everything, the same for all.
    """
    reference = [CHANCE, CHANCE]
    points = [row["accuracy"] for row in front]
    first = [row["gamma"][0] for row in front]
    return {
        "reference_point": reference,
        "pareto_merging": hypervolume(points, reference),
        "baselines": {name: hypervolume([point], reference) for name, point in others.items()},
        "all_baselines_together": hypervolume(list(others.values()), reference),
        "non_dominated_points": int(non_dominated(points).sum()),
        "spearman_gamma1_entropy1": spearman(first, [row["entropy"][0] for row in front]),
        "spearman_gamma1_accuracy1": spearman(first, [row["accuracy"][0] for row in front]),
        "spearman_gamma2_entropy2": spearman([-g for g in first], [row["entropy"][1] for row in front]),
        "spearman_gamma2_accuracy2": spearman([-g for g in first], [row["accuracy"][1] for row in front]),
    }


def _front_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the two-task fronts: ours, then the published one."""
    tasks = report["two_tasks"]["tasks"]
    rows = [
        [f"{ours['gamma'][0]:.1f}", *(f"{v:.1f}" for row in (ours, published) for v in row["accuracy"])]
        for ours, published in zip(report["expert_front"], report["front"], strict=True)
    ]
    return ["γ₁", *(f"{task}, {kind} (%)" for kind in ("expert-guided", "published") for task in tasks)], rows


def _print(report: Mapping[str, Any], out: Path) -> None:
    tasks, methods = report["tasks"], report["methods"]
    # methods side by side: seven columns of numbers fit a terminal of eighty, eight task names do not
    short = {f"{EXPERT} (": "expert-guided, ", f"{PUBLISHED} (": "PM, ", " preference)": ""}
    head = list(methods)
    for long, brief in short.items():
        head = [name.replace(long, brief) for name in head]
    rows = [[task, *(f"{entry['per_task'][task]:.1f}" for entry in methods.values())] for task in tasks]
    rows += [[key, *(f"{entry[key]:.1f}" for entry in methods.values())] for key in ("average", "seconds")]
    print_table("Held-out accuracy in percent, eight tasks (PM: Pareto Merging as published)", ["task", *head], rows)
    columns, front = _front_table(report)
    print_table(f"Two tasks: learned sets at {len(front)} preferences", columns, front)
    metrics = report["hypervolume"]
    print(
        f"Hypervolume above {metrics['reference_point']}: expert-guided {metrics['expert_guided']:.0f}, as published "
        f"{metrics['pareto_merging']:.0f}, all baselines together {metrics['all_baselines_together']:.0f}\n"
        f"Open {out / 'index.html'}"
    )


def page(report: Mapping[str, Any], picture: bytes) -> str:
    """Return the report as one HTML file that needs nothing else."""
    tasks = report["tasks"]
    first, second = report["two_tasks"]["tasks"]
    metrics = report["hypervolume"]
    methods = []
    for name, entry in report["methods"].items():
        numbers = [*(entry["per_task"][task] for task in tasks), entry["average"], entry["seconds"]]
        methods.append([name, *(f"{number:.1f}" for number in numbers)])
    columns, front = _front_table(report)
    volumes = {EXPERT: metrics["expert_guided"], PUBLISHED: metrics["pareto_merging"]}
    volumes["all baselines together"] = metrics["all_baselines_together"]
    volumes |= metrics["baselines"]
    where = [[key, str(value)] for key, value in report["environment"].items()]
    image = base64.b64encode(picture).decode()
    warning = "<p><strong>A quick run of a few steps: it shows that everything runs, not what it can do.</strong></p>"
    warning = warning if report["quick"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pareto Merging: demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap; }}
.wide {{ overflow-x: auto; }}
img {{ max-width: 100%; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #181818; color: #ddd; }} th, td {{ border-color: #444; }} img {{ background: #fff; }}
}}
</style></head><body>
<h1>One run, every trade-off</h1>
<p>Eight vision transformers, each fine-tuned on its own view of real handwritten digits, are merged into one. Pareto
Merging learns, without labels, a small structure from which the merged model for any preference follows at once. The
published method does so from the entropy of the predictions; expert-guided, from the fine-tuned models' own. All
accuracies are on held-out images; every choice was made on a separate, unlabelled split.</p>
{warning}<h2>Eight tasks</h2>
<div class="wide">{_table(["method", *tasks, "average (%)", "seconds"], methods)}</div>
<p>"Individual" is eight models, the upper bound. "One-hot preference" gives each task the model of its own preference;
all of them come from the one learned set.</p>
<h2>Two tasks: the fronts</h2>
<p><img alt="Accuracy on {html.escape(first)} against {html.escape(second)} for preferences from one to the other, with
the baselines as points" src="data:image/png;base64,{image}"></p>
<div class="wide">{_table(columns, front)}</div>
<p>Hypervolume above the reference point {metrics["reference_point"]} (chance on both tasks):</p>
{_table(["set", "hypervolume"], [[name, f"{value:.0f}"] for name, value in volumes.items()])}
<h2>Where this ran</h2>
{_table(["", ""], where)}
</body></html>
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
