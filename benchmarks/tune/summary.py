"""A run in words: gains, crossovers and rates, and every candidate for the record."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common import pages
from benchmarks.tune.candidates import describe, sparse
from benchmarks.tune.cases import Case
from benchmarks.tune.groups import Group
from benchmarks.tune.strategies import Point


def _mean(times: Mapping[Case, float], cases: Iterable[Case]) -> float:
    values = [times[case] for case in cases]
    return math.exp(sum(map(math.log, values)) / len(values))


def table(
    groups: Sequence[Group], labels: Mapping[Point, Mapping[int, str]], rates: Mapping[str, float], written: int
) -> str:
    """Return gains, crossovers and rates."""
    rows = []
    for group in groups:
        config = group.chosen or group.present
        before, now = group.times.get(group.present), group.times.get(config)
        cells = "–", "–", "–"
        if before is not None and now is not None:
            shared = before.keys() & now.keys()
            if shared:
                old, new = _mean(before, shared), _mean(now, shared)
                cells = f"{old:.2f}", f"{new:.2f}", f"{old / new:.2f}×"
        rows.append([group.name, *cells, describe(config) if group.chosen else group.state])
    lines = pages.table(("group", "before µs", "now µs", "gain", "configuration"), rows, "lrrrl")
    if labels:
        lines += ["", "Rows from which on streamed is faster than fused, as measured:", ""]
        operations = ("forward", "dx", "weight_grad", "preference")
        rows = []
        shapes = dict.fromkeys((p.n, p.d, p.rank, p.tasks) for p in labels)
        for n, d, rank, tasks in shapes:
            ends = [_crossover(labels.get(Point(op, n, d, tasks, rank))) for op in operations]
            rows.append([f"{n}×{d}, r = {rank}", f"{tasks}", *ends])
        lines += [
            *pages.table(("layer", "K", *operations), rows, "lr"),
            "",
            f"{written} strategy lines written: where the cost model would choose otherwise.",
        ]
    lines += ["", "Rates: " + ", ".join(f"{name} {value:.4g}" for name, value in rates.items())]
    return "\n".join(lines)


def _crossover(best: Mapping[int, str] | None) -> str:
    if not best:
        return "–"
    fused = [rows for rows, label in best.items() if label == "fused"]
    later = [rows for rows in best if not fused or rows > max(fused)]
    return str(min(later)) if later else "never"


def recorded(group: Group) -> dict[str, Any]:
    """Return a group for the full record. Every candidate has its times in microseconds or why it was rejected."""
    tried = []
    for config in group.candidates:
        times = group.times.get(config) or group.screened.get(config, {})
        tried.append(
            {
                "config": sparse(config),
                "rejected": group.rejected.get(config),
                "final": config in group.times,
                "times": {str(case): us for case, us in times.items()},
            }
        )
    return {
        "op": group.op,
        "dtype": group.kind,
        "max_rows": group.max_rows,
        "max_rank": group.max_rank,
        "state": group.state,
        "present": sparse(group.present),
        "chosen": None if group.chosen is None else sparse(group.chosen),
        "candidates": tried,
    }
