"""What a run leaves: the configuration file, read again, every candidate, and words."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.common import pages, towers
from benchmarks.tune.compiling import active
from benchmarks.tune.groups import Group, describe, sparse
from benchmarks.tune.strategies import Point
from pmkernels import dispatch
from pmkernels.configs import Config


def _families(groups: Sequence[Group]) -> dict[tuple[str, str], list[Group]]:
    """Return the groups by op and type, narrower buckets first."""
    families: dict[tuple[str, str], list[Group]] = {}
    for group in sorted(groups, key=lambda g: math.inf if g.max_rows is None else g.max_rows):
        families.setdefault((group.op, group.kind), []).append(group)
    return families


def lines(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return lines of the file, narrower buckets first.

    The first line that fits is taken: below a tuned bucket every other one has its line too, with what it had. Without
    any change, the lines say what there was.
    """
    unchanged = all(group.chosen is None for group in groups)
    written: list[dict[str, Any]] = []
    for family in _families(groups).values():
        last = max((i for i, group in enumerate(family) if unchanged or group.chosen is not None), default=-1)
        of_family: list[tuple[Group, Config]] = []
        for group in family[: last + 1]:
            config = group.present if group.chosen is None else group.chosen
            if of_family and of_family[-1][1] == config:
                # the wider line serves both
                of_family.pop()
            of_family.append((group, config))
        for group, config in of_family:
            line: dict[str, Any] = {"op": group.op, "dtype": group.kind}
            if group.op not in ("widen", "shrink", "factor_grad"):
                line["aligned"] = True
            line |= {key: value for key in ("max_rows", "max_rank") if (value := getattr(group, key)) is not None}
            written.append({**line, "config": sparse(config)})
    return written


def validate(
    name: str, text: str, groups: Sequence[Group], base: str, labels: Mapping[Point, Mapping[int, str]], like: Tensor
) -> list[str]:
    """Read a file as the library does, and say where that differs from this run."""

    def looked_up() -> dict[tuple[tuple[str, str], int], Config]:
        file, families = dispatch.gpu_file(like.device), dict.fromkeys((g.op, g.kind) for g in groups)
        rows = [2**power for power in range(15)]
        return {(of, m): dispatch.lookup(file, *of, m, towers.RANK, True) for of in families for m in rows}

    with active(base):
        before = looked_up()
    with active(name, text):
        dispatch.in_force().entries(name)
        after = looked_up()
        faults = [
            f"{point} at {rows} rows: {label} was measured, the file gives {given}"
            for point, best in labels.items()
            for rows, label in best.items()
            if (given := point.choose(rows, like)) != label
        ]
    families = _families(groups)
    for (family, rows), config in after.items():
        owner = next((g for g in families[family] if g.max_rows is None or rows <= g.max_rows), None)
        expected = before[family, rows] if owner is None or owner.chosen is None else owner.chosen
        if config != expected:
            meant = f"{' '.join(family)} at {rows} rows: {describe(expected)} was meant"
            faults.append(f"{meant}, the file gives {describe(config)}")
    return faults


def table(
    groups: Sequence[Group], labels: Mapping[Point, Mapping[int, str]], rates: Mapping[str, float], written: int
) -> str:
    """Return gains, crossovers and rates."""
    rows = []
    for group in groups:
        config = group.chosen or group.present
        before, now = group.times.get(group.present, {}), group.times.get(config, {})
        cells = "–", "–", "–"
        shared = before.keys() & now.keys()
        if shared:
            old, new = (statistics.geometric_mean(times[case] for case in shared) for times in (before, now))
            cells = f"{old:.2f}", f"{new:.2f}", f"{old / new:.2f}×"
        rows.append([group.name, *cells, describe(config) if group.chosen else group.state])
    lines = pages.table(("group", "before µs", "now µs", "gain", "configuration"), rows, "lrrrl")
    if labels:
        lines += ["", "Rows from which on streamed is faster than fused, as measured:", ""]
        operations = ("forward", "dx", "weight_grad", "preference")
        rows = []
        for n, d, rank, tasks in dict.fromkeys((p.n, p.d, p.rank, p.tasks) for p in labels):
            ends = [_crossover(labels.get(Point(op, n, d, tasks, rank))) for op in operations]
            rows.append([f"{n}×{d}, r = {rank}", f"{tasks}", *ends])
        lines += pages.table(("layer", "K", *operations), rows, "lr")
        lines += ["", f"{written} strategy lines written: where the cost model would choose otherwise."]
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
        measured = group.times.get(config) or group.screened.get(config, {})
        times = {str(case): us for case, us in measured.items()}
        rejected, final = group.rejected.get(config), config in group.times
        tried.append({"config": sparse(config), "rejected": rejected, "final": final, "times": times})
    line = {"op": group.op, "dtype": group.kind, "max_rows": group.max_rows, "max_rank": group.max_rank}
    chosen = None if group.chosen is None else sparse(group.chosen)
    return {**line, "state": group.state, "present": sparse(group.present), "chosen": chosen, "candidates": tried}
