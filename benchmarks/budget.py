"""``python -m benchmarks.budget``: compile every kernel as it would be launched, without a GPU, and check its cost.

The public functions are called with the arguments listed in :func:`cases`, forward and backward, and every launch they
would make is recorded and compiled for each architecture (ptxas and nvdisasm come with Triton). The exit code is 1
if a kernel needs more shared memory than the architecture has, spills registers to local memory (STL/LDL), lacks a
tensor-core instruction where a 16-bit product is meant to use one, or if a shipped configuration is never launched.

On Hopper three faults more, of asynchronous products (wgmma): ptxas says that it serialises them; shared memory may be
written behind a wait with no barrier between the warpgroups; a left operand in registers stays pending, and ptxas is
older than 13.3. :mod:`benchmarks.common.sass` and :mod:`benchmarks.common.ptx` say why each is one.

A compiled kernel depends on types, K, the configuration, and on which sizes and strides are 1 or multiples of 16: the
other sizes do not change the code, so the shapes below stand for all of theirs.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

import pmkernels
from benchmarks import results
from benchmarks.common import ptx, sass
from pmkernels import configs, dispatch
from pmkernels.configs import Asked, Config, Entry
from pmkernels.kernels import preference
from pmkernels.launch import INTERPRETING, padded_rank


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has: bytes of shared memory (for one program, and in all), registers, warps, programs."""

    name: str
    capability: int
    shared_per_program: int
    shared: int
    warps: int
    programs: int
    tensor_core: str
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", 80, 163 * 1024, 164 * 1024, 64, 32, "HMMA"),
    "sm_86": Architecture("sm_86", 86, 99 * 1024, 100 * 1024, 48, 16, "HMMA"),
    "sm_89": Architecture("sm_89", 89, 99 * 1024, 100 * 1024, 48, 24, "HMMA"),
    "sm_90": Architecture("sm_90", 90, 227 * 1024, 228 * 1024, 64, 32, "HGMMA"),
}
# the products of tiles these kernels are made for; in the others every product has at most 64 columns
WIDE_PRODUCTS = ("linear_fwd_kernel", "weight_grad_kernel", "preference_linear_kernel")
NARROW_PRODUCTS = ("shrink_kernel", "widen_kernel", "factor_grad_kernel", "core_grad_kernel", "preference_grad_kernel")


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

    def __str__(self) -> str:
        parts = [self.dtype, f"M={self.rows}", f"K={self.tasks}", f"R={self.rank}"]
        parts += [name for name in ("per_row", "frozen_lam", "mixed") if getattr(self, name)]
        return " ".join([*parts, *([] if self.aligned else ["unaligned"])])


# 1 is a size that Triton knows at compile time
ROWS = (1, 8, 100, 200, 257, 8224)
PREFERENCE_ROWS = (1, 50, 257, 8224)


def cases() -> Iterator[Case]:
    """bfloat16 in full; of the other types what differs from it; K, R, rows and alignment as design section 6 lists."""
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
    # float32 weights under autocast
    yield Case("bfloat16", 8, 8, 16, mixed=True)
    yield Case("bfloat16", 8224, 8, 16, mixed=True)


def _call(case: Case) -> None:
    """The call that ``case`` names, on memory that nothing reads: launches are recorded, not run."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    n, d = (3072, 1024) if case.aligned else (1021, 517)
    # an unaligned tensor starts off a 16-byte boundary and its rows are no multiple of 16 apart
    pad = 0 if case.aligned else 1
    stored = torch.float32 if case.mixed else dtype

    def make(*shape: int, like: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
        padded = torch.empty(*shape[:-1], shape[-1] + pad, dtype=like)[..., pad:]
        return padded.requires_grad_(learned)

    tasks = max(case.tasks, 1)
    arguments: dict[str, Tensor] = {"weight": make(n, d, like=stored, learned=False)}
    if case.tasks:
        arguments["task_vectors"] = make(case.tasks, n, d, like=stored, learned=False)
        arguments["lam"] = make(case.tasks, learned=not case.frozen_lam)
    if case.rank:
        arguments |= {"A": make(n, case.rank), "G": make(case.rank, case.rank, tasks), "B": make(d, case.rank)}
        arguments["gamma"] = make(tasks)
    if not case.per_row and not case.mixed:
        merged = pmkernels.merge_weight(**arguments, strategy="fused")
        _backward(merged, arguments)
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


def _other_calls() -> None:
    """Merges of convolutions, biases and many vectors at once, entropies of few and many classes, x of two strides."""
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


def _preference_calls() -> Iterator[tuple[str, str]]:
    """A served layer at a preference per row, few rows and many: yields what is recorded next, and its type."""
    everything = itertools.product(("bfloat16", "float16", "float32", "tf32"), PREFERENCE_ROWS, (True, False))
    wanted = [(*one, 8, 16) for one in everything]
    for tasks, rank in ((1, 4), (32, 32), (32, 64)):
        wanted += [(name, rows, True, tasks, rank) for name in ("bfloat16", "float32") for rows in PREFERENCE_ROWS]
        wanted += [("bfloat16", 8224, False, tasks, rank), ("float16", 257, True, tasks, rank)]
    for name, rows, aligned, tasks, rank in wanted:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        n, d, pad = (3072, 1024, 0) if aligned else (1021, 517, 1)
        wide = torch.empty(n, d + padded_rank(rank), dtype=dtype)
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


@dataclass
class Launch:
    """One distinct launch: what it is for, and the arguments that decide its code."""

    kernel: Any
    case: str
    dtype: str
    configuration: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    key: str


def _argument_key(value: Any) -> str:
    """What of an argument can change the code: at least as fine as Triton's own specialisation."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{value.data_ptr() % 16 == 0}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"int{value == 1}{value % 16 == 0}{abs(value) >= 2**31}"
    return repr(value)


@contextmanager
def _recording(configuration_file: str, launches: dict[str, Launch], used: set[str]) -> Iterator[list[str]]:
    """Record what would be launched on a GPU of that configuration file; yields what it is for: [case, dtype]."""
    now = ["", ""]
    run = triton.runtime.jit.JITFunction.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        configuration = " ".join(
            f"{name.lower().removeprefix('block_')}{value}"
            for name, value in options.items()
            if name.startswith("BLOCK_") or name in ("num_warps", "num_stages")
        ).replace("num_", "")
        parts = [kernel.__name__, *map(_argument_key, arguments), *(f"{k}={v!r}" for k, v in options.items())]
        key = "|".join(parts)
        launches.setdefault(
            key,
            Launch(
                kernel,
                now[0],
                now[1],
                configuration.replace("warps", "w").replace("stages", "s"),
                arguments,
                options,
                key,
            ),
        )

    def noting(_: Asked, entry: Entry) -> Config:
        used.add(repr(entry))
        return entry.config

    triton.runtime.jit.JITFunction.run = record
    try:
        with dispatch.using(replace(dispatch.in_force(), file=configuration_file, runs=True, launch=noting)):
            yield now
    finally:
        triton.runtime.jit.JITFunction.run = run


def record(configuration_file: str) -> tuple[list[Launch], list[str]]:
    """The distinct launches of all cases with that configuration file, and its entries that none of them used."""
    launches: dict[str, Launch] = {}
    used: set[str] = set()
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        with _recording(configuration_file, launches, used) as now:
            for case in cases():
                now[:] = [str(case), case.dtype]
                _call(case)
            for what in _preference_calls():
                now[:] = what
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            now[:] = ["other shapes", "any"]
            _other_calls()
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    own = configs.read_entries(dispatch.in_force().files[configuration_file])
    return list(launches.values()), [repr(e) for e in own if repr(e) not in used]


class _Compiler:
    """A driver that says it is a GPU of one architecture: Triton compiles for it and never launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@dataclass
class Cost:
    """What one compiled kernel takes, and what is wrong with it."""

    kernel: str
    case: str
    dtype: str
    configuration: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    tensor_core: int = 0
    ffma: int = 0
    loads: int = 0
    warps: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def occupancy(arch: Architecture, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most there can be, as registers (256 to a warp at a time) and shared memory allow."""
    per_warp = -(-registers * 32 // 256) * 256
    fit = min(
        arch.programs,
        arch.warps // warps,
        arch.registers // (per_warp * warps) if per_warp else arch.programs,
        arch.shared // (shared + 1024),
    )
    return fit * warps / arch.warps


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@dataclass
class _Compiled:
    """What the compiler made of a launch, and what ptxas said."""

    cost: Cost
    launch: Launch
    kernel: Any
    log: str


def measure(launch: Launch, arch: Architecture) -> Cost:
    """Compile one launch for one architecture and read its machine code."""
    return measure_all([launch], arch)[0]


def measure_all(launches: Sequence[Launch], arch: Architecture) -> list[Cost]:
    """Compile launches for one architecture and read their machine code, which is a third cheaper for many at once."""
    compiled = [_compile(launch, arch) for launch in launches]
    whole = [one for one in compiled if one.kernel is not None]
    start = time.perf_counter()
    codes = sass.disassemble([one.kernel.asm["cubin"] for one in whole], arch.capability, _tool("nvdisasm"))
    share = (time.perf_counter() - start) / max(len(whole), 1)
    for one, code in zip(whole, codes, strict=True):
        start = time.perf_counter()
        _read(one, arch, code)
        one.cost.seconds = round(one.cost.seconds + share + time.perf_counter() - start, 2)
    return [one.cost for one in compiled]


def _compile(launch: Launch, arch: Architecture) -> _Compiled:
    start = time.perf_counter()
    cost = Cost(launch.kernel.__name__, launch.case, launch.dtype, launch.configuration, arch.name)
    triton.runtime.driver.set_active(_Compiler(arch.capability))
    try:
        with _assembler_log() as log:
            kernel = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    except Exception as error:
        cost.faults.append(f"does not compile: {str(error).strip().splitlines()[0][:160]}")
        return _Compiled(cost, launch, None, "")
    cost.seconds = time.perf_counter() - start
    return _Compiled(cost, launch, kernel, log.getvalue())


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def _read(compiled: _Compiled, arch: Architecture, code: sass.Function) -> None:
    """Write down what a kernel takes and what is wrong with it."""
    cost, launch, kernel = compiled.cost, compiled.launch, compiled.kernel
    names = Counter(instruction.base for instruction in code.code)
    cost.registers, cost.shared = _registers(kernel.asm["cubin"]), int(kernel.metadata.shared)
    cost.spills = names["STL"] + names["LDL"]
    cost.instructions = len(code.code)
    cost.tensor_core, cost.ffma = names["HMMA"] + names["HGMMA"], names["FFMA"]
    cost.loads = names["LDG"] + names["LDGSTS"]
    cost.warps = launch.options["num_warps"]
    cost.occupancy = round(occupancy(arch, cost.registers, cost.shared, cost.warps), 3)
    if cost.shared > arch.shared_per_program:
        cost.faults.append(f"shared memory {cost.shared} B, {arch.name} has {arch.shared_per_program} B")
    if cost.spills:
        cost.faults.append(f"{cost.spills} spill instructions (STL/LDL)")
    if cost.occupancy == 0:
        cost.faults.append("no program fits on a multiprocessor")
    if launch.dtype in ("bfloat16", "float16"):
        multiplies = launch.options.get("FROM_ROWS", True)
        if cost.kernel in WIDE_PRODUCTS and multiplies and not names[arch.tensor_core]:
            cost.faults.append(f"no {arch.tensor_core} instruction")
        if cost.kernel in NARROW_PRODUCTS and not cost.tensor_core:
            cost.faults.append("no tensor-core instruction")
    if "wgmma.mma_async" in kernel.asm["ptx"]:
        cost.faults += _faults_of_wgmma(launch, arch, kernel.asm["ptx"], code, compiled.log)


@contextmanager
def _assembler_log() -> Iterator[io.StringIO]:
    """Catch what ptxas prints while Triton runs it; Triton throws that away where nothing failed."""
    knobs, log = triton.knobs.nvidia, io.StringIO()
    before = knobs.dump_ptxas_log
    knobs.dump_ptxas_log = True
    try:
        with redirect_stdout(log):
            yield log
    finally:
        knobs.dump_ptxas_log = before


def _faults_of_wgmma(launch: Launch, arch: Architecture, text: str, code: sass.Function, log: str) -> list[str]:
    """Say what is wrong with a kernel's wgmma, from its PTX, its machine code and what ptxas printed."""
    if "ptxas info" not in log:
        # the kernel came from Triton's cache: the same PTX again, by Triton's own call and with its flags
        backend = triton.compiler.make_backend(GPUTarget("cuda", arch.capability, 32))
        with _assembler_log() as again:
            backend.make_cubin(text, {}, backend.parse_options(launch.options), arch.capability)
        log = again.getvalue()
    mixed = sass.mixed_loops(code)
    faults = []
    for reason in ptx.serialised(log):
        if "register resources" in reason:
            faults.append(f"ptxas serialises wgmma ({reason}): take smaller tiles or more warps")
        elif mixed:
            faults.append(f"ptxas serialises wgmma ({reason}; {mixed[0]}): give every product of it 64 rows")
        else:
            faults.append(f"ptxas serialises wgmma ({reason}): take fewer stages")
    missing = sass.missing_barriers(code, launch.options["num_warps"])
    if missing:
        faults.append(
            f"shared memory is written after a wgmma wait without a barrier ({len(missing)}×, first {missing[0]}), "
            "another warpgroup may still read it: take 4 warps or fewer stages"
        )
    version = _assembler_version(arch.capability)
    pending = ptx.pending_operands(text) if version < ptx.KEEPS_OPERANDS else []
    if pending:
        faults.append(
            f"a wgmma with a register operand stays pending ({pending[0]}), and ptxas {version[0]}.{version[1]} may "
            "reuse the register (until 13.3): take fewer stages"
        )
    return faults


@functools.cache
def _assembler_version(capability: int) -> tuple[int, int]:
    major, minor, *_ = get_ptxas(capability).version.split(".")
    return int(major), int(minor)


_LAUNCHES: list[Launch] = []
# kernels that one process compiles and then reads together
TOGETHER = 16


def _measure(job: tuple[range, str]) -> list[Cost]:
    places, arch = job
    return measure_all([_LAUNCHES[place] for place in places], ARCHITECTURES[arch])


def run(archs: Sequence[str], jobs: int, limit: int | None = None) -> tuple[list[Cost], list[str]]:
    """Every launch on every architecture that its configuration file is for, and what is wrong besides."""
    from rich.console import Console
    from rich.progress import Progress

    costs: list[Cost] = []
    faults: list[str] = []
    files = dispatch.in_force().files
    for name, text in files.items():
        meant_for = configs.architectures(text)
        # the default file is for GPUs whose architecture has none of its own, which goes on with the default's lines
        chosen = [arch for arch in archs if (arch in meant_for if meant_for else arch not in files)]
        launches, unused = record(name)
        faults += [f"configs/{name}.json: never launched: {entry}" for entry in unused]
        _LAUNCHES[:] = launches[:limit]
        places = range(len(_LAUNCHES))
        todo = [(places[first : first + TOGETHER], arch) for arch in chosen for first in places[::TOGETHER]]
        # forked workers inherit the recorded launches
        with (
            ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool,
            Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress,
        ):
            bar = progress.add_task(f"compiling ({name})", total=len(places) * len(chosen))
            for some in pool.map(_measure, todo):
                costs += some
                progress.advance(bar, len(some))
    return costs, faults


def markdown(costs: Sequence[Cost]) -> str:
    """One row per kernel, type, configuration and architecture: the worst of its variants."""
    groups: dict[tuple[str, str, str, str], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.kernel, cost.dtype, cost.configuration, cost.arch), []).append(cost)
    lines = [
        "| kernel | type | configuration | arch | variants | registers | spills | shared KiB | instructions | "
        "tensor core | FFMA | loads | occupancy | |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (kernel, dtype, configuration, arch), group in sorted(groups.items()):
        lines.append(
            f"| {kernel.removesuffix('_kernel')} | {dtype} | {configuration} | {arch} | {len(group)} | "
            f"{max(c.registers for c in group)} | {max(c.spills for c in group)} | "
            f"{max(c.shared for c in group) / 1024:.1f} | {max(c.instructions for c in group)} | "
            f"{min(c.tensor_core for c in group)} | {max(c.ffma for c in group)} | {max(c.loads for c in group)} | "
            f"{min(c.occupancy for c in group):.0%} | {'FAULT' if any(c.faults for c in group) else ''} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", action="append", choices=sorted(ARCHITECTURES), help="repeatable (default: sm_86 and sm_90)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--limit", type=int, help="only the first so many launches: proves that it runs")
    parser.add_argument("--out", type=Path, help="write every compiled kernel's figures to this JSON file")
    chosen = parser.parse_args(arguments)
    if INTERPRETING:
        print("TRITON_INTERPRET: expected unset, nothing is compiled while interpreting", file=sys.stderr)
        return 2
    start = time.perf_counter()
    costs, faults = run(chosen.arch or ["sm_86", "sm_90"], chosen.jobs, chosen.limit)
    print(markdown(costs))
    faults += [f"{c.kernel} [{c.arch}] {c.configuration} ({c.case}): {fault}" for c in costs for fault in c.faults]
    if chosen.out is not None:
        report = results.header(["python -m benchmarks.budget", *(arguments or sys.argv[1:])])
        report |= {"suite": "budget", "faults": faults, "rows": [asdict(cost) for cost in costs]}
        results.write(chosen.out, {**report, "environment": results.machine()})
    for fault in faults:
        print(f"FAULT {fault}")
    seconds = time.perf_counter() - start
    print(f"{len(costs)} kernels compiled by Triton {triton.__version__} in {seconds:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
