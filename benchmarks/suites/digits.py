"""The study: every method on the embedded digits suite, over several seeds. With two, three and eight models.

A seed makes the whole suite anew (heads, generalist, eight fine-tuned encoders) and seeds the merging. Seeds 0, 1 and
2 were looked at while the suite was designed; figures to be believed come from others. Every method may try the same
number of settings, chosen without labels; all rules are :mod:`.comparison`'s. Beside it ablations of Pareto Merging,
each changing one thing about its published setting, nothing chosen. Results are kept in a work folder, method by
method: an interrupted study goes on from there.
"""

import itertools
import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common.parallel import in_parallel
from pareto_merging.data import digits
from pareto_merging.measure import reports
from pareto_merging.measure.comparison import Comparison, compare
from pareto_merging.measure.metrics import Spread, spearman, spread
from pareto_merging.measure.reports import COLUMNS, markdown_table
from pareto_merging.measure.results import Measured, Result, read_result
from pareto_merging.measure.summary import MethodSummary, answer, cell, summarize
from pareto_merging.methods.registry import METHODS
from pareto_merging.run.config import RunConfig
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.devices import one_thread
from pareto_merging.system.files import write_json

EFFORT = 3
# what tables begin with
LEADING = ("pareto-expert", "pareto-closed-form")
# the published preset, except that the runs are short and λ wants a larger rate then
METHOD: dict[str, Any] = {"preset": "icml2025", "learning_rate": 1e-3, "lambda_learning_rate": 1e-2, "batch_size": 32}
TASKS = {2: ["upright", "mirrored"], 3: ["upright", "mirrored", "inverted"], 8: list(digits.TASKS)}
STEPS = {2: 150, 3: 120, 8: 100}
# where three models are merged, two views that no fine-tuned model is there for
UNSEEN = {3: ["permuted", "blocks"]}

# what costs little per step gets more of them than STEPS
CHOICES: dict[str, list[dict[str, Any]]] = {
    "multitask": [{"learning_rate": rate, "steps": 300} for rate in (1e-4, 3e-4, 1e-3)],
    "pareto-data-free": [{"steps": 300}, {"steps": 300, "learning_rate": 1e-2}, {"steps": 300, "concentration": 1.0}],
}

# of each kind one: a quick run proves that the study runs; the tests of `compare` run every method
QUICK_METHODS = ("individual", "task-arithmetic", "adamerging", "pareto")

# one change each to METHOD
ABLATIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "rank 4": {"rank": 4},
    "rank 32": {"rank": 32},
    "cosine 0.1": {"cosine": 0.1},
    "cosine 1": {"cosine": 1.0},
    "tensor norm 0": {"tensor_norm": 0.0},
    "tensor norm 0.01": {"tensor_norm": 0.01},
    "tensor norm 1": {"tensor_norm": 1.0},
    "μ 0.01": {"mu": 0.01},
    "μ 1": {"mu": 1.0},
    "p 0.3": {"concentration": 0.3},
    "p 1": {"concentration": 1.0},
    "λ per module": {"granularity": "module"},
    "λ per model": {"granularity": "model"},
    "low rank on in-projections": {"low_rank": "in-projection"},
    "low rank on all linear layers": {"low_rank": "all"},
    "rate 3e-3": {"learning_rate": 3e-3},
    "norm 0.01, rate 3e-3": {"tensor_norm": 0.01, "learning_rate": 3e-3},
    "p 1, norm 0.01, rate 3e-3": {"concentration": 1.0, "tensor_norm": 0.01, "learning_rate": 3e-3},
    "linear scalarisation": {"scalarization": "linear"},
    "weight distance (data-free)": {"objective": "weight-distance"},
}
# with eight models, where a run takes long, those that bear on how preferences are sampled and held back
ABLATIONS_OF_EIGHT = (
    *("published", "tensor norm 0", "tensor norm 0.01", "p 1", "rate 3e-3", "norm 0.01, rate 3e-3"),
    *("p 1, norm 0.01, rate 3e-3", "λ per model", "low rank on all linear layers", "weight distance (data-free)"),
)


def run(
    seeds: Sequence[int],
    quick: bool = False,
    progress: bool = True,
    work: Path | None = None,
    jobs: int = 1,
    methods: Sequence[str] | None = None,
    join: Path | None = None,
    models: Sequence[int] = tuple(TASKS),
) -> dict[str, Any]:
    """Measure every seed. ``quick`` takes two steps of few methods and proves only that it runs.

    ``work``: the folder of partial results, to go on from; None: a temporary one. ``jobs``: processes, one thread each.
    ``methods``: these alone, and no ablations. ``join``: an earlier results file, whose other methods and ablations
    join; methods that both have are measured anew, and ``joined`` says by how much the two differ. ``models``: how many
    are merged. ``lacking`` has by their number the methods that were measured in neither.
    """
    chosen = tuple(methods or ())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        _in_parallel([("suite", seed, 0) for seed in seeds], folder, quick, jobs, progress)
        kinds = ("compare",) if chosen else ("compare", "ablate")
        counts = [tasks for tasks in (8, 3, 2) if tasks in models]
        parts = [(kind, seed, tasks) for tasks in counts for seed in seeds for kind in kinds]
        wanted = [p for p in parts if p[0] == "compare" or p[2] != 3]
        _in_parallel(wanted, folder, quick, jobs, progress, chosen)
        results = {str(tasks): _read(folder, seeds, tasks) for tasks in TASKS}
        ablations = {str(tasks): _ablation_summary(_read(folder, seeds, tasks, "ablations")) for tasks in (2, 8)}
    joined: dict[str, Any] = {}
    if join is not None:
        before = json.loads(join.read_text(encoding="utf-8"))
        origin = {"file": join.name, "commit": before.get("commit"), "cpu": before["environment"]["cpu"]}
        joined = {"joined": _join(results, before) | origin}
        ablations = {tasks: entries or before["ablations"].get(tasks, {}) for tasks, entries in ablations.items()}
    summaries = {tasks: summarize(rows) for tasks, rows in results.items()}
    return {
        **joined,
        "lacking": {
            tasks: [key for key in METHODS if len({r.seed for r in rows if r.method == key}) < len(seeds)]
            for tasks, rows in results.items()
        },
        "seeds": list(seeds),
        "effort": EFFORT,
        "steps": STEPS,
        "method": METHOD,
        "results": {tasks: [_short(row) for row in rows] for tasks, rows in results.items()},
        "summary": {
            tasks: {k: entry.to_json() for k, entry in summary.items()} for tasks, summary in summaries.items()
        },
        "answers": {tasks: answer(summary) for tasks, summary in summaries.items()},
        "ablations": ablations,
        "judges": {tasks: _judges(rows) for tasks, rows in results.items()},
    }


def _join(results: dict[str, list[Result]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Add an earlier report's results of other methods. Return how far those of both differ, in points."""
    order = {name: number for number, name in enumerate(METHODS)}
    apart: dict[str, float] = {}
    for tasks, rows in results.items():
        own = {(row.method, row.seed): row for row in rows}
        for entry in before["results"].get(tasks, ()):
            if entry["method"] not in METHODS:
                continue
            row = Result.from_json({**entry, "title": METHODS[entry["method"]].title})
            again = own.get((row.method, row.seed))
            if again is None:
                rows.append(row)
            elif isinstance(row, Measured) and isinstance(again, Measured):
                pairs = zip(row.points, again.points, strict=False)
                difference = max(abs(a - b) for p, q in pairs for a, b in zip(p.accuracy, q.accuracy, strict=True))
                apart[row.method] = max(apart.get(row.method, 0.0), round(difference, 4))
        rows.sort(key=lambda row: (row.seed, order[row.method]))
    return {"largest difference of methods measured again, in points": apart}


def _in_parallel(
    parts: Sequence[tuple[str, int, int]],
    folder: Path,
    quick: bool,
    jobs: int,
    progress: bool,
    methods: Sequence[str] = (),
) -> None:
    start, calls = time.perf_counter(), [(*part, folder, quick, methods) for part in parts]
    for number, (kind, seed, tasks, *_) in enumerate(in_parallel(_part, calls, jobs), start=1):
        if progress:
            what = f"seed {seed}: {kind}" + (f", {tasks} models" if tasks else "")
            print(f"[{number}/{len(calls)}] {what} ({time.perf_counter() - start:.0f} s so far)", flush=True)


def make_encoders(folder: Path, seed: int, design: Mapping[str, Any] = digits.ENCODER) -> None:
    """Train the encoders of a seed into a folder, unless it has them whole."""
    if not (folder / "heads.safetensors").exists() or not (folder / "done").exists():
        digits.make(folder, seed=seed, design=design)
        (folder / "done").touch()


def _part(kind: str, seed: int, tasks: int, folder: Path, quick: bool, methods: Sequence[str] = ()) -> None:
    """Do one piece of the work and keep it. Where there are several, each has a process of its own."""
    suite = folder / f"seed-{seed}" / "suite"
    with one_thread(), warnings.catch_warnings():
        # a setting that collapses is not chosen; its warning is in the results
        warnings.simplefilter("ignore")
        if kind == "suite":
            make_encoders(suite, seed)
        elif kind == "compare":
            how: dict[str, Any] = {"effort": 1, "grid": "equal"} if quick else {"effort": EFFORT, "choices": CHOICES}
            wanted = list(methods or (QUICK_METHODS if quick else METHODS))
            target = folder / f"seed-{seed}" / f"{tasks}-models"
            compare(_workspace(suite, seed, tasks, quick), target, wanted, progress=False, **how)
        else:
            _ablate(suite, seed, tasks, folder, quick)


def _workspace(suite: Path, seed: int, tasks: int, quick: bool) -> Workspace:
    method = {**METHOD, "steps": STEPS[tasks], "seed": seed, **({"steps": 2, "batch_size": 8} if quick else {})}
    values = {"suite": "digits", "tasks": TASKS[tasks], "unseen": UNSEEN.get(tasks), "method": method}
    # the encoders are small: the activations of all tasks are no matter, and a step takes half as long
    values["tasks_at_once"] = "all"
    return Workspace(RunConfig.model_validate(values), suite)


def _ablate(suite: Path, seed: int, tasks: int, folder: Path, quick: bool) -> None:
    names = [name for name in ABLATIONS if tasks == 2 or name in ABLATIONS_OF_EIGHT]
    comparison: Comparison | None = None
    for name in names[:2] if quick else names:
        path = folder / f"seed-{seed}" / f"{tasks}-models" / "ablations" / f"{_file_name(name)}.json"
        before = read_result(path)
        if before is not None and before.status != "failed":
            continue
        if comparison is None:
            grid = None if tasks == 2 and not quick else "equal"
            comparison = Comparison(_workspace(suite, seed, tasks, quick), effort=1, grid=grid, progress=False)
        key = "pareto-data-free" if "objective" in ABLATIONS[name] else "pareto"
        change = {k: v for k, v in ABLATIONS[name].items() if k != "objective"}
        comparison.choices = {key: [change]}
        write_json(path, comparison.run(key).model_copy(update={"method": name, "title": name}).to_json())


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def _read(folder: Path, seeds: Sequence[int], tasks: int, inside: str = "") -> list[Result]:
    """Return the results of seed after seed, in the order of METHODS and ABLATIONS."""
    results: list[Result] = []
    order = {name: number for number, name in enumerate((*METHODS, *ABLATIONS))}
    for seed in seeds:
        paths = sorted((folder / f"seed-{seed}" / f"{tasks}-models" / inside).glob("*.json"))
        own = [result.model_copy(update={"seed": seed}) for result in map(read_result, paths) if result is not None]
        results += sorted(own, key=lambda result: order[result.method])
    return results


def _short(result: Result) -> dict[str, Any]:
    """Return a result as JSON without what only matters while it is made."""
    left_out = ("format", "title", "facts", "tuning_seconds")
    short = {key: value for key, value in result.to_json().items() if key not in left_out}
    if "points" in short:
        short["points"] = [{k: v for k, v in point.items() if k != "entropy"} for point in short["points"]]
    return short


def _ablation_summary(results: Sequence[Result]) -> dict[str, Any]:
    kept = ("equal", "one_hot", "hypervolume", "spearman", "seconds")
    return {
        name: {key: asdict(entry.figures[key]) for key in kept if key in entry.figures}
        for name, entry in summarize(results).items()
    }


def _judges(results: Sequence[Result]) -> dict[str, Any]:
    """Measure how well the label-free score orders methods: its rank correlation with held-out accuracy.

    Per seed, over the methods that give one model: the chosen setting's score against that model's accuracy.
    """
    correlations = []
    for seed in dict.fromkeys(result.seed for result in results):
        pairs = []
        for result in results:
            if result.seed != seed or not isinstance(result, Measured) or result.is_bound or result.preference_aware:
                continue
            score = next((tried.score for tried in result.candidates if tried.choice == result.choice), None)
            if score is not None:
                accuracy = result.points[0].accuracy
                pairs.append((score, math.fsum(accuracy) / len(accuracy)))
        correlations.append(spearman([a for a, _ in pairs], [b for _, b in pairs]))
    return {"spearman of agreement and accuracy": asdict(spread(correlations))}


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return the first seed's pictures in ``folder``/TASKS-models."""
    written = []
    for tasks, rows in report["results"].items():
        titled = [Result.from_json({**row, "title": METHODS[row["method"]].title}) for row in rows]
        done = [result for result in titled if isinstance(result, Measured)]
        if done:
            written += reports.draw(folder / f"{tasks}-models", TASKS[int(tasks)], done[0].tasks, done)
    for path in written:
        # a third of the bytes, for the repository; nobody sees the difference
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(128)
        small.save(path, optimize=True)
    return written


def _summary(report: Mapping[str, Any], tasks: int | str) -> dict[str, MethodSummary]:
    """Return the summary of the methods on so many models."""
    return {key: MethodSummary.from_json(entry) for key, entry in report["summary"][str(tasks)].items()}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of the README: every method with two, three and eight models."""
    seeds = ", ".join(str(seed) for seed in report["seeds"])
    columns, rows = ["method"], {key: [METHODS[key].title] for key in dict.fromkeys((*LEADING, *METHODS))}
    for tasks in TASKS:
        columns += [f"{tasks} models: equal", "one-hot", "hypervolume"]
        summary = _summary(report, tasks)
        for key, row in rows.items():
            row += _cells(summary[key].figures if key in summary else {}, "equal", "one_hot", "hypervolume")
    lacking = {key for keys in report.get("lacking", {}).values() for key in keys}
    titles = ", ".join(METHODS[key].title for key in METHODS if key in lacking)
    note = f"\nNot measured yet for every number of models: {titles}.\n" if lacking else ""
    return (
        "Held-out accuracy in percent (equal: average at the equal preference; one-hot: each task at its own "
        "preference) and hypervolume above chance in percent of the box, mean ± standard deviation over suite seeds "
        f"{seeds}:\n\n{markdown_table(columns, list(rows.values()))}{note}"
    )


def _cells(figures: Mapping[str, Spread], *names: str) -> list[str]:
    """Return figures by name as :func:`.summary_rows` writes them."""
    looks = {name: (factor, digits) for name, _, factor, digits in COLUMNS}
    return [cell(figures.get(name), *looks[name]) for name in names]


def ablations_markdown(report: Mapping[str, Any]) -> str:
    """Return ablations of Pareto Merging: one thing changed at a time, nothing chosen."""
    columns, rows = ["change"], {name: [name] for name in ABLATIONS}
    for tasks, entries in report["ablations"].items():
        columns += [f"{tasks} models: equal", "one-hot", "hypervolume", "Spearman"]
        for name, row in rows.items():
            spreads = {key: Spread(**value) for key, value in entries.get(name, {}).items()}
            row += _cells(spreads, "equal", "one_hot", "hypervolume", "spearman")
    return markdown_table(columns, list(rows.values()))


def unseen_markdown(report: Mapping[str, Any]) -> str:
    """Return accuracy on tasks without a fine-tuned model, three models merged."""
    entries = [entry for entry in _summary(report, 3).values() if entry.unseen]
    names = list(entries[0].unseen) if entries else []
    rows = [[entry.title, *(cell(entry.unseen[name]) for name in names)] for entry in entries]
    return markdown_table(["method", *(f"{name} (%)" for name in names)], rows)


def fronts_markdown(report: Mapping[str, Any]) -> str:
    """Return the table of methods that answer a preference: their sets' quality and alignment."""
    columns = ["models, method", "equal", "priority", "one-hot", "hypervolume", "non-dominated", "of"]
    columns += ["spacing", "IGD+", "cosine", "Spearman", "seconds"]
    names = [name for name, *_ in COLUMNS if name != "seconds"]
    rows = [
        [f"{tasks}: {entry.title}", *_cells(entry.figures, *names), cell(entry.figures.get("seconds"), digits=0)]
        for tasks in report["summary"]
        for entry in _summary(report, tasks).values()
        if entry.preference_aware and not entry.is_bound
    ]
    return markdown_table(columns, rows)


def following_markdown(report: Mapping[str, Any]) -> str:
    """Return how a task's accuracy follows its own preference, task by task."""
    columns, rows = ["models, method", "one-hot − equal", "rises", *digits.TASKS], []
    for tasks, entries in report["results"].items():
        kept = [Result.from_json(entry) for entry in entries]
        aware = [r for r in kept if isinstance(r, Measured) and r.preference_aware and not r.is_bound]
        for key in sorted({result.method for result in aware}, key=list(METHODS).index):
            own = [result for result in aware if result.method == key]
            gains, rises, ranks = zip(*(_following(result) for result in own), strict=True)
            cells = {task: cell(spread([rank[task] for rank in ranks]), digits=2) for task in own[0].tasks}
            share = math.fsum(rises) / len(rises)
            row = [f"{tasks}: {METHODS[key].title}", cell(spread(gains)), f"{100 * share:.0f} %"]
            rows.append([*row, *(cells.get(task, "") for task in digits.TASKS)])
    return markdown_table(columns, rows)


def _following(result: Measured) -> tuple[float, float, dict[str, float | None]]:
    """Return one-hot minus equal in points, the share of rises, and Spearman's ρ.

    A rise is a step toward a task that does not lose on it. Steps: from the equal preference to a priority of 0.5 to
    one-hot, as far as they differ and were measured.
    """
    kept, gains, ranks = [], [], {}
    for k, task in enumerate(result.tasks):
        kinds = ("equal", f"priority:{task}", f"one-hot:{task}")
        points = [point for kind in kinds if (point := result.point(kind)) is not None and point.gamma is not None]
        path = {point.gamma[k]: point.accuracy[k] for point in points if point.gamma is not None}
        own = [path[gamma] for gamma in sorted(path)]
        kept += [after >= before for before, after in itertools.pairwise(own)]
        gains.append(own[-1] - own[0])
        graded = [(point.gamma[k], point.accuracy[k]) for point in result.points if point.gamma is not None]
        ranks[task] = spearman([gamma for gamma, _ in graded], [accuracy for _, accuracy in graded])
    return math.fsum(gains) / len(gains), sum(kept) / len(kept), ranks
