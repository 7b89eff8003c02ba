"""Groups: the lines of a configuration file, their candidates, and what these are tried on."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from benchmarks.common.towers import RANK, TINY_LAYERS, Layer
from benchmarks.suites import layers
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
# op, type, and the most rows and the largest rank of a line
Line = tuple[str, str, int | None, int | None]


def sparse(config: Config) -> dict[str, int]:
    """Return a Config as files have it. Tile sizes that are used, warps and stages, and what is not the default."""
    values = ((field.name, getattr(config, field.name), field.default) for field in fields(Config))
    return {name: value for name, value, default in values if name in ("num_warps", "num_stages") or value != default}


def describe(config: Config) -> str:
    """Return the fields that are not as a Config has them by default."""
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in sparse(config).items())


def candidates(op: str, kind: str, max_rows: int | None) -> Iterator[Config]:
    """Yield launch configurations worth a try, the likelier ones first."""
    for blocks, tiles, ways in _grids(op, kind, max_rows):
        for block_m, (n, d, warps), (unroll, stages) in itertools.product(blocks, tiles, ways):
            yield Config(block_m, n, d, warps, stages, unroll)


Grid = tuple[Sequence[int], Sequence[tuple[int, int, int]], Sequence[tuple[int, int]]]


def _grids(op: str, kind: str, max_rows: int | None) -> list[Grid]:
    """Return blocks of rows, tiles (N, D, warps) and ways (unroll, stages), to be combined."""
    exact, depths = kind == "float32", ((8, 1), (4, 1), (1, 2))
    if op == "linear" and kind == "16-bit":
        first, second = {32: (32, 16), 128: (64, 128), 256: (64, 128), 512: (128, 64), None: (128, 256)}[max_rows]
        tiles = [(64, 64, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4)]
        return [((first,), tiles, depths), ((second,), tiles[:3], depths[:2])]
    if op == "linear":
        tiles = (
            [(64, 16, 8), (64, 32, 8), (32, 32, 4), (64, 16, 4)] if exact else [(64, 32, 8), (64, 16, 8), (128, 32, 8)]
        )
        return [((32, 64) if exact else (64, 128), tiles, ((1, 2), (4, 1)))]
    if op == "weight_grad" and kind == "16-bit":
        tiles = [(64, 128, 8), (128, 128, 8), (64, 128, 4), (128, 256, 8), (64, 256, 8), (64, 64, 4)]
        return [((64, 32), tiles, ((1, stages),)) for stages in (3, 4)]
    if op == "weight_grad":
        tiles = [(64, 64, 8), (64, 128, 8), *(() if exact else ((128, 128, 8),)), (64, 64, 4)]
        return [((32, 16) if exact else (32, 64), tiles, ((1, stages),)) for stages in (2, 3)]
    if op == "merge":
        tiles = [(16, 128, 4), (8, 256, 4), (32, 64, 4), (32, 128, 8), (16, 256, 8), (4, 512, 4), (64, 64, 8)]
        return [((0,), tiles, depths)]
    if op == "merge_grad":
        # blocks of 64 and more: the partial sums of P and Q stay below a weight
        return [((16,), list(itertools.product((64, 128), (64, 128), (4, 8))), ((1, 2),))]
    if op == "preference":
        # few rows: weights are read, by many programs with many loads in flight; many: large tiles
        tiles = [(64, 128, 4), (64, 64, 4), (32, 128, 4), (128, 64, 4), (64, 128, 8)]
        if max_rows is None:
            tiles = [(128, 64, 8), (256, 64, 8), (128, 64, 4), (64, 64, 4)]
        return [({32: (32, 16), 512: (64, 32, 128)}.get(max_rows or 0, (128, 256)), tiles, ((1, 3), (1, 4)))]
    n, d = ((64, 128), (0,)) if op == "factor_grad" else ((0,), (64, 128))
    blocks = (32, 64, 16) if op == "widen" else (64, 32, 128)
    return [(blocks, list(itertools.product(n, d, (4, 8))), ((1, 3), (1, 2)))]


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
        own, rank = _own_rows(layer, few=op == "weight_grad" and max_rows is not None), layer.rank
        shape: dict[str, Any] = {"n": layer.n, "d": layer.d}
        for rows in {"linear": ROWS, "preference": PREFERENCE_ROWS}.get(op, {}).get(max_rows) or (own,):
            if op == "linear":
                cases.append(Case("forward", **shape, rows=rows, rank=rank, bias=True))
                cases.append(Case("dx", **shape, rows=rows, rank=rank))
            elif op == "weight_grad":
                cases.append(Case(op, **shape, rows=rows, rank=rank))
            elif op in ("merge", "merge_grad"):
                cases += [Case(op, **shape, tasks=tasks, rank=rank) for tasks in ((8, 2) if op == "merge" else (8,))]
            elif rank:
                # a preference for each image, or as many as there can be
                groups = layer.items if op != "factor_grad" and rows % layer.items == 0 else 1
                cases.append(Case(op, **shape, rows=rows, groups=groups, bias=op == "preference"))
    return cases


def check_cases(op: str, kind: str, max_rows: int | None, max_rank: int | None, tiny: bool) -> list[Case]:
    """Return what a configuration must also be right on. K, ranks, types and sizes that no timed layer has."""
    n, d = (48, 80) if tiny else (1040, 528)
    rows = min(min(max_rows, 257) - 3 if max_rows else 1000, 37 if tiny else 1000)
    base = Case("forward" if op == "linear" else op, n, d, rows)
    cases: list[Case] = []
    shapes = ((1, 4), (2, 16), (4, 32), (32, 16), (8, 0))
    if op == "linear":
        for one in (base, replace(base, call="dx")):
            cases += [replace(one, tasks=tasks, rank=rank) for tasks, rank in (*shapes[:4], (8, 64), (8, 0))]
            cases += [replace(one, tasks=tasks, per_row=True) for tasks in (8, 0)]
            cases.append(replace(one, rows=1))
        cases.append(replace(base, bias=True))
    elif op in ("weight_grad", "merge_grad", "merge"):
        base = replace(base, rows=rows if op == "weight_grad" else 0)
        cases = [replace(base, tasks=tasks, rank=rank) for tasks, rank in shapes]
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
    wanted: list[list[Line]] = [
        [("merge_grad", "16-bit", None, None)],
        [("widen", "16-bit", None, 32), *(("preference", "16-bit", rows, 32) for rows in PREFERENCE_ROWS)],
        [("merge", "16-bit", None, None)],
        [("linear", "16-bit", rows, None) for rows in ROWS],
        [("weight_grad", "16-bit", None, None), ("weight_grad", "16-bit", 512, None)],
        [("shrink", "16-bit", None, 32), ("factor_grad", "16-bit", None, 32)],
    ]
    few = (("linear", None), ("linear", 128), ("weight_grad", None))
    wanted += [[(op, kind, rows, None) for op, rows in few] for kind in ("tf32", "float32")]
    if quick:
        # one line of each op, the hot ones first
        lines = {line[0]: line for batch in reversed(wanted) for line in reversed(batch)}
        rest = [lines[op] for op in TUNED if op not in (*HOT, "linear")]
        wanted = [[lines[op] for op in HOT], [("linear", "16-bit", 32, None)], rest]
    asked = ([line for line in batch if line[0] in ops] for batch in wanted)
    return [[group(target, line, among, previous, quick) for line in batch] for batch in asked if batch]


def group(target: Target, line: Line, among: Sequence[Layer], previous: str | None, quick: bool) -> Group:
    """Return one group with its candidates and cases."""
    op, kind, max_rows, max_rank = line
    top = 1 if op in ("merge", "merge_grad") else (max_rows or 2**14)
    rank = min(RANK, max_rank or RANK)
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
