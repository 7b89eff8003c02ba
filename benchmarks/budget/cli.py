"""``python -m benchmarks.budget``: compile every kernel without a GPU and check its cost.

The public functions are called with the arguments listed in :mod:`benchmarks.budget.calls`, forward and backward, and
every launch they would make is recorded and compiled for each architecture (ptxas and nvdisasm come with Triton). The
exit code is 1 if a kernel needs more shared memory than the architecture has, spills registers to local memory
(STL/LDL), lacks a tensor-core instruction where a 16-bit product is meant to use one, or if a shipped configuration is
never launched.

On Hopper three faults more, of asynchronous products (wgmma): ptxas says that it serialises them; shared memory may be
written behind a wait with no barrier between the warpgroups; a left operand in registers stays pending, and ptxas is
older than 13.3. :mod:`benchmarks.common.sass` and :mod:`benchmarks.common.ptx` say why each is one.

A compiled kernel depends on types, K, the configuration, and on which sizes and strides are 1 or multiples of 16: the
other sizes do not change the code, so the shapes below stand for all of theirs.
"""

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import triton

from benchmarks import results
from benchmarks.budget.calls import record
from benchmarks.budget.compiling import ARCHITECTURES, Cost, measure
from benchmarks.common.arguments import command_parser
from pmkernels import configs, dispatch
from pmkernels.launch import INTERPRETING

# kernels that one process compiles and then reads together
TOGETHER = 16


def run(archs: Sequence[str], jobs: int, limit: int | None = None) -> tuple[list[Cost], list[str]]:
    """Return every launch on the architectures of its configuration file, and what else is wrong."""
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
        launches = launches[:limit]
        parts = [launches[first : first + TOGETHER] for first in range(0, len(launches), TOGETHER)]
        todo = [ARCHITECTURES[arch] for arch in chosen for _ in parts]
        with (
            ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool,
            Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress,
        ):
            bar = progress.add_task(f"compiling ({name})", total=len(launches) * len(chosen))
            for some in pool.map(measure, parts * len(chosen), todo):
                costs += some
                progress.advance(bar, len(some))
    return costs, faults


def markdown(costs: Sequence[Cost]) -> str:
    """Return one row per kernel, type, configuration and architecture: the worst of its variants."""
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
    parser = command_parser("benchmarks.budget", __doc__)
    default = "repeatable (default: sm_86 and sm_90)"
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help=default)
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
