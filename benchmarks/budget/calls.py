"""The calls whose launches are compiled, and their launches, recorded instead of run."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pmkernels
from benchmarks.common.launches import Launch, instead_of_launches
from benchmarks.common.modes import precision
from pmkernels import configs, dispatch, launch
from pmkernels.configs import Asked, Config, Entry
from pmkernels.kernels import preference


@dataclass(frozen=True)
class Case:
    """One call of pareto_linear or merge_weight, forward and backward."""

    dtype: str
    rows: int
    tasks: int
    rank: int
    per_row: bool = False
    aligned: bool = True
    frozen_lam: bool = False
    mixed: bool = False
    constant: int = 0

    def __str__(self) -> str:
        more = [name for name in ("per_row", "frozen_lam", "mixed") if getattr(self, name)]
        more += [] if self.aligned else ["unaligned"]
        more += [f"R_c={self.constant}"] if self.constant else []
        return " ".join([self.dtype, f"M={self.rows}", f"K={self.tasks}", f"R={self.rank}", *more])


# 1 is a size that Triton knows at compile time
ROWS = (1, 8, 100, 200, 257, 8224)
PREFERENCE_ROWS = (1, 50, 257, 8224)


def cases() -> Iterator[Case]:
    """Yield the calls: bfloat16 in full, of the other types what differs from it."""
    for rows, aligned in itertools.product(ROWS, (True, False)):
        yield Case("bfloat16", rows, 8, 16, aligned=aligned)
    for tasks, rank, aligned in itertools.product((1, 8, 32), (4, 16, 32, 64), (True, False)):
        if (tasks, rank) != (8, 16):
            yield Case("bfloat16", 8224, tasks, rank, aligned=aligned)
    for dtype, aligned in itertools.product(("float16", "float32", "tf32"), (True, False)):
        for rows in (8, 100, 8224) if dtype == "float16" else (8224,):
            yield Case(dtype, rows, 8, 16, aligned=aligned)
        yield Case(dtype, 8224, 32, 64, aligned=aligned)
    # folded models, one preference per row, frozen λ, λ alone
    for dtype, aligned in itertools.product(("bfloat16", "float16", "float32", "tf32"), (True, False)):
        yield Case(dtype, 8224, 8, 16, per_row=True, aligned=aligned)
        yield Case(dtype, 257, 0, 16, per_row=True, aligned=aligned)
        yield Case(dtype, 8224, 8, 16, frozen_lam=True, aligned=aligned)
    for (tasks, rank), dtype in itertools.product(((1, 4), (32, 32), (32, 64)), ("bfloat16", "float32", "tf32")):
        yield Case(dtype, 8224, tasks, rank, per_row=True)
    yield Case("bfloat16", 8224, 32, 64, per_row=True, aligned=False)
    yield Case("bfloat16", 100, 8, 16, per_row=True)
    yield Case("bfloat16", 8, 8, 0)
    # the constant term beside the preference's
    yield Case("bfloat16", 8224, 8, 16, constant=32)
    yield Case("bfloat16", 8224, 8, 16, constant=32, per_row=True)
    # float32 weights under autocast
    yield Case("bfloat16", 8, 8, 16, mixed=True)
    yield Case("bfloat16", 8224, 8, 16, mixed=True)


def call(case: Case) -> None:
    """Make the call that ``case`` names, on memory that nothing reads. Launches are recorded, not run."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    n, d = (3072, 1024) if case.aligned else (1021, 517)
    # an unaligned tensor starts off a 16-byte boundary and its rows are no multiple of 16 apart
    pad = 0 if case.aligned else 1
    stored = torch.float32 if case.mixed else dtype

    def make(*shape: int, like: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
        return torch.empty(*shape[:-1], shape[-1] + pad, dtype=like)[..., pad:].requires_grad_(learned)

    tasks = max(case.tasks, 1)
    arguments: dict[str, Tensor] = {"weight": make(n, d, like=stored, learned=False)}
    if case.tasks:
        arguments["task_vectors"] = make(case.tasks, n, d, like=stored, learned=False)
        arguments["lam"] = make(case.tasks, learned=not case.frozen_lam)
    if case.rank:
        arguments |= {"A": make(n, case.rank), "G": make(case.rank, case.rank, tasks), "B": make(d, case.rank)}
        arguments["gamma"] = make(tasks)
    if case.constant:
        arguments |= {"A_c": make(n, case.constant), "B_c": make(d, case.constant)}
    if not case.per_row and not case.mixed:
        _backward(pmkernels.merge_weight(**arguments, strategy="fused"), arguments)
    lead: tuple[int, ...] = (case.rows,)
    if case.per_row:
        items = max(case.rows // 257, 1)
        lead = (items, case.rows // items) if case.rows % items == 0 else (1, case.rows)
        arguments["gamma"] = make(lead[0], 1, tasks)
    arguments["x"] = make(*lead, d, like=torch.float32 if case.mixed else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=case.mixed):
        y = pmkernels.pareto_linear(**arguments, bias=make(n, like=dtype), strategy="fused")
    _backward(y, arguments)


def _backward(result: Tensor, arguments: dict[str, Tensor]) -> None:
    wanted = [value for value in arguments.values() if value.requires_grad]
    if wanted:
        torch.autograd.grad(result, wanted, torch.empty(result.shape, dtype=result.dtype))


def other_calls() -> None:
    """Merge convolutions, biases and many vectors; take entropies; multiply rows of two strides."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in ((768,), (768, 3, 32, 32), (517,)):
            weight, lam = torch.empty(shape, dtype=dtype), torch.empty(8, requires_grad=True)
            task_vectors = torch.empty(8, *shape, dtype=dtype)
            merged = pmkernels.merge_weight(weight, task_vectors=task_vectors, lam=lam, strategy="fused")
            torch.autograd.grad(merged, lam, torch.empty_like(merged))
        vectors, offsets = torch.empty(4096, dtype=dtype), torch.tensor([0, 1024, 4096])
        lam = torch.empty(2, 8, requires_grad=True)
        merged = pmkernels.merge_vectors(vectors, torch.empty(8, 4096, dtype=dtype), lam, offsets, strategy="fused")
        torch.autograd.grad(merged, lam, torch.empty_like(merged))
        for classes in (10, 397, 1000, 50257):
            logits = torch.empty(64, classes, dtype=dtype, requires_grad=True)
            entropy = pmkernels.softmax_entropy(logits, strategy="fused")
            torch.autograd.grad(entropy, logits, torch.empty_like(entropy))
        x = torch.empty(257, 32, 1024, dtype=dtype).transpose(0, 1).requires_grad_()
        weight, task_vectors = torch.empty(1024, 1024, dtype=dtype), torch.empty(8, 1024, 1024, dtype=dtype)
        lam = torch.empty(8, requires_grad=True)
        y = pmkernels.pareto_linear(x, weight, task_vectors=task_vectors, lam=lam, strategy="fused")
        # laid out as a sequence-first model sends it, and expanded as y.sum() does
        for dy in (torch.empty(257, 32, 1024, dtype=dtype).transpose(0, 1), torch.empty((), dtype=dtype)):
            torch.autograd.grad(y, (x, lam), dy.expand(y.shape), retain_graph=True)


def preference_calls() -> Iterator[tuple[str, str]]:
    """Call a served layer at a preference per row, few rows and many. Yields what is recorded next, and its type."""
    everything = itertools.product(("bfloat16", "float16", "float32", "tf32"), PREFERENCE_ROWS, (True, False))
    wanted = [(*one, 8, 16) for one in everything]
    for tasks, rank in ((1, 4), (32, 32), (32, 64)):
        wanted += [(name, rows, True, tasks, rank) for name in ("bfloat16", "float32") for rows in PREFERENCE_ROWS]
        wanted += [("bfloat16", 8224, False, tasks, rank), ("float16", 257, True, tasks, rank)]
    for name, rows, aligned, tasks, rank in wanted:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        n, d, pad = (3072, 1024, 0) if aligned else (1021, 517, 1)
        wide = torch.empty(n, d + launch.padded_rank(rank), dtype=dtype)
        x = torch.empty(rows, d + pad, dtype=dtype)[:, pad:]
        G, B = torch.empty(rank, rank, tasks), torch.empty(rank, d, dtype=dtype).t()
        if aligned and rows > 1 and (tasks, rank) == (8, 16):
            # two strides between the rows, as a sequence-first model has them
            yield f"{name} M={2 * rows} K={tasks} R={rank} preference, sequence first", name
            outer = torch.empty(rows, 2, d, dtype=dtype).transpose(0, 1)
            preference.preference_linear(outer, wide, G, B, torch.empty(2, tasks), torch.empty(n, dtype=dtype))
            preference.widen(outer, G, B, torch.empty(2, tasks))
        for groups in {1, rows}:
            yield f"{name} M={rows} K={tasks} R={rank} preference{'' if aligned else ' unaligned'}", name
            gamma = torch.empty(groups, tasks)
            preference.preference_linear(x, wide, G, B, gamma, torch.empty(n, dtype=dtype))
            preference.widen(x, G, B, gamma)


@dataclass(frozen=True)
class Wanted:
    """One distinct launch to be compiled, and the first call that it is of."""

    launch: Launch
    case: str
    dtype: str

    @property
    def configuration(self) -> str:
        """Return the tiles, warps and stages in a few letters."""
        parts = [
            f"{name.lower().removeprefix('block_')}{value}"
            for name, value in self.launch.decoded_options.items()
            if name.startswith("BLOCK_") or name in ("num_warps", "num_stages")
        ]
        return " ".join(parts).replace("num_warps", "w").replace("num_stages", "s")


def record(file: str) -> tuple[list[Wanted], list[str]]:
    """Return the distinct launches on a GPU of that configuration file, and its unused entries."""
    launches: dict[Launch, Wanted] = {}
    used: set[str] = set()
    # what is recorded now: the case and its type
    now = ["", ""]

    def note(_: Any, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch.of(kernel, arguments, options)
        launches.setdefault(launch, Wanted(launch, *now))

    def noting(_: Asked, entry: Entry) -> Config:
        used.add(repr(entry))
        return entry.config

    force = replace(dispatch.in_force(), file=file, runs=True, launch=noting)
    with instead_of_launches(note), dispatch.using(force), precision("float32"):
        for case in cases():
            now[:] = [str(case), case.dtype]
            call(case)
        for what in preference_calls():
            now[:] = what
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        now[:] = ["other shapes", "any"]
        other_calls()
    own = configs.read_entries(dispatch.in_force().files[file])
    return list(launches.values()), [repr(e) for e in own if repr(e) not in used]
