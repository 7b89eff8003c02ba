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
# as many runs as AdaMerging gets: the preset's regularisation and a weaker one that suits fewer steps, two rates each
CANDIDATES = tuple(
    {"concentration": concentration, "tensor_norm": tensor_norm, "learning_rate": rate, "lambda_learning_rate": 1e-2}
    for concentration, tensor_norm in ((0.1, 0.1), (1.0, 0.01))
    for rate in (1e-3, 3e-3)
)
SHOWN_PRESET = CANDIDATES[0]


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
        chosen, model, candidates = _choose(eight)
        preset_model, seconds, peak = eight.learn(_with(eight, SHOWN_PRESET))
        shown = eight.pareto_entries(preset_model, seconds, peak)
        pair = _study(folder, seed, PAIR_METHOD, TWO_TASKS, quick)
        pair_entries = pair.baselines()
        pair_chosen, pair_model, pair_candidates = _choose(pair)
    entries |= eight.pareto_entries(*model)
    for name, entry in shown.items():
        entries[name.replace("Pareto Merging", "Pareto Merging icml2025")] = entry
    front = pair.front(pair_model[0])
    points = {
        name: list(entry.scores.accuracy.values()) for name, entry in pair_entries.items() if name != "Individual"
    }
    return {
        "methods": {name: entry.to_json() for name, entry in entries.items()},
        "chosen": chosen,
        "candidates": candidates,
        "two_tasks": {
            "tasks": list(TWO_TASKS),
            "methods": {name: entry.to_json() for name, entry in pair_entries.items()},
            "chosen": pair_chosen,
            "candidates": pair_candidates,
            "front": front,
            "hypervolume": front_metrics(front, points),
        },
    }


def _with(study: Study, candidate: Mapping[str, Any]) -> MethodSettings:
    return study.method.model_copy(update=dict(candidate))


def _choose(study: Study) -> tuple[dict[str, Any], tuple[nn.Module, float, int], list[dict[str, Any]]]:
    """The candidate with the best label-free score, its run, and all candidates with their scores."""
    runs = [(candidate, study.learn(_with(study, candidate))) for candidate in CANDIDATES]
    scored = [(study.label_free_set_score(learned[0]), candidate, learned) for candidate, learned in runs]
    _, candidate, learned = min(scored, key=lambda row: row[0])
    listed = [{**candidate, "label_free_score": round(score, 4)} for score, candidate, _ in scored]
    return dict(candidate), learned, listed


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds."""
    names = list(results[0]["methods"])
    averages = {name: _spread([r["methods"][name]["average"] for r in results]) for name in names}
    hypervolumes = [r["two_tasks"]["hypervolume"] for r in results]
    keys = [key for key in hypervolumes[0] if key.startswith("spearman")]
    baselines = list(hypervolumes[0]["baselines"])
    return {
        "averages": averages,
        "hypervolume": {
            "reference_point": hypervolumes[0]["reference_point"],
            "Pareto Merging": _spread([h["pareto_merging"] for h in hypervolumes]),
            "all baselines together": _spread([h["all_baselines_together"] for h in hypervolumes]),
            **{name: _spread([h["baselines"][name] for h in hypervolumes]) for name in baselines},
        },
        "spearman": {key.removeprefix("spearman_"): _spread([h[key] for h in hypervolumes]) for key in keys},
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
        "| pair | correlation |",
        "|---|---|",
        *(f"| {name.replace('_', ' and ')} | {_cell(value, 2)} |" for name, value in summary["spearman"].items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any], digits_: int) -> str:
    if value["mean"] is None:
        return "undefined (constant)"
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits_}f}"
    return f"{value['mean']:.{digits_}f}{spread}"
