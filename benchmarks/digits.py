"""The embedded digits suite over several seeds: every method, eight tasks and two, chosen without labels.

A seed makes the whole suite anew (heads, generalist, eight fine-tuned encoders) and seeds the merging. Seeds 0, 1 and 2
were looked at while the suite was designed; figures to be believed come from others.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pareto_merging.config import MethodSettings, RunConfig
from pareto_merging.data import digits
from pareto_merging.demo import METHOD, PAIR_METHOD, TWO_TASKS
from pareto_merging.study import Study, front_metrics
from pareto_merging.threads import one_thread
from pareto_merging.workspace import Workspace

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# as many runs as AdaMerging gets: the preset's regularisation and a weaker one, two rates each
CANDIDATES = tuple(
    {"concentration": concentration, "tensor_norm": tensor_norm, "learning_rate": rate, "lambda_learning_rate": 1e-2}
    for concentration, tensor_norm in ((0.1, 0.1), (1.0, 0.01))
    for rate in (1e-3, 3e-3)
)
# the first candidate: the preset but for the number of steps and the rate of λ; nothing about it is chosen
PUBLISHED = "Pareto Merging, icml2025"
CHOSEN = "Pareto Merging, chosen"


def run(seeds: Sequence[int], quick: bool = False, progress: bool = True) -> dict[str, Any]:
    """Measure every seed; ``quick`` takes three steps everywhere and proves only that it runs."""
    results = []
    for number, seed in enumerate(seeds, start=1):
        start = time.perf_counter()
        with one_thread(), tempfile.TemporaryDirectory() as folder:
            digits.make(Path(folder), seed=seed)
            results.append({"seed": seed, **_seed(Path(folder), seed, quick)})
        if progress:
            took = time.perf_counter() - start
            print(f"seed {seed} ({number} of {len(seeds)}) took {took:.0f} s", flush=True)
    return {"seeds": list(seeds), "results": results, "summary": summarize(results)}


def _study(folder: Path, seed: int, method: Mapping[str, Any], tasks: Sequence[str] | None, quick: bool) -> Study:
    settings = {**method, "seed": seed, **({"steps": 3, "batch_size": 8} if quick else {})}
    config = RunConfig.model_validate({"suite": "digits", "tasks": list(tasks) if tasks else None, "method": settings})
    return Study(Workspace(config, folder), learning_rates=LEARNING_RATES, progress=False)


def _seed(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        # a candidate that collapses is not chosen; its collapse is in the results
        warnings.simplefilter("ignore")
        eight = _study(folder, seed, METHOD, None, quick)
        entries = eight.baselines()
        chosen, runs, candidates = _choose(eight)
        pair = _study(folder, seed, PAIR_METHOD, TWO_TASKS, quick)
        pair_entries = pair.baselines()
        pair_chosen, pair_runs, pair_candidates = _choose(pair)
    for label, learned in runs.items():
        for name, entry in eight.pareto_entries(*learned).items():
            entries[name.replace("Pareto Merging", label)] = entry
    points = {
        name: list(entry.scores.accuracy.values())
        for name, entry in pair_entries.items()
        if name not in ("Individual", "Pretrained")
    }
    fronts = {label: pair.front(learned[0]) for label, learned in pair_runs.items()}
    return {
        "methods": {name: entry.to_json() for name, entry in entries.items()},
        "chosen": chosen,
        "candidates": candidates,
        "two_tasks": {
            "tasks": list(TWO_TASKS),
            "methods": {name: entry.to_json() for name, entry in pair_entries.items()},
            "chosen": pair_chosen,
            "candidates": pair_candidates,
            "fronts": fronts,
            "metrics": {label: front_metrics(front, points) for label, front in fronts.items()},
        },
    }


def _with(study: Study, candidate: Mapping[str, Any]) -> MethodSettings:
    return study.method.model_copy(update=dict(candidate))


Run = tuple[nn.Module, float, int]


def _choose(study: Study) -> tuple[dict[str, Any], dict[str, Run], list[dict[str, Any]]]:
    """The candidate with the best label-free score; its run and the published preset's; all candidates' scores."""
    runs = [(candidate, study.learn(_with(study, candidate))) for candidate in CANDIDATES]
    scored = [(study.label_free_set_score(learned[0]), candidate, learned) for candidate, learned in runs]
    _, candidate, learned = min(scored, key=lambda row: row[0])
    listed = [{**candidate, "label_free_score": round(score, 4)} for score, candidate, _ in scored]
    return dict(candidate), {PUBLISHED: runs[0][1], CHOSEN: learned}, listed


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds."""
    names = list(results[0]["methods"])
    averages = {name: _spread([r["methods"][name]["average"] for r in results]) for name in names}
    metrics = {label: [r["two_tasks"]["metrics"][label] for r in results] for label in (PUBLISHED, CHOSEN)}
    first = metrics[PUBLISHED]
    keys = [key for key in first[0] if key.startswith("spearman")]
    return {
        "averages": averages,
        "hypervolume": {
            "reference_point": first[0]["reference_point"],
            **{label: _spread([m["pareto_merging"] for m in rows]) for label, rows in metrics.items()},
            "all baselines together": _spread([m["all_baselines_together"] for m in first]),
            **{name: _spread([m["baselines"][name] for m in first]) for name in first[0]["baselines"]},
        },
        "spearman": {
            label: {key.removeprefix("spearman_"): _spread([m[key] for m in rows]) for key in keys}
            for label, rows in metrics.items()
        },
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": round(statistics.fmean(known), 4) if known else None,
        "sd": round(statistics.stdev(known), 4) if len(known) > 1 else None,
        "values": [None if value is None else round(value, 4) for value in values],
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The summary as the tables of the README."""
    summary = report["summary"]
    seeds = ", ".join(str(seed) for seed in report["seeds"])
    lines = [
        f"Average held-out accuracy over the eight tasks, mean ± standard deviation over suite seeds {seeds}:",
        "",
        "| method | average (%) |",
        "|---|---|",
        *(f"| {name} | {_cell(value, 1)} |" for name, value in summary["averages"].items()),
        "",
        f"Two tasks, hypervolume above the reference point {summary['hypervolume']['reference_point']} (chance):",
        "",
        "| set | hypervolume |",
        "|---|---|",
        *(f"| {name} | {_cell(v, 0)} |" for name, v in summary["hypervolume"].items() if name != "reference_point"),
        "",
        "Two tasks, Spearman correlation of the preference with what it is for (held-out):",
        "",
        f"| of | {' | '.join(summary['spearman'])} |",
        f"|---{'|---' * len(summary['spearman'])}|",
        *(
            f"| {key.replace('_', ' and ')} | {' | '.join(_cell(v[key], 2) for v in summary['spearman'].values())} |"
            for key in next(iter(summary["spearman"].values()))
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any], digits_: int) -> str:
    if value["mean"] is None:
        return "undefined (constant)"
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits_}f}"
    return f"{value['mean']:.{digits_}f}{spread}"
