"""Groups: the lines of a configuration file, and what their candidates are tried on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common import towers
from benchmarks.common.towers import TINY_LAYERS, Layer
from benchmarks.suites import layers
from benchmarks.tune.candidates import candidates
from benchmarks.tune.cases import Case
from benchmarks.tune.compiling import NOT_REACHED, Target
from pmkernels import configs, dispatch
from pmkernels.configs import Asked, Config

# what the goals' hot path launches, first of all
HOT = ("merge_grad", "widen", "preference", "merge")
TUNED = (*HOT, "linear", "weight_grad", "shrink", "factor_grad")
OPS = (*TUNED, "strategies")
# candidates of a group, how many of them are timed on every layer, how many of those are checked beforehand
MOST, FINALISTS, CHECKED = 24, 5, 2
LANGUAGE_MODEL_ROWS = 4096
# linear's buckets of rows -> the rows they are timed at; the last: each layer's own number
ROWS: dict[int | None, tuple[int, ...]] = {32: (1, 32), 128: (50, 128), 256: (256,), 512: (257,), None: ()}
# and preference's
PREFERENCE_ROWS: dict[int | None, tuple[int, ...]] = {32: (1, 32), 512: (50, 257), None: ()}


@dataclass
class Group:
    """One op, type and bucket of rows, with candidates and what they are tried on. The present one comes first."""

    op: str
    kind: str
    max_rows: int | None
    max_rank: int | None
    candidates: list[Config]
    screen: list[Case]
    cases: list[Case]
    checks: list[Case]
    rejected: dict[Config, str] = field(default_factory=dict)
    screened: dict[Config, dict[Case, float]] = field(default_factory=dict)
    times: dict[Config, dict[Case, float]] = field(default_factory=dict)
    chosen: Config | None = None
    # the configuration of this run, or why there is none
    state: str = NOT_REACHED

    @property
    def present(self) -> Config:
        """Return what the library takes without this file."""
        return self.candidates[0]

    @property
    def name(self) -> str:
        """Name the group for people."""
        rows = f"≤ {self.max_rows} rows" if self.max_rows is not None else "any rows" if self.op == "linear" else ""
        return " ".join(part for part in (self.op, self.kind, rows) if part)


def _own_rows(layer: Layer, few: bool) -> int:
    """Return a layer's rows: one image, or a batch of them. A language model has no number of its own."""
    if layer.tokens == 1:
        return LANGUAGE_MODEL_ROWS // (16 if few else 1)
    return layer.tokens * (1 if few else layer.items)


def timing_cases(op: str, max_rows: int | None, among: Sequence[Layer]) -> list[Case]:
    """Return what candidates of a group are timed on: every layer."""
    cases = []
    for layer in among:
        rank = layer.rank
        shape: dict[str, Any] = {"n": layer.n, "d": layer.d}
        if op == "linear":
            for rows in ROWS.get(max_rows) or (_own_rows(layer, few=False),):
                cases += [
                    Case("forward", **shape, rows=rows, rank=rank, bias=True),
                    Case("dx", **shape, rows=rows, rank=rank),
                ]
        elif op == "preference":
            for rows in PREFERENCE_ROWS[max_rows] or (_own_rows(layer, few=False),):
                # a preference for each image, or as many as there can be
                groups = layer.items if rows % layer.items == 0 else 1
                cases += [Case(op, **shape, rows=rows, groups=groups, bias=True)] if rank else []
        elif op == "weight_grad":
            cases.append(Case(op, **shape, rows=_own_rows(layer, few=max_rows is not None), rank=rank))
        elif op in ("merge", "merge_grad"):
            cases += [Case(op, **shape, tasks=tasks, rank=rank) for tasks in ((8, 2) if op == "merge" else (8,))]
        elif rank:
            rows = _own_rows(layer, few=False)
            groups = layer.items if op in ("shrink", "widen") and rows % layer.items == 0 else 1
            cases.append(Case(op, **shape, rows=rows, groups=groups))
    return cases


def check_cases(op: str, kind: str, max_rows: int | None, max_rank: int | None, tiny: bool) -> list[Case]:
    """Return what a configuration must also be right on. K, ranks, types and sizes that no timed layer has."""
    n, d = (48, 80) if tiny else (1040, 528)
    rows = min(max_rows or 1000, 257) - 3 if max_rows else (37 if tiny else 1000)
    rows = min(rows, 37) if tiny else rows
    base = Case("forward" if op == "linear" else op, n, d, rows)
    cases: list[Case] = []
    if op == "linear":
        for call in ("forward", "dx"):
            for tasks, rank in ((1, 4), (2, 16), (4, 32), (32, 16), (8, 64), (8, 0)):
                cases.append(replace(base, call=call, tasks=tasks, rank=rank))
            for tasks in (8, 0):
                cases.append(replace(base, call=call, tasks=tasks, per_row=True))
            cases.append(replace(base, call=call, rows=1))
        cases.append(replace(base, bias=True))
    elif op in ("weight_grad", "merge_grad", "merge"):
        base = replace(base, rows=rows if op == "weight_grad" else 0)
        cases = [replace(base, tasks=tasks, rank=rank) for tasks, rank in ((1, 4), (2, 16), (4, 32), (32, 16), (8, 0))]
        if op == "weight_grad":
            cases += [replace(base, bias=True), replace(base, rows=1)]
        else:
            cases += [replace(base, rank=64), replace(base, tasks=0)]
    else:
        # these are also used where tensors are not aligned
        ranks = [rank for rank in (4, 16, 32, 64) if max_rank is None or rank <= max_rank]
        cases = [replace(base, tasks=tasks, rank=rank) for rank, tasks in itertools.product(ranks, (1, 32))]
        cases.append(replace(base, n=n + 1, d=d + 1, aligned=False))
        if op in ("shrink", "widen"):
            cases.append(replace(base, rows=4 * rows, groups=4))
        if op == "preference":
            cases += [replace(base, groups=rows), replace(base, bias=True), replace(base, rows=1)]
    if kind != "16-bit":
        return [replace(case, kind=kind, dtype="float32") for case in cases]
    half = [replace(case, dtype="float16") for case in cases if (case.tasks, case.rank) in ((2, 16), (1, 16), (4, 32))]
    return cases + half


def groups(target: Target, ops: Sequence[str], previous: str | None, quick: bool) -> list[list[Group]]:
    """Return everything that can be tuned, most important first, in batches. A batch is decided before the next one
    begins.

    The lines that the library has now are candidates too: those of the file in use, the default's, and those of
    ``previous``, an earlier file of this GPU.
    """
    among = TINY_LAYERS if quick else sorted(layers.LAYERS, key=lambda layer: "ViT-L" not in layer.name)
    wanted: list[list[tuple[str, str, int | None, int | None]]] = [
        [("merge_grad", "16-bit", None, None)],
        [("widen", "16-bit", None, 32), *(("preference", "16-bit", rows, 32) for rows in PREFERENCE_ROWS)],
        [("merge", "16-bit", None, None)],
        [("linear", "16-bit", rows, None) for rows in ROWS],
        [("weight_grad", "16-bit", None, None), ("weight_grad", "16-bit", 512, None)],
        [("shrink", "16-bit", None, 32), ("factor_grad", "16-bit", None, 32)],
    ]
    for kind in ("tf32", "float32"):
        wanted.append(
            [(op, kind, rows, None) for op, rows in (("linear", None), ("linear", 128), ("weight_grad", None))]
        )
    if quick:
        # one line of each op, the hot ones first
        lines = {line[0]: line for batch in reversed(wanted) for line in reversed(batch)}
        rest = [lines[op] for op in TUNED if op not in (*HOT, "linear")]
        wanted = [[lines[op] for op in HOT], [("linear", "16-bit", 32, None)], rest]
    batches = []
    for batch in wanted:
        batches.append([group(target, *line, among, previous, quick) for line in batch if line[0] in ops])
    return [batch for batch in batches if batch]


def group(
    target: Target,
    op: str,
    kind: str,
    max_rows: int | None,
    max_rank: int | None,
    among: Sequence[Layer],
    previous: str | None,
    quick: bool,
) -> Group:
    """Return one group with its candidates and cases."""
    top = 1 if op in ("merge", "merge_grad") else (max_rows or 2**14)
    rank = min(towers.RANK, max_rank or towers.RANK)
    present = [dispatch.lookup(name, op, kind, top, rank, True) for name in (target.name, "default")]
    if previous is not None:
        earlier = configs.read_entries(previous)
        present += [e.config for e in earlier if e.fits(Asked(op, kind, top, rank, True))][:1]
    tried = list(dict.fromkeys([*present, *candidates(op, kind, max_rows)]))[: 2 if quick else MOST]
    cases = timing_cases(op, max_rows, among)
    if kind != "16-bit":
        cases = [replace(case, kind=kind, dtype="float32") for case in cases]
    checks = check_cases(op, kind, max_rows, max_rank, quick)
    if quick:
        cases = [replace(case, tasks=2, dtype="float16") for case in cases]
        checks = [replace(case, tasks=min(case.tasks, 2), dtype="float16") for case in checks[:2]]
    return Group(op, kind, max_rows, max_rank, tried, cases[:2], cases, checks)
