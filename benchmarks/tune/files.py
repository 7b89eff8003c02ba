"""The configuration file that is written, and whether the library reads it as meant."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.common import towers
from benchmarks.tune.candidates import describe, sparse
from benchmarks.tune.groups import Group
from benchmarks.tune.strategies import Point
from benchmarks.tune.trials import active
from pmkernels import dispatch
from pmkernels.configs import Config


def lines(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return lines of the file, narrower buckets first.

    The first line that fits is taken: below a tuned bucket every other one has its line too, with what it had. Without
    any change, the lines say what there was.
    """
    families: dict[tuple[str, str], list[Group]] = {}
    for group in sorted(groups, key=lambda g: math.inf if g.max_rows is None else g.max_rows):
        families.setdefault((group.op, group.kind), []).append(group)
    unchanged = all(group.chosen is None for group in groups)
    written: list[dict[str, Any]] = []
    for family in families.values():
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
    name: str,
    text: str,
    groups: Sequence[Group],
    base: str,
    labels: Mapping[Point, Mapping[int, str]],
    like: Tensor,
) -> list[str]:
    """Read a file as the library does, and say where that differs from this run."""
    faults = []

    def looked_up() -> dict[tuple[str, int], Config]:
        table, below = {}, dict.fromkeys((g.op, g.kind) for g in groups)
        for op, kind in below:
            for rows in (2**power for power in range(15)):
                table[f"{op} {kind}", rows] = dispatch.lookup(
                    dispatch.gpu_file(like.device), op, kind, rows, towers.RANK, True
                )
        return table

    with active(base):
        before = looked_up()
    with active(name, text):
        dispatch.in_force().entries(name)
        after = looked_up()
        for point, best in labels.items():
            faults += [
                f"{point} at {rows} rows: {label} was measured, the file gives {point.choose(rows, like)}"
                for rows, label in best.items()
                if point.choose(rows, like) != label
            ]
    families: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda g: math.inf if g.max_rows is None else g.max_rows):
        families.setdefault(f"{group.op} {group.kind}", []).append(group)
    for (family, rows), config in after.items():
        owner = next((g for g in families[family] if g.max_rows is None or rows <= g.max_rows), None)
        expected = before[family, rows] if owner is None or owner.chosen is None else owner.chosen
        if config != expected:
            faults.append(f"{family} at {rows} rows: {describe(expected)} was meant, the file gives {describe(config)}")
    return faults
